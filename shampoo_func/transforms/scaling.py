"""Stages that multiply updates by a number: constant, learning rate, schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg, tree
from shampoo_func.errors import HyperparameterError, check_number
from shampoo_func.transforms.base import Stateless
from shampoo_func.types import Scalar, Schedule, Transformation, Tree

__all__ = [
    "Identity",
    "Scale",
    "ScaleByLearningRate",
    "ScaleBySchedule",
    "ScheduleState",
    "identity",
    "scale",
    "scale_by_learning_rate",
    "scale_by_schedule",
]


class ScheduleState(NamedTuple):
    """step: int64 0-d, updates done; what the schedule is called with."""

    step: Tensor


def first_step(params: Tree) -> ScheduleState:
    """Return the counter of a schedule, on the device of the first parameter."""
    leaves = tree.leaves(params)
    device = leaves[0].device if leaves else torch.device("cpu")
    return ScheduleState(torch.zeros((), dtype=torch.int64, device=device))


@dataclass(frozen=True, slots=True)
class Identity(Stateless):
    """See `identity`."""

    def transform(self, updates: Tree) -> Tree:
        """Return the updates unchanged."""
        return updates


@dataclass(frozen=True, slots=True)
class Scale(Stateless):
    """See `scale`."""

    factor: Scalar

    def transform(self, updates: Tree) -> Tree:
        """Multiply every update by the factor."""
        return tree.map(lambda u: linalg.scaled(u, self.factor), updates)


@dataclass(frozen=True, slots=True)
class ScaleBySchedule(Transformation):
    """See `scale_by_schedule`."""

    schedule: Schedule
    sign: float = 1.0

    def init(self, params: Tree) -> ScheduleState:
        """Return a counter at 0."""
        tree.check_params(params)
        return first_step(params)

    def update(
        self, updates: Tree, state: ScheduleState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, ScheduleState]:
        """Multiply every update by the schedule's value, and count."""
        self.check_call(params, extra)
        tree.check_updates(updates, params, what="the parameter")
        factor = self.sign * self.schedule(state.step)
        scaled = tree.map(lambda u: linalg.scaled(u, factor), updates)
        return scaled, ScheduleState(state.step + 1)


@dataclass(frozen=True, slots=True)
class ScaleByLearningRate(Stateless):
    """See `scale_by_learning_rate`."""

    learning_rate: Scalar

    def transform(self, updates: Tree) -> Tree:
        """Multiply every update by minus the learning rate."""
        return tree.map(lambda u: linalg.scaled(u, -self.learning_rate), updates)


@dataclass(frozen=True, slots=True)
class ScaleByLearningRateSchedule(ScaleBySchedule):
    """`scale_by_learning_rate` of a schedule."""

    sign: float = -1.0

    @property
    def name(self) -> str:
        """The same name as with a constant learning rate."""
        return "scale_by_learning_rate"


def identity() -> Identity:
    """Return updates unchanged.

    Example:
        >>> tx = identity()
        >>> tx.update({"w": torch.ones(2)}, tx.init({"w": torch.ones(2)}))[0]["w"]
        tensor([1., 1.])
    """
    return Identity()


def scale(factor: Scalar) -> Scale:
    """Multiply updates by a constant.

    Args:
        factor: A number or 0-d tensor, of either sign.

    Raises:
        HyperparameterError: If it is neither, or NaN.

    Example:
        >>> tx = scale(0.5)
        >>> tx.update(torch.ones(2), tx.init(torch.ones(2)))[0]
        tensor([0.5000, 0.5000])
    """
    check_number("factor", factor, low=-float("inf"))
    return Scale(factor)


def scale_by_schedule(schedule: Schedule) -> ScaleBySchedule:
    """Multiply updates by `schedule(step)`, step 0 at the first update.

    Args:
        schedule: A function from an integer tensor to a 0-d tensor or number; use tensor
            arithmetic inside, no `if` on the step, so that it compiles. A module-level
            function or frozen dataclass keeps the stage picklable.

    Raises:
        HyperparameterError: If it is not callable.

    Example:
        >>> from shampoo_func.transforms.schedules import linear_schedule
        >>> tx = scale_by_schedule(linear_schedule(1.0, 0.0, 4))
        >>> state = tx.init(torch.ones(1))
        >>> for _ in range(3):
        ...     updates, state = tx.update(torch.ones(1), state)
        >>> updates
        tensor([0.5000])
    """
    if not callable(schedule):
        raise HyperparameterError(
            f"schedule must be a function of the step, got {schedule!r}; "
            "for a constant use scale(factor)."
        )
    return ScaleBySchedule(schedule)


def scale_by_learning_rate(learning_rate: Scalar | Schedule) -> Transformation:
    """Multiply updates by minus the learning rate: the one stage that flips the sign.

    Args:
        learning_rate: A number >= 0, a 0-d tensor, or a schedule of the step.

    Raises:
        HyperparameterError: If it is a negative or NaN number, or of another kind.

    Example:
        >>> tx = scale_by_learning_rate(0.1)
        >>> tx.update(torch.ones(2), tx.init(torch.ones(2)))[0]
        tensor([-0.1000, -0.1000])
    """
    if callable(learning_rate) and not isinstance(learning_rate, Tensor):
        return ScaleByLearningRateSchedule(learning_rate)
    check_number("learning_rate", learning_rate)
    return ScaleByLearningRate(learning_rate)
