"""Statistics from some of the gradients only: every k-th is taken in, all are preconditioned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import HyperparameterError, check_count
from shampoo_func.preconditioners.leaves import map_leaves
from shampoo_func.types import Preconditioner

__all__ = ["Subsampled", "SubsampledState", "subsampled"]


class SubsampledState(NamedTuple):
    """seen: int64 `[n]`, gradients offered so far. inner: the state of the preconditioner."""

    seen: Tensor
    inner: Any


@dataclass(frozen=True, slots=True)
class Subsampled(Preconditioner):
    """See `subsampled`."""

    inner: Preconditioner
    every: int

    def init(self, block: Tensor) -> SubsampledState:
        """Return the inner state, and a counter."""
        seen = torch.zeros((), dtype=torch.int64, device=block.device)
        return SubsampledState(seen, self.inner.init(block))

    def accumulate(self, state: SubsampledState, grads: Tensor) -> SubsampledState:
        """Take in the gradients number 1, k + 1, 2 k + 1, ... of every block."""
        due = state.seen % self.every == 0
        roles = self.inner.roles(state.inner)
        before = self._changing(state.inner, roles)

        def merged(new: tuple[Tensor, ...]) -> Any:
            parts = iter(new)

            def choose(leaf: Tensor, role: str) -> Tensor:
                return next(parts) if self._changes(role) else leaf

            return map_leaves(choose, state.inner, roles)

        def taken(grads: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
            return self._changing(self.inner.accumulate(merged(own), grads), roles)

        after = linalg.compute_where(due, taken, (grads, *before), before)
        return SubsampledState(state.seen + 1, merged(after))

    def refresh(self, state: SubsampledState) -> SubsampledState:
        """Refresh the inner one."""
        return state._replace(inner=self.inner.refresh(state.inner))

    def correct(self, state: SubsampledState, grads: Tensor) -> SubsampledState:
        """Let the inner one take in every gradient here, in its basis: that is cheap."""
        return state._replace(inner=self.inner.correct(state.inner, grads))

    def apply(self, state: SubsampledState, updates: Tensor) -> Tensor:
        """Apply the inner one."""
        return self.inner.apply(state.inner, updates)

    @property
    def refreshes(self) -> bool:
        """Whether the inner one has anything to recompute."""
        return self.inner.refreshes

    def starts_as_identity(self, dtype: torch.dtype) -> bool:
        """Whether the inner one does."""
        return self.inner.starts_as_identity(dtype)

    def block_shape(self, state: SubsampledState) -> tuple[int | None, ...] | None:
        """Return what the inner one says."""
        return self.inner.block_shape(state.inner)

    def roles(self, state: SubsampledState) -> SubsampledState:
        """Return the inner roles."""
        return SubsampledState("other", self.inner.roles(state.inner))  # type: ignore[arg-type]

    def reads(self, function: str) -> frozenset[str] | None:
        """Return what the inner one reads."""
        return self.inner.reads(function)

    def with_tolerance(self, tolerance: float) -> Subsampled | None:
        """Wrap what the inner one returns."""
        inner = self.inner.with_tolerance(tolerance)
        return None if inner is None else Subsampled(inner, self.every)

    def _changes(self, role: str) -> bool:
        """Whether `accumulate` may change a leaf; what it does not read it passes on."""
        read = self.inner.reads("accumulate")
        return read is None or role == "other" or role in read

    def _changing(self, inner: Any, roles: Any) -> tuple[Tensor, ...]:
        """Return the leaves that `accumulate` may change: no others need be copied."""
        found: list[Tensor] = []

        def collect(leaf: Tensor, role: str) -> None:
            if self._changes(role):
                found.append(leaf)

        map_leaves(collect, inner, roles)
        return tuple(found)


def subsampled(inner: Preconditioner, *, every: int) -> Subsampled:
    """Take every k-th gradient into the statistics, and precondition them all.

    The Gram matrices are half of what a plain Shampoo step computes, and change slowly. A block
    takes in its gradients number 1, k + 1, 2 k + 1, ...; decays and bias corrections count
    those only, so that with beta2 the average reaches k times as far back. In a graft wrap the
    direction alone, and the magnitude goes on seeing every gradient.

    Eager code and compiled graphs (`torch.cond`) skip the work, for which a GPU is asked at every
    step; under `torch.func.vmap` it is done and thrown away.

    Args:
        inner: The preconditioner, such as `kronecker()`.
        every: k, at least 1.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Example:
        >>> from shampoo_func.preconditioners import second_moment
        >>> tx = subsampled(second_moment(1.0, epsilon=0.0), every=2)
        >>> state = tx.init(torch.zeros(1))
        >>> for grad in (3.0, 100.0, 4.0):
        ...     state = tx.accumulate(state, torch.tensor([grad]))
        >>> tx.apply(state, torch.tensor([5.0]))
        tensor([1.])
    """
    if not isinstance(inner, Preconditioner):
        raise HyperparameterError(
            f"subsampled needs a preconditioner such as kronecker(), got {inner!r}."
        )
    check_count("every", every)
    return Subsampled(inner, every)
