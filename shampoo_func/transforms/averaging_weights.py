"""Averages of the weights as they are trained: a decaying one, and one of the latest few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg, tree
from shampoo_func.errors import HyperparameterError, check_count, check_number
from shampoo_func.transforms.base import Averaging, check_kept
from shampoo_func.types import Scalar, Tree

__all__ = [
    "WeightEma",
    "WeightEmaState",
    "WeightLawa",
    "WeightLawaState",
    "weight_ema",
    "weight_lawa",
]


class WeightEmaState(NamedTuple):
    """State of `weight_ema`.

    step: int64 counters, one per parameter, of its updates. average: a tree shaped as the
    parameters, at least float32.
    """

    step: Tree
    average: Tree


class WeightLawaState(NamedTuple):
    """State of `weight_lawa`.

    step: int64 counters, one per parameter, of its updates. ring: the latest weights, for every
    parameter `[window, *shape]` in its dtype.
    """

    step: Tree
    ring: Tree


def _moved(update: Tensor, param: Tensor) -> Tensor:
    """Return the parameter after the update, as `apply_updates` will."""
    return (param + update).to(param.dtype)


def _where(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Choose by a 0-d condition, or one per block, in the strides of `old`."""
    condition = condition.reshape(condition.shape + (1,) * (old.ndim - condition.ndim))
    return torch.where(condition, new, old)


@dataclass(frozen=True, slots=True)
class WeightEma(Averaging):
    """See `weight_ema`."""

    decay: Scalar
    every: int
    bias_correction: bool

    @property
    def needs_params(self) -> bool:
        """What is averaged is parameters."""
        return True

    def init(self, params: Tree) -> WeightEmaState:
        """Return an average of nothing, or the parameters without bias correction."""

        def start(param: Tensor) -> Tensor:
            dtype = linalg.compute_dtype(param.dtype)
            if self.bias_correction:
                return torch.zeros_like(param, dtype=dtype)
            return param.to(dtype, copy=True)

        return WeightEmaState(tree.counters(params), tree.map_params(start, params))

    def update(
        self, updates: Tree, state: WeightEmaState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, WeightEmaState]:
        """Pass the updates on, and take the parameters that they lead to into the average."""
        self.check_call(params, extra)
        tree.check_updates(updates, params, what="the parameter")
        tree.check_updates(updates, state.average)
        step = tree.advance_counters(state.step, updates)

        def add(old: Tensor, update: Tensor, param: Tensor, count: Tensor) -> Tensor:
            new = linalg.ema(old, _moved(update, param).to(old.dtype), self.decay)
            return new if self.every == 1 else _where(count % self.every == 0, new, old)

        average = tree.advance(add, state.average, updates, params, step)
        return updates, WeightEmaState(step, average)

    def averaged(self, state: WeightEmaState, params: Tree) -> Tree:
        """Return the (corrected) average; the parameters while it is one of nothing."""
        check_kept(params, state.average)
        if not self.bias_correction:
            return tree.map(lambda param, own: own.to(param.dtype), params, state.average)

        def correct(param: Tensor, own: Tensor, step: Tensor) -> Tensor:
            taken = step // self.every
            weight = linalg.bias_correction(self.decay, taken.clamp(min=1), own)
            return _where(taken > 0, (own / weight).to(param.dtype), param)

        return tree.map(correct, params, state.average, state.step)


