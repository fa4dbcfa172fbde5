"""Finding the parameters to evaluate with, wherever in an optimizer they are averaged."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shampoo_func import tree
from shampoo_func.errors import HyperparameterError
from shampoo_func.sharding import as_local, wrapped
from shampoo_func.transforms.base import Averaging
from shampoo_func.transforms.blocked import Blocked, check_stacks
from shampoo_func.transforms.chain import Chain
from shampoo_func.transforms.hyperparams import WithHyperparams
from shampoo_func.transforms.partition import Masked, Partition
from shampoo_func.types import EmptyState, Transformation, Tree

__all__ = ["eval_params"]


def eval_params(tx: Transformation, state: Any, params: Tree) -> Tree:
    """Return the parameters to evaluate with: the averages that an optimizer keeps.

    Finds `primal_averaging`, `schedule_free`, `weight_ema` and `weight_lawa` in chains,
    partitions and wrappers. Parameters that nothing averages come back as they are. Train on
    with `params`, not with what this returns.

    Args:
        tx: The transformation.
        state: Its state.
        params: The parameters after the update that returned the state.

    Raises:
        HyperparameterError: If a parameter has two averages, or one that cannot be found
            because a wrapper of another library keeps it.
        ParameterError: If a parameter is no real floating tensor.
        TreeMismatchError: If the state was made for other parameters.

    Example:
        >>> import torch
        >>> from shampoo_func import chain, masked, scale_by_learning_rate, weight_ema
        >>> average = masked(weight_ema(0.5), where=lambda path, leaf: path == "w")
        >>> tx = chain(scale_by_learning_rate(1.0), average)
        >>> params = {"b": torch.zeros(1), "w": torch.zeros(1)}
        >>> state = tx.init(params)
        >>> for size in (1.0, 3.0):
        ...     grads = {"b": torch.tensor([size]), "w": torch.tensor([size])}
        ...     updates, state = tx.update(grads, state, params)
        ...     params = {name: params[name] + updates[name] for name in params}
        >>> eval_params(tx, state, params)  # w: (-1 + 2 * -4) / 3
        {'b': tensor([-4.]), 'w': tensor([-3.])}
    """
    tree.check_params(params)
    return _evaluated(tx, state, params)


def _averages(tx: Transformation) -> bool:
    """Whether a transformation may average."""
    return isinstance(tx, Averaging) or any(_averages(child) for child in tx.children)


def _evaluated(tx: Transformation, state: Any, params: Tree) -> Tree:
    """Return the averages; a tensor that is not averaged is the very tensor given."""
    if not _averages(tx):
        return params
    if isinstance(tx, Averaging):
        return tx.averaged(state, params)
    if isinstance(tx, Chain):
        return _of_chain(tx, state, params)
    if isinstance(tx, Blocked):
        return _of_blocks(tx, state, params)
    if isinstance(tx, Masked):
        both = {"chosen": state, "rest": EmptyState()}
        return _of_partition(tx._partition(params), both, params)
    if isinstance(tx, Partition):
        return _of_partition(tx, state, params)
    if isinstance(tx, WithHyperparams):
        return _evaluated(tx.build_from(state), state.inner, params)
    if len(tx.children) == 1 and hasattr(state, "inner"):
        return _evaluated(tx.children[0], state.inner, params)
    raise HyperparameterError(
        f"{tx.name} holds a stage that averages, but eval_params does not know where in its state "
        "that stage's is; derive it from Averaging and give it a method averaged(state, params)."
    )


def _of_chain(tx: Chain, state: dict[str, Any], params: Tree) -> Tree:
    tx.check_state(state)
    flat, structure = tree.flatten(params)
    found: list[Tensor] = list(flat)
    by: dict[int, str] = {}
    for name, stage in tx.stages:
        own = tree.leaves(_evaluated(stage, state[name], params))
        for index, (average, param) in enumerate(zip(own, flat, strict=True)):
            if average is param:
                continue
            if index in by:
                raise HyperparameterError(
                    f"parameter {tree.path_of(params, index)!r} has two averages, of the stages "
                    f"{by[index]!r} and {name!r}; ask one of them: "
                    f"eval_params(stage, state[{name!r}], params)."
                )
            found[index], by[index] = average, name
    return tree.unflatten(structure, found)


def _of_partition(tx: Partition, state: dict[str, Any], params: Tree) -> Tree:
    # inside, parameters are one dict keyed by whole paths
    groups, found = tx._split(params, params), {}
    for name, inner in tx.transformations:
        found.update(_evaluated(inner, state[name], groups[name]))
    _, structure = tree.flatten(params)
    return tree.unflatten(structure, [found[path] for path in tree.paths(params)])


def _of_blocks(tx: Blocked, state: dict[str, Any], params: Tree) -> Tree:
    flat, structure = tree.flatten(params)
    exchange = tx.exchange(params, flat, (True,) * len(flat))
    check_stacks(exchange.sizes(), state)
    local = [as_local(leaf) for leaf in flat]
    stacks = exchange.collect(local)
    found = {name: _evaluated(tx.inner, state[name], stack) for name, stack in stacks.items()}
    results = zip(exchange.deliver(found, local), flat, strict=True)
    return tree.unflatten(structure, [wrapped(own, leaf) for own, leaf in results])
