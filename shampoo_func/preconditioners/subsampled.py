"""Statistics from some of the gradients only: every k-th is taken in, all are preconditioned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import HyperparameterError, check_count
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
        changing = self._changing(state.inner)
        before = _leaves(state.inner, changing)

        def taken(grads: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
            own = _filled(state.inner, changing, iter(leaves).__next__)
            return tuple(_leaves(self.inner.accumulate(own, grads), changing))

        after = linalg.compute_where(due, taken, (grads, *before), tuple(before))
        inner = _filled(state.inner, changing, iter(after).__next__)
        return SubsampledState(state.seen + 1, inner)

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

    def _changing(self, inner: Any) -> Any:
        """Return the inner state's tree with, for every leaf, whether `accumulate` may change it.

        What it does not read it passes on, and need not be copied.
        """
        read = self.inner.reads("accumulate")
        return _mapped(
            lambda role: read is None or role == "other" or role in read, self.inner.roles(inner)
        )


def _mapped(function: Callable[[Any], Any], node: Any) -> Any:
    """Apply a function to the leaves of a tree of roles or tensors."""
    if isinstance(node, dict):
        return {key: _mapped(function, child) for key, child in node.items()}
    if isinstance(node, tuple):
        parts = [_mapped(function, child) for child in node]
        return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
    return function(node)


def _leaves(node: Any, chosen: Any) -> list[Tensor]:
    """Return the tensors of a state that are chosen."""
    if isinstance(node, Tensor):
        return [node] if chosen else []
    pairs = (
        [(node[key], chosen[key]) for key in node]
        if isinstance(node, dict)
        else list(zip(node, chosen, strict=True))
    )
    return [leaf for child, own in pairs for leaf in _leaves(child, own)]


def _filled(node: Any, chosen: Any, take: Callable[[], Tensor]) -> Any:
    """Return a state with other tensors in the places that are chosen."""
    if isinstance(node, Tensor):
        return take() if chosen else node
    if isinstance(node, dict):
        return {key: _filled(node[key], chosen[key], take) for key in node}
    parts = [_filled(child, own, take) for child, own in zip(node, chosen, strict=True)]
    return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)


def subsampled(inner: Preconditioner, *, every: int) -> Subsampled:
    """Take every k-th gradient into the statistics, and precondition them all.

    The Gram matrices are half of what a plain Shampoo step computes, and change slowly. A block
    takes in its gradients number 1, k + 1, 2 k + 1, ...; decays and bias corrections count
    those only, so that with beta2 the average reaches k times as far back. In a graft wrap the
    direction alone, and the magnitude goes on seeing every gradient.

    Eager code and compiled graphs (`torch.cond`) skip the work; under `torch.func.vmap` it is
    done and thrown away.

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
