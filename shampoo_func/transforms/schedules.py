"""Schedules: a hyper-parameter as a function of the step, in tensor arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import check_count, check_number
from shampoo_func.types import Scalar

__all__ = [
    "ConstantSchedule",
    "CosineDecaySchedule",
    "LinearSchedule",
    "PiecewiseConstantSchedule",
    "constant_schedule",
    "cosine_decay_schedule",
    "linear_schedule",
    "piecewise_constant_schedule",
]


def _real(step: Any) -> Tensor:
    """Return the step as a floating tensor on its own device."""
    step = torch.as_tensor(step)
    return step.to(linalg.scalar_dtype(step.device))


def _progress(step: Any, steps: int) -> Tensor:
    """Return the fraction of `steps` that is done, clamped to [0, 1]."""
    return (_real(step) / steps).clamp(0.0, 1.0)


@dataclass(frozen=True, slots=True)
class ConstantSchedule:
    """See `constant_schedule`."""

    value: Scalar

    def __call__(self, step: Any) -> Tensor:
        """Return the value."""
        return torch.zeros_like(_real(step)) + self.value


@dataclass(frozen=True, slots=True)
class LinearSchedule:
    """See `linear_schedule`."""

    init_value: Scalar
    end_value: Scalar
    transition_steps: int

    def __call__(self, step: Any) -> Tensor:
        """Return the value at a step."""
        done = _progress(step, self.transition_steps)
        return self.init_value * (1 - done) + self.end_value * done


@dataclass(frozen=True, slots=True)
class CosineDecaySchedule:
    """See `cosine_decay_schedule`."""

    init_value: Scalar
    end_value: Scalar
    decay_steps: int

    def __call__(self, step: Any) -> Tensor:
        """Return the value at a step."""
        left = (1 + torch.cos(math.pi * _progress(step, self.decay_steps))) / 2
        return self.end_value + (self.init_value - self.end_value) * left


@dataclass(frozen=True, slots=True)
class PiecewiseConstantSchedule:
    """See `piecewise_constant_schedule`."""

    init_value: Scalar
    boundaries_and_scales: tuple[tuple[int, float], ...]

    def __call__(self, step: Any) -> Tensor:
        """Return the value at a step."""
        step = _real(step)
        value = torch.zeros_like(step) + self.init_value
        for boundary, factor in self.boundaries_and_scales:
            value = torch.where(step >= boundary, value * factor, value)
        return value


def constant_schedule(value: Scalar) -> ConstantSchedule:
    """Return `value` at every step.

    Args:
        value: A number or 0-d tensor.

    Example:
        >>> constant_schedule(0.5)(7).item()
        0.5
    """
    check_number("value", value, low=-math.inf)
    return ConstantSchedule(value)


def linear_schedule(init_value: Scalar, end_value: Scalar, transition_steps: int) -> LinearSchedule:
    """Go from `init_value` to `end_value` in a straight line, then stay there.

    Args:
        init_value: The value at step 0.
        end_value: The value from step `transition_steps` on.
        transition_steps: How many steps that takes.

    Raises:
        HyperparameterError: If `transition_steps` is no positive int.

    Example:
        >>> schedule = linear_schedule(0.0, 1.0, 4)
        >>> [schedule(step).item() for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    check_number("init_value", init_value, low=-math.inf)
    check_number("end_value", end_value, low=-math.inf)
    check_count("transition_steps", transition_steps)
    return LinearSchedule(init_value, end_value, transition_steps)


def cosine_decay_schedule(
    init_value: Scalar, decay_steps: int, end_value: Scalar = 0.0
) -> CosineDecaySchedule:
    """Fall from `init_value` to `end_value` along half a cosine, then stay there.

    Args:
        init_value: The value at step 0.
        decay_steps: How many steps the fall takes.
        end_value: The value from then on.

    Raises:
        HyperparameterError: If `decay_steps` is no positive int.

    Source: arXiv 1608.03983, equation 5.

    Example:
        >>> schedule = cosine_decay_schedule(1.0, 4)
        >>> [round(schedule(step).item(), 4) for step in (0, 2, 4, 9)]
        [1.0, 0.5, 0.0, 0.0]
    """
    check_number("init_value", init_value, low=-math.inf)
    check_number("end_value", end_value, low=-math.inf)
    check_count("decay_steps", decay_steps)
    return CosineDecaySchedule(init_value, end_value, decay_steps)


def piecewise_constant_schedule(
    init_value: Scalar, boundaries_and_scales: Mapping[int, float]
) -> PiecewiseConstantSchedule:
    """Multiply the value by a factor at each of some steps.

    Args:
        init_value: The value before the first boundary.
        boundaries_and_scales: Factor by the step from which it holds.

    Raises:
        HyperparameterError: If a boundary is no positive int, or a factor negative or NaN.

    Example:
        >>> schedule = piecewise_constant_schedule(1.0, {2: 0.5, 4: 0.5})
        >>> [schedule(step).item() for step in (1, 2, 3, 4)]
        [1.0, 0.5, 0.5, 0.25]
    """
    check_number("init_value", init_value, low=-math.inf)
    for boundary, factor in boundaries_and_scales.items():
        check_count("boundaries_and_scales: a boundary", boundary)
        check_number(f"boundaries_and_scales[{boundary}]", factor)
    return PiecewiseConstantSchedule(init_value, tuple(sorted(boundaries_and_scales.items())))
