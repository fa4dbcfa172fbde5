"""One update of all param groups: pure, or compiled with its results written over its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_func import tree
from shampoo_func.torch_optim.options import Recipe
from shampoo_func.training import apply_updates, donate
from shampoo_func.types import Transformation

__all__ = ["Ready", "compiled_step", "gathered", "updated"]


class Ready(NamedTuple):
    """What a group's update takes: parameters and gradients by name, and the refresh flag."""

    params: dict[str, Tensor]
    grads: dict[str, Tensor | None]
    refresh: bool | None


def gathered(params: Mapping[str, Tensor], refresh: bool | None, *, maximize: bool) -> Ready:
    """Return what the update takes, after checking the gradients.

    Raises:
        GradientError: If one is sparse or complex; the message names the parameter.
    """
    own = {name: param.detach() for name, param in params.items()}
    grads: dict[str, Tensor | None] = {name: param.grad for name, param in params.items()}
    tree.check_updates(grads, own, what="the parameter")
    if maximize:
        grads = {name: None if grad is None else -grad for name, grad in grads.items()}
    return Ready(own, grads, refresh)


def updated(tx: Transformation, state: Any, ready: Ready) -> tuple[Any, Any]:
    """Return the updates and the next state of one group."""
    extra = {"refresh": ready.refresh} if "refresh" in tx.extras else {}
    return tx.update(ready.grads, state, ready.params, **extra)


def compiled_step(
    recipe: Recipe, statics: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> Any:
    """Compile the update of all groups as one graph per combination of refresh flags.

    Args:
        recipe: Builds a group's transformation, inside the graph: what a stage computes from
            a learning rate must be computed from the one of the step.
        statics: The options of every group that are no tensors.
        options: Arguments of `torch.compile`.

    Returns:
        `step(params, states, grads, tensors, refresh)`, all lists over the groups, `tensors`
        of the other options; params and states are written over.
    """

    def step(
        params: list[Any], states: list[Any], grads: list[Any], tensors: list[Any], refresh: Any
    ) -> Any:
        moved, after = [], []
        for index, static in enumerate(statics):
            tx = recipe.build({**static, **tensors[index]})
            ready = Ready(params[index], grads[index], refresh[index])
            updates, state = updated(tx, states[index], ready)
            moved.append(apply_updates(params[index], updates))
            after.append(state)
        return moved, after

    return torch.compile(donate(step), **{"fullgraph": True, **options})
