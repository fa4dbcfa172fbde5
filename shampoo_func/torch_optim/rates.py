"""The learning rates inside a transformation: finding them, and making them one `lr`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shampoo_func.transforms import ScaleBySchedule, WithHyperparams
from shampoo_func.types import Scalar, Schedule, Transformation

__all__ = ["WithRate", "constant_rates", "scheduled_rate"]


@dataclass(frozen=True, slots=True)
class WithRate:
    """A recipe made of a transformation: its learning rates, in their ratios, as one argument.

    reference: the largest rate, for which `learning_rate` stands.
    """

    tx: Transformation
    reference: float

    def __call__(self, *, learning_rate: Scalar) -> Transformation:
        """Return the transformation with other rates."""

        def changed(rate: float) -> Scalar:
            if rate == self.reference:
                return learning_rate
            return learning_rate * (rate / self.reference)

        return _with_rates(self.tx, changed)


@dataclass(frozen=True, slots=True)
class WithoutRate:
    """A recipe that always makes the same transformation, which has no constant rate."""

    tx: Transformation

    def __call__(self) -> Transformation:
        """Return the transformation."""
        return self.tx


def constant_rates(tx: Transformation) -> list[float]:
    """Return the constant learning rates of the stages inside, as numbers."""
    return [float(rate) for rate in _rates(tx) if not _is_schedule(rate)]


def scheduled_rate(tx: Transformation) -> Schedule | None:
    """Return the schedule of the learning rate, if a stage inside has one."""
    return next((rate for rate in _rates(tx) if _is_schedule(rate)), None)


def _rates(tx: Transformation) -> Iterator[Any]:
    if isinstance(tx, WithHyperparams):
        return  # its numbers live in its state
    if hasattr(tx, "learning_rate"):
        yield tx.learning_rate
    elif isinstance(tx, ScaleBySchedule) and tx.name == "scale_by_learning_rate":
        yield tx.schedule
    for child in tx.children:
        yield from _rates(child)


def _with_rates(tx: Transformation, changed: Callable[[float], Scalar]) -> Transformation:
    """Return the transformation with every constant rate changed."""
    if isinstance(tx, WithHyperparams) or not hasattr(tx, "__dataclass_fields__"):
        return tx
    stage: Any = tx
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(stage):
        value = getattr(tx, field.name)
        if field.name == "learning_rate":
            fields[field.name] = value if _is_schedule(value) else changed(float(value))
        elif isinstance(value, Transformation):
            fields[field.name] = _with_rates(value, changed)
        elif isinstance(value, tuple) and any(_is_named_stage(entry) for entry in value):
            fields[field.name] = tuple((name, _with_rates(own, changed)) for name, own in value)
    result: Transformation = dataclasses.replace(stage, **fields)
    return result


def _is_named_stage(entry: Any) -> bool:
    """Whether an entry of a tuple is a (name, transformation) pair, as in a chain."""
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Transformation)


def _is_schedule(value: Any) -> bool:
    return callable(value) and not isinstance(value, Tensor)
