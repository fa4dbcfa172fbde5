"""A sharded state as DTensors, for tools that want those, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shampoo_func import tree
from shampoo_func.errors import ShardingError
from shampoo_func.sharding import OwnedExchange, Sharding, from_shards, to_shards
from shampoo_func.transforms.blocked import Blocked
from shampoo_func.transforms.inspect import sub_states
from shampoo_func.transforms.partition import Masked
from shampoo_func.types import Transformation, Tree

__all__ = ["state_as_dtensors", "state_from_dtensors"]


def state_as_dtensors(tx: Transformation, state: Any, params: Tree) -> Any:
    """Return a state whose stacks of blocks are DTensors over all ranks.

    Every leaf of a stack becomes a DTensor `[W k, ...]`, `Shard(0)` over the W ranks in one
    dimension: rank r's blocks are the rows from r k on, in its own order, filled up with zeros
    where it owns fewer than k, the most that any rank owns. So `full_tensor()` and whatever else
    knows DTensors work on it. It is a view for looking and for other tools: `update` takes the
    plain state, which has no rows that nobody needs.

    Args:
        tx: The transformation, on a mesh; every rank calls it. Without one nothing changes.
        state: Its state.
        params: The parameters it was made for.

    Raises:
        ShardingError: If a transport keeps blocks that no rank owns, so that there is no such
            tensor: `shard_local()` and `refresh_sharded()`, whose states are local or the same
            on every rank.

    Example:
        >>> from shampoo_func.transforms import scale_by_shampoo
        >>> tx, params = scale_by_shampoo(block_size=4), {"w": torch.ones(8, 4)}
        >>> state = tx.init(params)
        >>> state_as_dtensors(tx, state, params) is state
        True
    """
    return _converted(tx, state, params, _as_dtensors)


def state_from_dtensors(tx: Transformation, state: Any, params: Tree) -> Any:
    """Undo `state_as_dtensors`, bit for bit.

    Args:
        tx: The transformation; every rank calls it.
        state: What `state_as_dtensors` returned.
        params: The parameters.

    Example:
        >>> from shampoo_func.transforms import trace
        >>> tx, params = trace(0.9), {"w": torch.ones(2)}
        >>> state_from_dtensors(tx, tx.init(params), params)
        TraceState(trace={'w': tensor([0., 0.])})
    """
    return _converted(tx, state, params, _from_dtensors)


Convert = Callable[[Blocked, Sharding, dict[str, Any], Tree], dict[str, Any]]


def _converted(tx: Transformation, state: Any, params: Tree, convert: Convert) -> Any:
    """Return a state with those of the sharded `blocked` stages in it converted."""
    if isinstance(tx, Blocked):
        ranks = tx.sharding
        return state if ranks is None else convert(tx, ranks, state, params)
    parts = sub_states(tx, state, params)
    if parts is not None:
        own = {part.name: _converted(part.tx, part.state, part.params, convert) for part in parts}
        return own[""] if isinstance(tx, Masked) else {**state, **own}
    if len(tx.children) == 1 and hasattr(state, "inner"):
        return state._replace(inner=_converted(tx.children[0], state.inner, params, convert))
    return state


def _as_dtensors(
    tx: Blocked, ranks: Sharding, state: dict[str, Any], params: Tree
) -> dict[str, Any]:
    counts, like = _layout(tx, ranks, params)
    mesh = ranks.flat_mesh()
    found = {}
    for name, own in counts.items():
        held = state.get(name)
        if held is None:  # this rank owns none: a state of no rows
            one = torch.func.vmap(tx.inner.init)(like[name].new_zeros((1, *like[name].shape)))
            held = tree.map(lambda leaf: leaf[:0], one)
        found[name] = tree.map(lambda leaf, own=own: to_shards(leaf, max(own), mesh), held)
    return found


def _from_dtensors(
    tx: Blocked, ranks: Sharding, state: dict[str, Any], params: Tree
) -> dict[str, Any]:
    counts = _layout(tx, ranks, params)[0]
    return {
        name: tree.map(lambda leaf, own=own: from_shards(leaf, own[ranks.rank]), state[name])
        for name, own in counts.items()
        if own[ranks.rank]
    }


def _layout(
    tx: Blocked, ranks: Sharding, params: Tree
) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Return how many blocks of every stack each rank owns, and a block of each."""
    leaves = tree.leaves(params)
    exchange = tx.exchange(params, leaves, (True,) * len(leaves))
    if not isinstance(exchange, OwnedExchange):
        raise ShardingError(
            f"{ranks.transport!r} does not spread blocks over owners, so its state is no "
            "DTensor; use it as it is."
        )
    like = {
        tile.stack: torch.empty(tile.block, dtype=leaf.dtype, device=leaf.device)
        for leaf, parameter in zip(leaves, exchange.plan.parameters, strict=True)
        for tile in parameter.tiles
    }
    return tx.shard_plan(params).counts(), like