@dataclass(frozen=True, slots=True)
class WeightLawa(Averaging):
    """See `weight_lawa`."""

    window: int
    every: int

    @property
    def needs_params(self) -> bool:
        """What is averaged is parameters."""
        return True

    def init(self, params: Tree) -> WeightLawaState:
        """Return an empty ring."""
        ring = tree.map_params(lambda param: param.new_zeros((self.window, *param.shape)), params)
        return WeightLawaState(tree.counters(params), ring)

    def update(
        self, updates: Tree, state: WeightLawaState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, WeightLawaState]:
        """Pass the updates on, and put the parameters that they lead to into the ring."""
        self.check_call(params, extra)
        tree.check_updates(updates, params, what="the parameter")
        entries = tree.map(lambda ring, step: ring.select(step.ndim, 0), state.ring, state.step)
        tree.check_updates(updates, entries)
        step = tree.advance_counters(state.step, updates)

        def put(old: Tensor, update: Tensor, param: Tensor, count: Tensor) -> Tensor:
            return self._put(old, _moved(update, param), count)

        return updates, WeightLawaState(step, tree.advance(put, state.ring, updates, params, step))

    def _put(self, ring: Tensor, param: Tensor, step: Tensor) -> Tensor:
        """Write a parameter over the oldest entry if it is its turn."""
        if step.ndim:  # blocks, each with its own clock
            written: Tensor = torch.func.vmap(self._put)(ring, param, step)
            return written
        # between turns the newest entry is written over itself
        place = ((step // self.every - 1) % self.window).reshape(1)
        entry = param.unsqueeze(0)
        if self.every > 1:
            due = step % self.every == 0
            entry = torch.where(due, entry, ring.index_select(0, place))
        return ring.index_copy(0, place, entry)

    def averaged(self, state: WeightLawaState, params: Tree) -> Tree:
        """Return the mean of the ring; the parameters while it is empty."""

        def mean(ring: Tensor, step: Tensor) -> Tensor:
            # what is not filled yet is zero
            total = ring.sum(step.ndim, dtype=linalg.compute_dtype(ring.dtype))
            taken = (step // self.every).clamp(1, self.window)
            return total / linalg.align(taken, total)

        def choose(param: Tensor, own: Tensor, step: Tensor) -> Tensor:
            return _where(step >= self.every, own.to(param.dtype), param)

        means = tree.map(mean, state.ring, state.step)
        check_kept(params, means)
        return tree.map(choose, params, means, state.step)


def weight_ema(decay: Scalar, *, every: int = 1, bias_correction: bool = True) -> WeightEma:
    """Keep a moving average of the weights, A <- decay A + (1 - decay) W, for `eval_params`.

    A stage that stands after the learning rate and passes the updates on: W are the parameters
    that the updates lead to. With bias correction A starts at 0 and is divided by
    1 - decay^n after n weights; without, it starts at the initial parameters. A parameter
    without a gradient (None) keeps its average.

    Args:
        decay: In [0, 1), a number or 0-d tensor.
        every: Updates between two weights that are taken in.
        bias_correction: Whether the initial parameters are left out.

    Raises:
        HyperparameterError: If an argument is out of range.

    Source: arXiv 2502.06761; arXiv 1412.6980, section 7.2 (temporal averaging).

    Example:
        >>> from shampoo_func import chain, eval_params, scale_by_learning_rate
        >>> tx = chain(scale_by_learning_rate(1.0), weight_ema(0.5))
        >>> params = torch.tensor([8.0])
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(torch.ones(1), state, params)
        ...     params = params + updates
        >>> params, eval_params(tx, state, params)  # (7 + 2 * 6) / 3
        (tensor([6.]), tensor([6.3333]))
    """
    check_number("decay", decay, high=1.0, high_open=True)
    check_count("every", every)
    if not isinstance(bias_correction, bool):
        raise HyperparameterError(
            f"bias_correction must be True or False, got {bias_correction!r}."
        )
    return WeightEma(decay, every, bias_correction)


def weight_lawa(window: int, *, every: int = 1) -> WeightLawa:
    """Keep the latest weights, one of `every` updates, and their mean for `eval_params`.

    A stage that stands after the learning rate and passes the updates on. `window` copies of
    the parameters are kept in their dtype; a step writes one of them (in eager code it copies
    them all, in a compiled and donated step it does not). While there are fewer than `window`
    the mean is that of those there are. A parameter without a gradient (None) keeps its own.

    Args:
        window: How many weights are averaged; around 10, all together over about 1% of the
            training.
        every: Updates between two of them.

    Raises:
        HyperparameterError: If a number is no positive int.

    Source: latest weight averaging, arXiv 2209.14981; arXiv 2502.06761.

    Example:
        >>> from shampoo_func import chain, eval_params, scale_by_learning_rate
        >>> tx = chain(scale_by_learning_rate(1.0), weight_lawa(3))
        >>> params = torch.tensor([8.0])
        >>> state = tx.init(params)
        >>> for _ in range(5):
        ...     updates, state = tx.update(torch.ones(1), state, params)
        ...     params = params + updates
        >>> params, eval_params(tx, state, params)  # the mean of 5, 4 and 3
        (tensor([3.]), tensor([4.]))
    """
    check_count("window", window)
    check_count("every", every)
    return WeightLawa(window, every)
