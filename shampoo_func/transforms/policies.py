"""Refresh policies: when the roots and bases of which blocks are computed anew."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shampoo_func import linalg, tree
from shampoo_func.errors import HyperparameterError, check_count, check_number
from shampoo_func.transforms.control import when
from shampoo_func.types import Preconditioner, RefreshPolicy, Scalar, Schedule

__all__ = [
    "Adaptive",
    "Every",
    "Policy",
    "Probabilistic",
    "adaptive",
    "checked_start",
    "every",
    "probabilistic",
]


class Policy(RefreshPolicy):
    """A policy that `precondition` can follow.

    keeps_clock: whether it remembers, per block, the update of its latest refresh.
    """

    __slots__ = ()

    keeps_clock = False

    def prepare(self, preconditioner: Preconditioner) -> Preconditioner:
        """Return the preconditioner as the policy wants it."""
        return preconditioner

    @abstractmethod
    def refresh(
        self,
        preconditioner: Preconditioner,
        state: Any,
        clock: Tensor | None,
        step: Tensor,
        static: bool,
    ) -> tuple[Any, Tensor | None]:
        """Refresh what is due, and return the state and the clock.

        Args:
            preconditioner: What to refresh.
            state: Its state, of one block or a stack.
            clock: int64, as `step`: the update of every block's latest refresh, 0 for never;
                None if the policy keeps no clock.
            step: int64, 0-d or one per block: the updates done, this one included.
            static: Whether the host has decided that something is due.
        """


class _AllAtOnce(Policy):
    """Policies that refresh a block whenever its own step is due."""

    __slots__ = ()

    def refresh(
        self,
        preconditioner: Preconditioner,
        state: Any,
        clock: Tensor | None,
        step: Tensor,
        static: bool,
    ) -> tuple[Any, Tensor | None]:
        """Refresh all blocks, or those that are due."""
        if static:
            return preconditioner.refresh(state), clock
        due = self.due_at(step)

        def refresh(operand: Any) -> Any:
            own, flags = operand
            return tree.select(flags, preconditioner.refresh(own), own), flags

        return when(due.any(), refresh, (state, due))[0], clock


@dataclass(frozen=True, slots=True)
class Every(_AllAtOnce):
    """See `every`."""

    period: int
    start: float
    calls: int = 1

    def due_at(self, step: Any) -> Any:
        """Whether (t mod period = 0 and t > start) or t = start."""
        return ((step % self.period == 0) & (step > self.start)) | (step == self.start)


@dataclass(frozen=True, slots=True)
class Adaptive(Every):
    """See `adaptive`."""

    tolerance: float = 0.1

    def prepare(self, preconditioner: Preconditioner) -> Preconditioner:
        """Return the preconditioner with the tolerance in its bases."""
        prepared = preconditioner.with_tolerance(self.tolerance)
        if prepared is None:
            raise HyperparameterError(
                f"adaptive needs a preconditioner that keeps an eigenbasis, got "
                f"{preconditioner!r}; use eigendecomposed(...) in the place of kronecker(...), "
                "or in_eigenbasis(...)."
            )
        return prepared


@dataclass(frozen=True, slots=True)
class Probabilistic(_AllAtOnce):
    """See `probabilistic`."""

    probability: Scalar | Schedule
    seed: int = 0
    start: float = 1
    calls: int = 1

    def due_at(self, step: Any) -> Any:
        """Whether the number drawn for this step is below the probability."""
        chance: Any = self.probability
        if callable(chance) and not isinstance(chance, Tensor):
            chance = chance(step - 1)
        drawn = (_uniform(step, self.seed) < chance) & (step > self.start)
        return drawn | (step == self.start)


def _uniform(step: Any, seed: int) -> Any:
    """Return a number in [0, 1) that looks random; the same for an int and for a tensor."""
    prime = 2**31 - 1  # products of two numbers below it fit into int64
    mixed = (step * 40503 + (seed % prime) * 48271 + 12345) % prime
    for multiplier in (48271, 69621, 16807, 39373):
        mixed = (mixed * multiplier) % prime
        mixed = mixed ^ (mixed >> 13)
    mixed = mixed % prime
    if isinstance(mixed, Tensor):
        mixed = mixed.to(linalg.scalar_dtype(mixed.device))
    return mixed / prime


def every(period: int, *, start: float | None = None) -> Every:
    """Refresh all blocks every `period` updates from `start` on, and at `start` itself.

    With t counted from 1, a refresh is due when (t mod period = 0 and t > start) or t = start.

    Args:
        period: Updates between two refreshes.
        start: The first update that refreshes; `period` if not given, `math.inf` for never.

    Raises:
        HyperparameterError: If a number is out of range.

    Source: arXiv 2309.06497, section 3.

    Example:
        >>> [step for step in range(1, 31) if every(10, start=15).due(step)]
        [15, 20, 30]
    """
    return Every(period, checked_start(period, start))


def adaptive(tolerance: float, *, period: int = 1, start: float | None = None) -> Adaptive:
    """Look every `period` updates which bases are off, and compute only those anew.

    A basis Q of a factor A is kept while |B - diag B| <= tolerance |B|, B = Q^T A Q; each
    factor of each block is judged apart. Eager code decomposes only what is off; a compiled
    graph decomposes all factors of a stack that have one size, or none.

    Args:
        tolerance: In [0, 1].
        period: Updates between two looks.
        start: The first look; `period` if not given.

    Raises:
        HyperparameterError: If a number is out of range, or (by `precondition`) if there is no
            basis to look at.

    Source: arXiv 2506.03595, section 5.

    Example:
        >>> from shampoo_func.preconditioners import eigendecomposed
        >>> from shampoo_func.transforms import precondition
        >>> tx = precondition(eigendecomposed(0.9), policy=adaptive(0.1, period=5))
        >>> tx.preconditioner.basis.tolerance
        0.1
    """
    check_number("tolerance", tolerance, high=1.0)
    return Adaptive(period, checked_start(period, start), 1, tolerance)


def probabilistic(
    probability: Scalar | Schedule, *, seed: int = 0, start: float = 1
) -> Probabilistic:
    """Refresh all blocks at random updates, and at `start`.

    The draw is a function of the update's number and the seed, so that a run repeats itself,
    needs no generator in its state, and all ranks of a run agree.

    Args:
        probability: Of a refresh at any one update, in [0, 1]: a number, a 0-d tensor, or a
            schedule of the step.
        seed: Another seed, other updates.
        start: The first update that refreshes; `math.inf` for never.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Source: arXiv 2402.11858, section 5 (PSGD).

    Example:
        >>> policy = probabilistic(0.1)
        >>> round(sum(bool(policy.due(step)) for step in range(1, 10_001)) / 10_000, 2)
        0.1
    """
    if not callable(probability) or isinstance(probability, Tensor):
        check_number("probability", probability, high=1.0)
    check_count("seed", seed, low=0)
    return Probabilistic(probability, seed, checked_start(1, start))


def checked_start(period: int, start: float | None) -> float:
    """Return the first refresh, checked."""
    check_count("period", period)
    first = period if start is None else start
    if first != math.inf:
        check_count("start", first)
    return first
