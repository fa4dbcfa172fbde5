"""Gradient accumulation: one update of the inner transformation per k calls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg, tree
from shampoo_func.errors import HyperparameterError, check_count
from shampoo_func.transforms.base import Wrapper
from shampoo_func.transforms.control import when
from shampoo_func.transforms.scaling import first_step
from shampoo_func.types import RefreshPolicy, Transformation, Tree

__all__ = ["Accumulate", "AccumulateState", "accumulate"]


class AccumulateState(NamedTuple):
    """step: int64 0-d, calls so far. mean: the running mean of gradients. inner: its state."""

    step: Tensor
    mean: Tree
    inner: Any


@dataclass(frozen=True, slots=True)
class Accumulate(Wrapper):
    """See `accumulate`."""

    inner: Transformation
    every: int

    @property
    def refresh_policies(self) -> frozenset[RefreshPolicy]:
        """The inner policies, counted in calls of this stage."""
        policies: list[Any] = [
            replace(policy, calls=policy.calls * self.every)  # type: ignore[type-var]
            for policy in self.inner.refresh_policies
        ]
        return frozenset(policies)

    def init(self, params: Tree) -> AccumulateState:
        """Return a zero mean in at least float32, and the inner state."""

        def zeros(param: Tensor) -> Tensor:
            return torch.zeros_like(param, dtype=linalg.compute_dtype(param.dtype))

        mean = tree.map_params(zeros, params)
        return AccumulateState(first_step(params).step, mean, self.inner.init(params))

    def update(
        self, updates: Tree, state: AccumulateState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, AccumulateState]:
        """Add to the mean; on every k-th call hand it to the inner stage, else return zeros."""
        self.check_call(params, extra)
        tree.check_updates(updates, state.mean)
        step = state.step + 1

        def add(mean: Tensor, update: Tensor) -> Tensor:
            return mean + update / self.every

        mean = tree.advance(add, state.mean, updates)

        def apply(operand: tuple[Tree, Tree, Any]) -> tuple[Tree, Tree, Any]:
            _, total, inner = operand
            given = tree.map(lambda update, whole: whole.to(update.dtype), updates, total)
            out, inner = self.inner.update(given, inner, params, **extra)
            # a parameter without a gradient in this call keeps what it has for the next
            return (
                out,
                tree.advance(lambda whole, _: torch.zeros_like(whole), total, updates),
                inner,
            )

        idle = (tree.map(torch.zeros_like, updates), mean, state.inner)
        out, mean, inner = when(step % self.every == 0, apply, idle)
        return out, AccumulateState(step, mean, inner)


def accumulate(inner: Transformation, *, every: int) -> Accumulate:
    """Feed `inner` the mean of the gradients of `every` calls, once per `every` calls.

    The calls in between return zero updates and leave the inner state as it is. The refresh
    clock (`refresh_due`) counts the calls of this stage.

    Args:
        inner: The transformation to feed.
        every: k, the number of calls per update.

    Raises:
        HyperparameterError: If `every` is no positive int.

    Example:
        >>> from shampoo_func.transforms import identity
        >>> tx = accumulate(identity(), every=2)
        >>> state = tx.init(torch.zeros(1))
        >>> first, state = tx.update(torch.tensor([1.0]), state)
        >>> second, state = tx.update(torch.tensor([3.0]), state)
        >>> first, second
        (tensor([0.]), tensor([2.]))
    """
    check_count("every", every)
    if not isinstance(inner, Transformation):
        raise HyperparameterError(f"accumulate needs a transformation, got {inner!r}.")
    return Accumulate(inner, every)
