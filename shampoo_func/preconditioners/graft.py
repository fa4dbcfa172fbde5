"""Grafting: the direction of one preconditioner with the magnitude of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import HyperparameterError
from shampoo_func.types import Preconditioner

__all__ = ["Graft", "GraftState", "graft"]

_TINY = 1e-16


class GraftState(NamedTuple):
    """direction, magnitude: the two preconditioners' states. started: bool `[n]`, refreshed yet."""

    direction: Any
    magnitude: Any
    started: Tensor


@dataclass(frozen=True, slots=True)
class Graft(Preconditioner):
    """See `graft`."""

    direction: Preconditioner
    magnitude: Preconditioner

    def init(self, block: Tensor) -> GraftState:
        """Return both states for one block."""
        started = torch.zeros((), dtype=torch.bool, device=block.device)
        return GraftState(self.direction.init(block), self.magnitude.init(block), started)

    def accumulate(self, state: GraftState, grads: Tensor) -> GraftState:
        """Take the gradient into both."""
        return state._replace(
            direction=self.direction.accumulate(state.direction, grads),
            magnitude=self.magnitude.accumulate(state.magnitude, grads),
        )

    def refresh(self, state: GraftState) -> GraftState:
        """Refresh both; the direction is used from now on."""
        return GraftState(
            self.direction.refresh(state.direction),
            self.magnitude.refresh(state.magnitude),
            torch.ones_like(state.started),
        )

    def correct(self, state: GraftState, grads: Tensor) -> GraftState:
        """Take the gradient into both, after the refresh."""
        return state._replace(
            direction=self.direction.correct(state.direction, grads),
            magnitude=self.magnitude.correct(state.magnitude, grads),
        )

    def apply(self, state: GraftState, updates: Tensor) -> Tensor:
        """Rescale the direction, block by block, to the norm of the grafted method's update."""
        batch = state.started.ndim
        magnitude = self.magnitude.apply(state.magnitude, updates)
        norm = _norm(magnitude, batch)
        if self.direction.starts_as_identity(updates.dtype):
            # what has not started passes through untouched, and need not be kept beside it
            own = linalg.choose(state.started, updates, magnitude)
            direction = self.direction.apply(state.direction, own)
            ratio = norm / (_norm(direction, batch) + _TINY)
            factor = linalg.computed_once(torch.where(state.started, ratio, 1.0))
            return linalg.scaled(direction, factor)
        direction = self.direction.apply(state.direction, updates)
        grafted = linalg.scaled(direction, norm / (_norm(direction, batch) + _TINY))
        return linalg.choose(state.started, grafted, magnitude)

    def reads(self, function: str) -> frozenset[str] | None:
        """Return what either of the two reads."""
        direction, magnitude = self.direction.reads(function), self.magnitude.reads(function)
        return None if direction is None or magnitude is None else direction | magnitude

    def block_shape(self, state: GraftState) -> tuple[int | None, ...] | None:
        """Return the shape that either of the two knows."""
        shape = self.magnitude.block_shape(state.magnitude)
        return self.direction.block_shape(state.direction) if shape is None else shape

    def roles(self, state: GraftState) -> GraftState:
        """Return what every leaf is."""
        return GraftState(
            self.direction.roles(state.direction),
            self.magnitude.roles(state.magnitude),
            "other",  # type: ignore[arg-type]
        )

    def with_tolerance(self, tolerance: float) -> Graft | None:
        """Return the same graft with the tolerance in whatever keeps a basis."""
        direction = self.direction.with_tolerance(tolerance)
        magnitude = self.magnitude.with_tolerance(tolerance)
        if direction is None and magnitude is None:
            return None
        return Graft(direction or self.direction, magnitude or self.magnitude)


def _norm(blocks: Tensor, batch: int) -> Tensor:
    """Return the Frobenius norm of every block, in at least float32."""
    flat = blocks.reshape((*blocks.shape[:batch], -1))
    return torch.linalg.vector_norm(flat, dim=-1, dtype=linalg.compute_dtype(blocks.dtype))


def graft(*, direction: Preconditioner, magnitude: Preconditioner) -> Graft:
    """Take the direction of one preconditioner and, per block, the norm of another.

    With D and M the two updates of a block, the result is D |M| / (|D| + 1e-16). Until the
    first refresh the result is M, the grafted method's own update.

    Args:
        direction: Gives the direction, e.g. `kronecker()`.
        magnitude: Gives the norm, e.g. `second_moment()` for Adam or RMSprop grafting,
            `identity_preconditioner()` for SGD grafting.

    Raises:
        HyperparameterError: If either is no preconditioner.

    Source: arXiv 2002.11803; arXiv 2309.06497, section 3.2.

    Example:
        >>> from shampoo_func.preconditioners import identity_preconditioner, second_moment
        >>> tx = graft(direction=second_moment(), magnitude=identity_preconditioner())
        >>> g = torch.tensor([3.0, 4.0])
        >>> state = tx.refresh(tx.accumulate(tx.init(g), g))
        >>> torch.linalg.vector_norm(tx.apply(state, g))
        tensor(5.)
    """
    for name, value in (("direction", direction), ("magnitude", magnitude)):
        if not isinstance(value, Preconditioner):
            raise HyperparameterError(
                f"{name} must be a preconditioner such as kronecker() or second_moment(), "
                f"got {value!r}."
            )
    return Graft(direction, magnitude)
