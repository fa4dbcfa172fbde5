"""Schedule-Free averaging: a weighted mean of all iterates, without a decaying learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg, tree
from shampoo_func.errors import HyperparameterError, check_number
from shampoo_func.transforms.averaging import at, check_common, copy_in, move, solve_x
from shampoo_func.transforms.base import Averaging
from shampoo_func.transforms.scaling import first_step
from shampoo_func.types import Scalar, Schedule, Tree

__all__ = ["ScheduleFree", "ScheduleFreeState", "schedule_free"]


class ScheduleFreeState(NamedTuple):
    """State of `schedule_free`.

    step: int64 0-d, updates done. z: a tree shaped as the parameters, at least float32.
    max_rate: 0-d, the largest learning rate so far. weight_sum: 0-d per parameter, the sum of
    the weights of its own updates.
    """

    step: Tensor
    z: Tree
    max_rate: Tensor
    weight_sum: Tree


@dataclass(frozen=True, slots=True)
class ScheduleFree(Averaging):
    """See `schedule_free`."""

    learning_rate: Scalar | Schedule
    train_interpolation: Scalar
    rate_power: Scalar
    weight_decay: Scalar | Schedule
    weight_power: Scalar = 0.0
    use_max_rate: bool = False

    @property
    def needs_params(self) -> bool:
        """The updates depend on y, the parameters."""
        return True

    def init(self, params: Tree) -> ScheduleFreeState:
        """Return z = y, the parameters, and sums of nothing."""
        z, step = copy_in(params), first_step(params).step

        def zero(param: Tensor) -> Tensor:
            dtype = linalg.scalar_dtype(param.device)
            return torch.zeros((), dtype=dtype, device=param.device)

        max_rate = torch.zeros((), dtype=linalg.scalar_dtype(step.device), device=step.device)
        return ScheduleFreeState(step, z, max_rate, tree.map(zero, params))

    def update(
        self, updates: Tree, state: ScheduleFreeState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, ScheduleFreeState]:
        """Return the step from y to the next y, with the weight of this update in x."""
        self.check_call(params, extra)
        tree.check_updates(updates, params, what="the parameter")
        tree.check_updates(updates, state.z)
        rate = at(self.learning_rate, state.step)
        max_rate = torch.maximum(state.max_rate, torch.zeros_like(state.max_rate) + rate)
        base = max_rate if self.use_max_rate else torch.zeros_like(max_rate) + rate
        weight = base**self.rate_power
        if isinstance(self.weight_power, Tensor) or self.weight_power != 0:
            weight = weight * (state.step + 1).to(weight.dtype) ** self.weight_power
        total = tree.advance(lambda old, _: old + weight, state.weight_sum, updates)

        def share(_: Tensor, own: Tensor) -> Tensor:
            # while every rate was 0 nothing has moved: weight 0, not 0 / 0
            return weight / torch.where(own > 0, own, torch.ones_like(own))

        out, z = move(
            updates,
            state.z,
            params,
            rate,
            at(self.weight_decay, state.step),
            self.train_interpolation,
            tree.map(share, updates, total),
        )
        return out, ScheduleFreeState(state.step + 1, z, max_rate, total)

    def averaged(self, state: ScheduleFreeState, params: Tree) -> Tree:
        """Return x."""
        return solve_x(state.z, params, self.train_interpolation)


def schedule_free(
    learning_rate: Scalar | Schedule,
    train_interpolation: Scalar = 0.8,
    rate_power: Scalar = 2.0,
    weight_decay: Scalar | Schedule = 0.0,
    *,
    weight_power: Scalar = 0.0,
    use_max_rate: bool = False,
) -> ScheduleFree:
    """Schedule-Free averaging: `primal_averaging` whose x is a weighted mean of all z.

    At update t (from 1) the new z has the weight w_t = t^weight_power rate_t^rate_power, and

        mu_x = 1 - w_t / (w_1 + ... + w_t)

    so x needs no decaying learning rate; use a warm-up alone. A learning rate of 0 at the
    start, as in a warm-up, has weight 0 and moves nothing. The sum runs over a parameter's own
    updates, so one whose gradients begin late has the right mean of its own z.

    Keep the parameters in float32: the share of one update in y falls as 1/t, soon below what
    bfloat16 resolves.

    Args:
        learning_rate: A number >= 0, a 0-d tensor, or a schedule of the step.
        train_interpolation: mu_y, in (0, 1].
        rate_power: Power of the learning rate in the weights, >= 0.
        weight_decay: Coefficient of the decay of z: a number >= 0, a 0-d tensor, or a
            schedule. `add_decayed_weights` before this stage decays towards y instead, as in
            the paper.
        weight_power: Power of t in the weights, >= 0.
        use_max_rate: Whether the weights take the largest rate so far instead of the rate;
            the two differ once the rate falls.

    Raises:
        HyperparameterError: If an argument is out of range.

    Source: arXiv 2405.15682, equation 23.

    Example:
        >>> from shampoo_func import eval_params
        >>> tx, params = schedule_free(1.0, 0.5), torch.tensor([8.0])
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update(torch.ones(1), state, params)
        ...     params = params + updates
        >>> state.z, eval_params(tx, state, params)  # the mean of 7, 6 and 5
        (tensor([5.]), tensor([6.]))
    """
    check_common(learning_rate, train_interpolation, weight_decay)
    check_number("rate_power", rate_power, high_open=True)
    check_number("weight_power", weight_power, high_open=True)
    if not isinstance(use_max_rate, bool):
        raise HyperparameterError(f"use_max_rate must be True or False, got {use_max_rate!r}.")
    return ScheduleFree(
        learning_rate, train_interpolation, rate_power, weight_decay, weight_power, use_max_rate
    )
