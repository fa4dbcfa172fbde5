"""Momentum: a decaying sum (`trace`) and a moving average (`ema`) of the updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg, tree
from shampoo_func.errors import check_dtype, check_number
from shampoo_func.types import Scalar, Transformation, Tree

__all__ = ["Ema", "EmaState", "Trace", "TraceState", "ema", "trace"]


class TraceState(NamedTuple):
    """trace: the momentum, a tree shaped as the parameters."""

    trace: Tree


class EmaState(NamedTuple):
    """step: int64 counters, one per parameter. ema: a tree shaped as the parameters."""

    step: Tree
    ema: Tree


@dataclass(frozen=True, slots=True)
class Trace(Transformation):
    """See `trace`."""

    decay: Scalar
    nesterov: bool = False
    dampening: Scalar = 0.0
    dtype: torch.dtype | None = None

    def init(self, params: Tree) -> TraceState:
        """Return zero momentum."""
        return TraceState(_zeros(params, self.dtype))

    def update(
        self, updates: Tree, state: TraceState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, TraceState]:
        """Add the updates to the momentum and return it, or Nesterov's look-ahead."""
        self.check_call(params, extra)
        tree.check_updates(updates, state.trace)

        def add(momentum: Tensor, update: Tensor) -> Tensor:
            old, new = _wide(momentum, update)
            return linalg.scaled(old, self.decay) + linalg.scaled(new, 1 - self.dampening)

        momentum = tree.advance(add, state.trace, updates)
        if self.nesterov:
            # the same sum once more, from the new momentum
            out = tree.map(lambda u, m: add(m, u).to(u.dtype), updates, momentum)
        else:
            out = tree.map(lambda u, m: m.to(u.dtype), updates, momentum)
        return out, TraceState(_kept(momentum, state.trace))


@dataclass(frozen=True, slots=True)
class Ema(Transformation):
    """See `ema`."""

    decay: Scalar
    bias_correction: bool = True
    lookahead: Scalar | None = None
    dtype: torch.dtype | None = None

    def init(self, params: Tree) -> EmaState:
        """Return a zero average, and a counter per parameter."""
        return EmaState(tree.counters(params), _zeros(params, self.dtype))

    def update(
        self, updates: Tree, state: EmaState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, EmaState]:
        """Return the (corrected) average of the updates so far."""
        self.check_call(params, extra)
        tree.check_updates(updates, state.ema)
        step = tree.advance_counters(state.step, updates)
        average = tree.advance(
            lambda m, u: linalg.ema(*_wide(m, u), self.decay), state.ema, updates
        )

        def seen(update: Tensor, old: Tensor, new: Tensor, count: Tensor) -> Tensor:
            ahead = self.decay if self.lookahead is None else self.lookahead
            mean = new if self.lookahead is None else linalg.ema(*_wide(old, update), ahead)
            if self.bias_correction:
                before = self.decay ** (count - 1).to(linalg.scalar_dtype(count.device))
                correction = torch.as_tensor(linalg.align(1 - ahead * before, mean))
                mean = linalg.computed_once(mean / linalg.computed_once(correction))
            return mean.to(update.dtype)

        out = tree.map(seen, updates, state.ema, average, step)
        return out, EmaState(step, _kept(average, state.ema))


def _zeros(params: Tree, dtype: torch.dtype | None) -> Tree:
    """Return zeros as the parameters, in their own dtype or another."""
    return tree.map_params(lambda leaf: torch.zeros_like(leaf, dtype=dtype), params)


def _wide(momentum: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the wider dtype of the two, and at least float32."""
    dtype = linalg.compute_dtype(torch.promote_types(momentum.dtype, update.dtype))
    return momentum.to(dtype), update.to(dtype)


def _kept(new: Tree, old: Tree) -> Tree:
    """Round what was computed to the dtype in which it is kept."""
    return tree.map(lambda after, before: after.to(before.dtype), new, old)


def trace(
    decay: Scalar,
    *,
    nesterov: bool = False,
    dampening: Scalar = 0.0,
    dtype: torch.dtype | None = None,
) -> Trace:
    """Momentum: M <- decay M + (1 - dampening) U, returned as heavy-ball or Nesterov's.

    Heavy ball returns M; Nesterov returns (1 - dampening) U + decay M. The first step is no
    special case (torch.optim.SGD leaves it undamped).

    Args:
        decay: In [0, 1), a number or 0-d tensor.
        nesterov: Whether to look one step ahead.
        dampening: In [0, 1).
        dtype: What the momentum is kept in; that of the parameter if not given. The sum is
            computed in at least float32, and only what is kept is rounded.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Example:
        >>> import torch
        >>> tx = trace(0.5)
        >>> state = tx.init(torch.ones(1))
        >>> for _ in range(3):
        ...     updates, state = tx.update(torch.ones(1), state)
        >>> updates
        tensor([1.7500])
    """
    check_number("decay", decay, high=1.0, high_open=True)
    check_number("dampening", dampening, high=1.0, high_open=True)
    check_dtype("dtype", dtype)
    return Trace(decay, nesterov, dampening, dtype)


def ema(
    decay: Scalar,
    *,
    bias_correction: bool = True,
    lookahead: Scalar | None = None,
    dtype: torch.dtype | None = None,
) -> Ema:
    """Moving average: M <- decay M + (1 - decay) U, divided by 1 - decay^t.

    With `lookahead` b, what is returned (not what is kept) is b M_old + (1 - b) U, divided by
    1 - b decay^(t-1): the paper's beta3, which for b = decay^2 is like NAdam's.

    Args:
        decay: In [0, 1), a number or 0-d tensor.
        bias_correction: Whether to divide; counted per parameter, so that one whose gradients
            begin late is corrected from its own first gradient.
        lookahead: In [0, 1), or None for `decay` itself.
        dtype: What the average is kept in; that of the parameter if not given. The sum is
            computed in at least float32, and only what is kept is rounded.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Source: arXiv 1412.6980, algorithm 1; arXiv 2309.06497, section 3.

    Example:
        >>> import torch
        >>> tx = ema(0.9)
        >>> tx.update(torch.ones(1), tx.init(torch.ones(1)))[0]
        tensor([1.])
    """
    check_number("decay", decay, high=1.0, high_open=True)
    if lookahead is not None:
        check_number("lookahead", lookahead, high=1.0, high_open=True)
    check_dtype("dtype", dtype)
    return Ema(decay, bias_correction, lookahead, dtype)
