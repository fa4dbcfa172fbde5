"""The kinds of weight decay: how the coefficient depends on the learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from shampoo_func.errors import HyperparameterError, check_choice, check_number
from shampoo_func.recipes.parts import is_zero
from shampoo_func.types import Scalar, Schedule

__all__ = ["DecayKind", "decay_of"]

DecayKind = Literal["decoupled", "l2", "corrected", "independent"]


@dataclass(frozen=True, slots=True)
class _CorrectedDecay:
    """weight_decay * learning_rate(step) / peak, as a schedule."""

    weight_decay: Scalar
    learning_rate: Schedule
    peak: Scalar

    def __call__(self, step: Any) -> Any:
        return self.weight_decay * self.learning_rate(step) / self.peak


def decay_of(
    weight_decay: Scalar,
    kind: DecayKind,
    learning_rate: Scalar | Schedule,
    peak: Scalar | None,
) -> Scalar | Schedule:
    """Return what the parameters are multiplied by when decay is added to the direction.

    Args:
        weight_decay: The coefficient.
        kind: See `shampoo`.
        learning_rate: A number, 0-d tensor, or schedule of the step.
        peak: The rate that the coefficient is meant for; the learning rate if not given.

    Raises:
        HyperparameterError: If a number is out of range, or a peak is needed and not given.
    """
    check_choice("weight_decay_kind", kind, ("decoupled", "l2", "corrected", "independent"))
    check_number("weight_decay", weight_decay)
    if peak is not None:
        check_number("peak_learning_rate", peak, low_open=True, high_open=True)
    if is_zero(weight_decay) or kind in ("l2", "decoupled"):
        return weight_decay
    if peak is None:
        if callable(learning_rate) or isinstance(learning_rate, Tensor):
            raise HyperparameterError(
                f"weight_decay_kind={kind!r} with a schedule or tensor as learning_rate needs "
                "peak_learning_rate: the rate that weight_decay is meant for."
            )
        peak = learning_rate
    check_number("learning_rate", peak, low_open=True)
    if kind == "independent":
        return weight_decay / peak
    if callable(learning_rate) and not isinstance(learning_rate, Tensor):
        return _CorrectedDecay(weight_decay, learning_rate, peak)
    return weight_decay * learning_rate / peak
