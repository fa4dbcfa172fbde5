"""Primal averaging: gradients at y, steps of z, evaluation at x, an average of the z."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from shampoo_func import linalg, tree
from shampoo_func.errors import check_number
from shampoo_func.transforms.base import Averaging, check_kept
from shampoo_func.transforms.scaling import first_step
from shampoo_func.types import Scalar, Schedule, Tree

__all__ = [
    "PrimalAveraging",
    "PrimalAveragingState",
    "at",
    "check_common",
    "copy_in",
    "move",
    "primal_averaging",
    "solve_x",
]


class PrimalAveragingState(NamedTuple):
    """step: int64 0-d, updates done. z: a tree shaped as the parameters, at least float32."""

    step: Tensor
    z: Tree


def check_setting(name: str, value: Scalar | Schedule) -> None:
    """Check a hyper-parameter that may be a schedule."""
    if isinstance(value, Tensor) or not callable(value):
        check_number(name, value)


def at(setting: Scalar | Schedule, step: Tensor) -> Any:
    """Return the value of a number, tensor or schedule at a step."""
    return setting if isinstance(setting, Tensor) or not callable(setting) else setting(step)


def copy_in(params: Tree) -> Tree:
    """Return z at the start: the parameters, copied, so that small steps of bfloat16 add up."""

    def copy(param: Tensor) -> Tensor:
        return param.to(linalg.compute_dtype(param.dtype), copy=True)

    return tree.map_params(copy, params)


def move(
    updates: Tree,
    z: Tree,
    params: Tree,
    rate: Any,
    decay: Any,
    train_interpolation: Scalar,
    new_weight: Tree,
) -> tuple[Tree, Tree]:
    """Return what moves the parameters from y to the next y, and the next z.

    `new_weight` is 1 - mu_x for every parameter, the weight of the new z in x.
    """
    if isinstance(decay, Tensor) or decay != 0:
        z = tree.advance(lambda own, _: linalg.scaled(own, 1 - rate * decay), z, updates)
    steps = tree.map(lambda update, own: linalg.scaled(update.to(own.dtype), -rate), updates, z)

    def to_next_y(
        update: Tensor, step: Tensor, own: Tensor, param: Tensor, weight: Scalar
    ) -> Tensor:
        own_share = 1 - train_interpolation * (1 - weight)
        towards_z = linalg.scaled(own - param.to(own.dtype), weight)
        return (linalg.scaled(step, own_share) + towards_z).to(update.dtype)

    out = tree.map(to_next_y, updates, steps, z, params, new_weight)
    return out, tree.advance(lambda own, _, step: own + step, z, updates, steps)


def solve_x(z: Tree, params: Tree, train_interpolation: Scalar) -> Tree:
    """Return x, from y = mu_y x + (1 - mu_y) z, in the dtype of the parameters."""
    beyond = 1 - 1 / train_interpolation

    def solve(param: Tensor, own: Tensor) -> Tensor:
        towards_z = linalg.scaled(own - param.to(own.dtype), beyond)
        return (param.to(own.dtype) + towards_z).to(param.dtype)

    check_kept(params, z)
    return tree.map(solve, params, z)


@dataclass(frozen=True, slots=True)
class PrimalAveraging(Averaging):
    """See `primal_averaging`."""

    learning_rate: Scalar | Schedule
    eval_interpolation: Scalar
    train_interpolation: Scalar
    weight_decay: Scalar | Schedule

    @property
    def needs_params(self) -> bool:
        """The updates depend on y, the parameters."""
        return True

    def init(self, params: Tree) -> PrimalAveragingState:
        """Return z = y, the parameters."""
        z = copy_in(params)
        return PrimalAveragingState(first_step(params).step, z)

    def update(
        self,
        updates: Tree,
        state: PrimalAveragingState,
        params: Tree | None = None,
        **extra: Any,
    ) -> tuple[Tree, PrimalAveragingState]:
        """Return the step from y to the next y."""
        self.check_call(params, extra)
        tree.check_updates(updates, params, what="the parameter")
        tree.check_updates(updates, state.z)
        new_weight = tree.map(lambda _: 1 - self.eval_interpolation, updates)
        out, z = move(
            updates,
            state.z,
            params,
            at(self.learning_rate, state.step),
            at(self.weight_decay, state.step),
            self.train_interpolation,
            new_weight,
        )
        return out, PrimalAveragingState(state.step + 1, z)

    def averaged(self, state: PrimalAveragingState, params: Tree) -> Tree:
        """Return x."""
        return solve_x(state.z, params, self.train_interpolation)


def check_common(
    learning_rate: Scalar | Schedule, train_interpolation: Scalar, weight_decay: Scalar | Schedule
) -> None:
    """Check what both have in common."""
    check_setting("learning_rate", learning_rate)
    check_setting("weight_decay", weight_decay)
    check_number("train_interpolation", train_interpolation, low_open=True, high=1.0)


def primal_averaging(
    learning_rate: Scalar | Schedule,
    eval_interpolation: Scalar = 0.9,
    train_interpolation: Scalar = 0.8,
    weight_decay: Scalar | Schedule = 0.0,
) -> PrimalAveraging:
    """Generalized primal averaging: the last stage, in the place of decay and learning rate.

    The parameters are y, at which gradients are taken; `eval_params` returns x, an average of
    the iterates z:

        z <- (1 - learning_rate weight_decay) z - learning_rate D
        x <- mu_x x + (1 - mu_x) z
        y  = mu_y x + (1 - mu_y) z

    with the direction D that comes in, mu_x = eval_interpolation and mu_y =
    train_interpolation. Only z is kept (in at least float32): y goes by (1 - mu_x mu_y) P +
    (1 - mu_x) (z - y), with P = -learning_rate D and the decayed z before P. Decay shrinks z
    and leaves y, so, as in Distributed Shampoo, it moves x by (1 - 1 / mu_y) of what it moves
    z. With mu_x = 0 all three are one, and this is the plain step.

    A parameter without a gradient (None) stays as it is, and so does its z.

    Args:
        learning_rate: A number >= 0, a 0-d tensor, or a schedule of the step.
        eval_interpolation: mu_x, in [0, 1).
        train_interpolation: mu_y, in (0, 1].
        weight_decay: Coefficient of the decay: a number >= 0, a 0-d tensor, or a schedule.
            For L2 regularisation put `add_decayed_weights` before the preconditioner.

    Raises:
        HyperparameterError: If a number is out of range.

    Source: arXiv 2512.17131.

    Example:
        >>> import torch
        >>> from shampoo_func import eval_params
        >>> tx, params = primal_averaging(1.0, 0.5, 0.5), torch.tensor([8.0])
        >>> updates, state = tx.update(torch.ones(1), tx.init(params), params)
        >>> params = params + updates
        >>> state.z, params, eval_params(tx, state, params)
        (tensor([7.]), tensor([7.2500]), tensor([7.5000]))
    """
    check_common(learning_rate, train_interpolation, weight_decay)
    check_number("eval_interpolation", eval_interpolation, high=1.0, high_open=True)
    return PrimalAveraging(learning_rate, eval_interpolation, train_interpolation, weight_decay)
