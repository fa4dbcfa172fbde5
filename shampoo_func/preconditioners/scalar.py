"""One second moment per block: AdaGrad-Norm, and scalar RMSprop and Adam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import check_choice, check_number
from shampoo_func.types import Preconditioner, Scalar, named_roles

__all__ = ["ScalarSecondMoment", "ScalarSecondMomentState", "scalar_second_moment"]


class ScalarSecondMomentState(NamedTuple):
    """step: int64 `[n]`, gradients taken in. second_moment: `[n]`, one number per block."""

    step: Tensor
    second_moment: Tensor


@dataclass(frozen=True, slots=True)
class ScalarSecondMoment(Preconditioner):
    """See `scalar_second_moment`."""

    beta2: Scalar = 0.999
    epsilon: Scalar = 1e-8
    bias_correction: bool = True
    reduce: Literal["mean", "sum"] = "mean"

    def init(self, block: Tensor) -> ScalarSecondMomentState:
        """Return zero, in at least float32."""
        step = torch.zeros((), dtype=torch.int64, device=block.device)
        moment = block.new_zeros((), dtype=linalg.compute_dtype(block.dtype))
        return ScalarSecondMomentState(step, moment)

    def accumulate(self, state: ScalarSecondMomentState, grads: Tensor) -> ScalarSecondMomentState:
        """Take the mean (or sum) of the squared elements into the moving average, or the sum."""
        moment = state.second_moment
        if grads.numel() == 0:
            return state._replace(step=state.step + 1)
        squares = grads.to(moment.dtype).square().reshape(*moment.shape, -1)
        new = squares.mean(-1) if self.reduce == "mean" else squares.sum(-1)
        moment = moment + new if self._sums else linalg.ema(moment, new, self.beta2)
        return ScalarSecondMomentState(state.step + 1, moment)

    def refresh(self, state: ScalarSecondMomentState) -> ScalarSecondMomentState:
        """Return the state as it is: nothing is derived from the moment."""
        return state

    def apply(self, state: ScalarSecondMomentState, updates: Tensor) -> Tensor:
        """Divide every block by the root of its (corrected) moment plus epsilon."""
        moment = state.second_moment
        if self.bias_correction and not self._sums:
            step = state.step.clamp(min=1)  # a block without gradients would divide 0 by 0
            moment = moment / linalg.bias_correction(self.beta2, step, moment)
        # the derivative of a root at 0 is infinite; the clamp changes no other value
        deviation = moment.clamp(min=torch.finfo(moment.dtype).tiny).sqrt()
        deviation = deviation + linalg.align(self.epsilon, deviation)
        return (updates / linalg.align(deviation, updates)).to(updates.dtype)

    def roles(self, state: ScalarSecondMomentState) -> Any:
        """Return the names of what the leaves are."""
        return named_roles(state, {"second_moment": "second_moment"})

    @property
    def refreshes(self) -> bool:
        """Nothing is ever recomputed."""
        return False

    @property
    def _sums(self) -> bool:
        return not isinstance(self.beta2, Tensor) and self.beta2 == 1.0


def scalar_second_moment(
    beta2: Scalar = 0.999,
    *,
    epsilon: Scalar = 1e-8,
    bias_correction: bool = True,
    reduce: Literal["mean", "sum"] = "mean",
) -> ScalarSecondMoment:
    """One adaptive step size per block: U / (sqrt(v / (1 - beta2^t)) + epsilon).

    v <- beta2 v + (1 - beta2) mean(G*G), or with beta2 = 1 the sum over the steps. With
    `reduce="mean"` a steady gradient gives entries of size 1, as Adam's, so that the same
    learning rates fit; with "sum", v is of |G|^2 and the update has norm 1: AdaGrad-Norm for
    beta2 = 1. The direction stays that of the (filtered) gradient. As the magnitude in
    `graft(...)` it lends a block this step size.

    Args:
        beta2: Decay, a number in [0, 1] or a 0-d tensor; the number 1 means AdaGrad's sum.
        epsilon: Added to the root, in the units of the gradient.
        bias_correction: Whether to divide v by 1 - beta2^t.
        reduce: Whether the squares of a block's elements are averaged or added up.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Source: arXiv 1806.01811 (AdaGrad-Norm), algorithm 1.

    Example:
        >>> tx = scalar_second_moment(1.0, epsilon=0.0, reduce="sum")
        >>> g = torch.tensor([3.0, -4.0])
        >>> tx.apply(tx.accumulate(tx.init(torch.zeros(2)), g), g)
        tensor([ 0.6000, -0.8000])
    """
    check_number("beta2", beta2, high=1.0)
    check_number("epsilon", epsilon)
    check_choice("reduce", reduce, ("mean", "sum"))
    return ScalarSecondMoment(beta2, epsilon, bias_correction, reduce)
