"""Skipping the updates whose gradients are not finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_func import tree
from shampoo_func.errors import HyperparameterError
from shampoo_func.transforms.base import Wrapper
from shampoo_func.transforms.scaling import first_step
from shampoo_func.types import Transformation, Tree

__all__ = ["ApplyIfFinite", "ApplyIfFiniteState", "all_finite", "apply_if_finite"]


class ApplyIfFiniteState(NamedTuple):
    """skipped: int64 0-d, updates skipped so far. in_a_row: the latest of them together."""

    skipped: Tensor
    in_a_row: Tensor
    inner: Any


def all_finite(updates: Tree) -> Tensor:
    """Return whether no leaf holds a NaN or an infinity, a 0-d bool tensor."""
    flags = [torch.isfinite(leaf).all() for leaf in tree.leaves(updates) if leaf is not None]
    if not flags:
        return torch.ones((), dtype=torch.bool)
    device = flags[0].device
    return torch.stack([flag.to(device) for flag in flags]).all()


@dataclass(frozen=True, slots=True)
class ApplyIfFinite(Wrapper):
    """See `apply_if_finite`."""

    inner: Transformation

    def init(self, params: Tree) -> ApplyIfFiniteState:
        """Return zero counts and the inner state."""
        zero = first_step(params).step
        return ApplyIfFiniteState(zero, zero.clone(), self.inner.init(params))

    def update(
        self, updates: Tree, state: ApplyIfFiniteState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, ApplyIfFiniteState]:
        """Update if every gradient is finite; else return zeros and the old inner state."""
        self.check_call(params, extra)
        tree.check_updates(updates, params, what="the parameter")
        finite = all_finite(updates).to(state.skipped.device)
        zeros = tree.map(torch.zeros_like, updates)
        # solvers inside must not see what they would choke on
        safe = tree.select(finite, updates, zeros)
        out, inner = self.inner.update(safe, state.inner, params, **extra)
        after = ApplyIfFiniteState(
            skipped=state.skipped + ~finite,
            in_a_row=torch.where(finite, torch.zeros_like(state.in_a_row), state.in_a_row + 1),
            inner=tree.select(finite, inner, state.inner),
        )
        return tree.select(finite, out, zeros), after


def apply_if_finite(inner: Transformation) -> ApplyIfFinite:
    """Skip an update with a NaN or infinity anywhere in it, and count it.

    A skipped update is zero and leaves the inner state untouched. There is no branch, so it
    compiles, and costs no synchronisation. Wrap the whole chain, so that decay is skipped too.

    Args:
        inner: The transformation to protect.

    Raises:
        HyperparameterError: If it is no transformation.

    Example:
        >>> from shampoo_func.transforms import trace
        >>> tx = apply_if_finite(trace(0.9))
        >>> updates, state = tx.update(torch.tensor([float("nan")]), tx.init(torch.zeros(1)))
        >>> updates, state.skipped, state.inner.trace
        (tensor([0.]), tensor(1), tensor([0.]))
    """
    if not isinstance(inner, Transformation):
        raise HyperparameterError(f"apply_if_finite needs a transformation, got {inner!r}.")
    return ApplyIfFinite(inner)
