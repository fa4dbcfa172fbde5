"""Sign descent: the sign of every element, scaled by one number per block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import check_choice
from shampoo_func.types import Preconditioner

__all__ = ["Sign", "SignScale", "SignState", "sign_preconditioner"]

SignScale = Literal["none", "mean_abs", "sum_abs"]


class SignState(NamedTuple):
    """step: int64 `[n]`, gradients taken in; it also tells a block from a stack of blocks."""

    step: Tensor


@dataclass(frozen=True, slots=True)
class Sign(Preconditioner):
    """See `sign_preconditioner`."""

    scale: SignScale | Callable[[Tensor], Any] = "none"

    def init(self, block: Tensor) -> SignState:
        """Return a counter at 0."""
        return SignState(torch.zeros((), dtype=torch.int64, device=block.device))

    def accumulate(self, state: SignState, grads: Tensor) -> SignState:
        """Count: there are no statistics."""
        return SignState(state.step + 1)

    def refresh(self, state: SignState) -> SignState:
        """Return the state as it is: nothing is derived from it."""
        return state

    def apply(self, state: SignState, updates: Tensor) -> Tensor:
        """Return the scaled signs."""
        sign = updates.sign()
        if self.scale == "none" or updates.numel() == 0:
            return sign
        batch = state.step.ndim
        if callable(self.scale):
            return linalg.scaled(sign, self._by_function(self.scale, updates, batch))
        size = updates.abs().reshape(*updates.shape[:batch], -1)
        dtype = linalg.compute_dtype(updates.dtype)
        total = (
            size.mean(-1, dtype=dtype) if self.scale == "mean_abs" else size.sum(-1, dtype=dtype)
        )
        return linalg.scaled(sign, total)

    def _by_function(self, scale: Callable[[Tensor], Any], updates: Tensor, batch: int) -> Tensor:
        """Return the user's scale of every block, which it sees one at a time."""

        def of_block(block: Tensor) -> Tensor:
            return block.new_zeros(()) + scale(block)  # it may return a number

        for _ in range(batch):
            of_block = torch.func.vmap(of_block)
        return of_block(updates)

    @property
    def refreshes(self) -> bool:
        """Nothing is ever recomputed."""
        return False


def sign_preconditioner(scale: SignScale | Callable[[Tensor], Any] = "none") -> Sign:
    """Sign descent: a block G becomes scale(G) * sign(G).

    The direction of steepest descent in the largest-element norm; "sum_abs" gives it the
    length that belongs to that norm, "mean_abs" that over the number of elements, as the
    scaled signs of compressed gradients have it.

    Args:
        scale: "none" for 1, "mean_abs" or "sum_abs" of the block's elements, or a function of
            one block that returns a number or 0-d tensor (under `vmap` over the blocks).

    Raises:
        HyperparameterError: If the name is unknown.

    Source: arXiv 1802.04434 (signSGD); arXiv 2409.20325, section 2.

    Example:
        >>> tx = sign_preconditioner("mean_abs")
        >>> tx.apply(tx.init(torch.zeros(2)), torch.tensor([3.0, -1.0]))
        tensor([ 2., -2.])
    """
    if not callable(scale):
        check_choice("scale", scale, ("none", "mean_abs", "sum_abs"))
    return Sign(scale)
