"""Diagonal second moments (Adam, RMSprop, AdaGrad), and no preconditioner at all (SGD)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import HyperparameterError, check_count, check_dtype, check_number
from shampoo_func.types import EmptyState, Preconditioner, Scalar, named_roles

__all__ = [
    "IdentityPreconditioner",
    "SecondMoment",
    "SecondMomentState",
    "identity_preconditioner",
    "second_moment",
]


class SecondMomentState(NamedTuple):
    """step: int64 `[n]`, gradients taken in. second_moment: `[n, d1, ..., dk]`, of squares."""

    step: Tensor
    second_moment: Tensor


@dataclass(frozen=True, slots=True)
class SecondMoment(Preconditioner):
    """See `second_moment`."""

    beta2: Scalar = 0.999
    epsilon: Scalar = 1e-8
    bias_correction: bool = True
    drop_weighting: bool = False
    dtype: torch.dtype | None = None
    exponents: tuple[tuple[int, float], ...] = ()

    def init(self, block: Tensor) -> SecondMomentState:
        """Return zeros shaped as the block."""
        step = torch.zeros((), dtype=torch.int64, device=block.device)
        return SecondMomentState(step, torch.zeros_like(block, dtype=self.dtype))

    def accumulate(self, state: SecondMomentState, grads: Tensor) -> SecondMomentState:
        """Take the squared gradient into the moving average, or the sum."""
        moment = state.second_moment
        grads = grads.to(torch.promote_types(grads.dtype, moment.dtype))
        if self._sums:
            new = (moment + grads * grads).to(moment.dtype)
        elif self.drop_weighting:
            new = (moment * linalg.align(self.beta2, moment) + grads * grads).to(moment.dtype)
        else:
            new = linalg.ema(moment, grads * grads, self.beta2)
        return SecondMomentState(state.step + 1, linalg.computed_once(new))

    def refresh(self, state: SecondMomentState) -> SecondMomentState:
        """Return the state as it is: nothing is derived from the moment."""
        return state

    def apply(self, state: SecondMomentState, updates: Tensor) -> Tensor:
        """Divide by the root of the (corrected) moment plus epsilon."""
        moment = state.second_moment
        if self.bias_correction and not (self._sums or self.drop_weighting):
            step = state.step.clamp(min=1)  # a block without gradients would divide 0 by 0
            moment = moment / linalg.bias_correction(self.beta2, step, moment)
        # the derivative of a root at 0 is infinite; the clamp changes no other value
        positive = moment.clamp(min=torch.finfo(moment.dtype).tiny)
        exponent = dict(self.exponents).get(updates.ndim - state.step.ndim, 0.5)
        deviation = positive.sqrt() if exponent == 0.5 else positive.pow(exponent)
        return (updates / (deviation + linalg.align(self.epsilon, deviation))).to(updates.dtype)

    @property
    def refreshes(self) -> bool:
        """Nothing is ever recomputed."""
        return False

    def block_shape(self, state: SecondMomentState) -> tuple[int, ...]:
        """Return the shape of the moment."""
        return tuple(state.second_moment.shape)

    def roles(self, state: SecondMomentState) -> Any:
        """Return the names of what the leaves are."""
        return named_roles(state, {"second_moment": "second_moment"})

    def reads(self, function: str) -> frozenset[str]:
        """Only `accumulate` and `apply` read the moment."""
        return frozenset({"second_moment"} if function in ("accumulate", "apply") else ())

    @property
    def _sums(self) -> bool:
        return not isinstance(self.beta2, Tensor) and self.beta2 == 1.0


@dataclass(frozen=True, slots=True)
class IdentityPreconditioner(Preconditioner):
    """See `identity_preconditioner`."""

    @property
    def refreshes(self) -> bool:
        """Nothing is ever recomputed."""
        return False

    def init(self, block: Tensor) -> EmptyState:
        """Return the empty state."""
        return EmptyState()

    def reads(self, function: str) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def accumulate(self, state: EmptyState, grads: Tensor) -> EmptyState:
        """Return the empty state."""
        return state

    def refresh(self, state: EmptyState) -> EmptyState:
        """Return the empty state."""
        return state

    def apply(self, state: EmptyState, updates: Tensor) -> Tensor:
        """Return the updates unchanged."""
        return updates


def second_moment(
    beta2: Scalar = 0.999,
    *,
    epsilon: Scalar = 1e-8,
    bias_correction: bool = True,
    drop_weighting: bool = False,
    dtype: torch.dtype | None = None,
    exponents: Mapping[int, float] | None = None,
) -> SecondMoment:
    """Diagonal preconditioner: U / (sqrt(V / (1 - beta2^t)) + epsilon).

    V <- beta2 V + (1 - beta2) G*G is Adam's second moment; without bias correction RMSprop's;
    with beta2 = 1, V <- V + G*G, AdaGrad's. With `drop_weighting`, V <- beta2 V + G*G: a sum
    that forgets, never corrected, which for constant gradients grows to G*G / (1 - beta2).

    Args:
        beta2: Decay, a number in [0, 1] or a 0-d tensor; the number 1 means AdaGrad's sum.
        epsilon: Added to the root, in the units of the gradient.
        bias_correction: Whether to divide V by 1 - beta2^t; has no effect with
            `drop_weighting` or beta2 = 1.
        drop_weighting: Whether new squares enter with weight 1 and not 1 - beta2.
        dtype: dtype of V; that of the block if not given.
        exponents: What power of V is divided by, by the order of a block: `{3: 0.25}`; 1/2, the
            root, for orders that are not named.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Source: arXiv 1412.6980 (Adam), algorithm 1; JMLR 12 (2011) 2121 (AdaGrad).

    Example:
        >>> tx = second_moment(beta2=1.0, epsilon=0.0)
        >>> state = tx.accumulate(tx.init(torch.zeros(2)), torch.tensor([3.0, -4.0]))
        >>> tx.apply(state, torch.tensor([3.0, -4.0]))
        tensor([ 1., -1.])
    """
    check_number("beta2", beta2, high=1.0)
    check_number("epsilon", epsilon)
    check_dtype("dtype", dtype)
    chosen: Any = {} if exponents is None else exponents
    if not isinstance(chosen, Mapping):
        raise HyperparameterError(
            f"exponents must map orders to powers, as in {{2: 0.25}}, got {exponents!r}."
        )
    for order, exponent in chosen.items():
        check_count("exponents: an order", order)
        check_number(f"exponents[{order}]", exponent, low_open=True)
    powers = tuple(sorted(chosen.items()))
    return SecondMoment(beta2, epsilon, bias_correction, drop_weighting, dtype, powers)


def identity_preconditioner() -> IdentityPreconditioner:
    """No preconditioner: the direction of SGD, as the direction or the magnitude of a graft.

    Example:
        >>> tx = identity_preconditioner()
        >>> tx.apply(tx.init(torch.zeros(2)), torch.tensor([3.0, -4.0]))
        tensor([ 3., -4.])
    """
    return IdentityPreconditioner()
