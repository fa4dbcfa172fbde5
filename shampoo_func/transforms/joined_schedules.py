"""Schedules one after another: join, and the usual warm-ups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo_func.errors import HyperparameterError, check_count
from shampoo_func.transforms.schedules import (
    constant_schedule,
    cosine_decay_schedule,
    linear_schedule,
)
from shampoo_func.types import Scalar, Schedule

__all__ = [
    "JoinedSchedule",
    "join_schedules",
    "warmup_cosine_decay_schedule",
    "warmup_stable_decay_schedule",
]


@dataclass(frozen=True, slots=True)
class JoinedSchedule:
    """See `join_schedules`."""

    schedules: tuple[Schedule, ...]
    boundaries: tuple[int, ...]

    def __call__(self, step: Any) -> Tensor:
        """Return the value of the schedule that a step falls into."""
        step = torch.as_tensor(step)
        value: Tensor = self.schedules[0](step)
        for boundary, schedule in zip(self.boundaries, self.schedules[1:], strict=True):
            later = schedule((step - boundary).clamp(min=0))
            value = torch.where(step >= boundary, later, value)
        return value


def warmup_cosine_decay_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: int,
    decay_steps: int,
    end_value: Scalar = 0.0,
) -> JoinedSchedule:
    """Rise in a straight line to `peak_value`, then fall along half a cosine.

    Args:
        init_value: The value at step 0.
        peak_value: The value at step `warmup_steps`.
        warmup_steps: How many steps the rise takes.
        decay_steps: The step at which the fall ends; the rise counts, as in optax.
        end_value: The value from then on.

    Raises:
        HyperparameterError: If `decay_steps` is not above `warmup_steps`.

    Example:
        >>> schedule = warmup_cosine_decay_schedule(0.0, 1.0, 2, 6)
        >>> [round(schedule(step).item(), 4) for step in (0, 1, 2, 4, 6)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    check_count("warmup_steps", warmup_steps)
    check_count("decay_steps", decay_steps, low=warmup_steps + 1)
    return join_schedules(
        [
            linear_schedule(init_value, peak_value, warmup_steps),
            cosine_decay_schedule(peak_value, decay_steps - warmup_steps, end_value),
        ],
        [warmup_steps],
    )


def warmup_stable_decay_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    end_value: Scalar = 0.0,
) -> JoinedSchedule:
    """Rise to `peak_value`, stay there, and fall at the end, all in straight lines (WSD).

    Args:
        init_value: The value at step 0.
        peak_value: The value on the plateau.
        warmup_steps: Length of the rise.
        stable_steps: Length of the plateau.
        decay_steps: Length of the fall.
        end_value: The value from then on.

    Raises:
        HyperparameterError: If a length is no positive int.

    Source: arXiv 2404.06395, section 4.

    Example:
        >>> schedule = warmup_stable_decay_schedule(0.0, 1.0, 2, 2, 2)
        >>> [schedule(step).item() for step in range(7)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    check_count("stable_steps", stable_steps)
    return join_schedules(
        [
            linear_schedule(init_value, peak_value, warmup_steps),
            constant_schedule(peak_value),
            linear_schedule(peak_value, end_value, decay_steps),
        ],
        [warmup_steps, warmup_steps + stable_steps],
    )


def join_schedules(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> JoinedSchedule:
    """Use one schedule after another; each starts at its own step 0.

    Args:
        schedules: One more than there are boundaries.
        boundaries: The steps at which the next schedule takes over, rising.

    Raises:
        HyperparameterError: If the numbers do not fit, or the boundaries do not rise.

    Example:
        >>> schedule = join_schedules([constant_schedule(1.0), linear_schedule(1.0, 0.0, 2)], [3])
        >>> [schedule(step).item() for step in (2, 3, 4, 5)]
        [1.0, 1.0, 0.5, 0.0]
    """
    if len(schedules) != len(boundaries) + 1:
        raise HyperparameterError(
            f"{len(schedules)} schedules need {len(schedules) - 1} boundaries, got "
            f"{len(boundaries)}."
        )
    for schedule in schedules:
        if not callable(schedule):
            raise HyperparameterError(
                f"a schedule must be a function of the step, got {schedule!r}; for a constant "
                "use constant_schedule(value)."
            )
    for boundary in boundaries:
        check_count("a boundary", boundary, low=0)
    if list(boundaries) != sorted(set(boundaries)):
        raise HyperparameterError(f"boundaries must rise, got {list(boundaries)}.")
    return JoinedSchedule(tuple(schedules), tuple(boundaries))
