"""States to flat dicts of named tensors, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shampoo_func import tree
from shampoo_func.checkpoint import metadata, packing
from shampoo_func.checkpoint.entries import Walk, by_key, named_entries
from shampoo_func.checkpoint.fitting import UPPER, fill, fits
from shampoo_func.sharding import as_local
from shampoo_func.transforms import with_sharding
from shampoo_func.types import Transformation, Tree

__all__ = ["carried_over", "first_state", "from_state_dict", "to_state_dict", "whole_walk"]

SYMMETRIC = ("factor", "root")


def to_state_dict(
    tx: Transformation, state: Any, params: Tree, *, pack_symmetric: bool = False
) -> dict[str, Tensor]:
    """Return a state as a flat dict of named tensors.

    Names are `state/<stage>/<field>/<parameter>` and, for blocks,
    `state/<stage>/<parameter>/b<row>_<column>/<field>`: they do not depend on how parameters
    are nested, nor on which blocks share a stack. `metadata` holds the format, the block sizes,
    the dtypes and a fingerprint as the bytes of a JSON text. Every tensor is contiguous and has
    memory of its own, so `torch.save`, safetensors and `torch.distributed.checkpoint` take the
    dict as it is, and `torch.load(..., weights_only=True)` returns it.

    On a mesh each rank gets the blocks that it owns, and what is stored as the parameters are;
    `metadata` describes the state of all ranks, and is the same on each.

    Args:
        tx: The transformation.
        state: Its state.
        params: The parameters it was made for.
        pack_symmetric: Store symmetric matrices (factors and roots) as their upper triangles,
            under their name with `/upper`. One whose two triangles are not the same in every
            bit is stored whole.

    Raises:
        CheckpointError: If two leaves get the same name, or the state holds something that is
            no tensor.

    Example:
        >>> from shampoo_func.transforms import chain, scale_by_shampoo, trace
        >>> tx, params = chain(scale_by_shampoo(block_size=4), trace(0.9)), {"w": torch.ones(8, 4)}
        >>> saved = to_state_dict(tx, tx.init(params), params)
        >>> [name for name in saved if name.endswith("roots/0") or "trace" in name]
        ['state/precondition/w/b0_0/preconditioner/roots/0',
         'state/precondition/w/b1_0/preconditioner/roots/0',
         'state/trace/trace/w']
    """
    walk = Walk(tx, state, params)
    saved: dict[str, Tensor] = {}
    for key, entry in by_key(walk.entries).items():
        value = entry.tensor.detach()
        if pack_symmetric and entry.role in SYMMETRIC and packing.is_symmetric(value):
            saved[key + UPPER] = packing.pack(value)
        else:
            saved[key] = value.clone(memory_format=torch.contiguous_format)
    described = metadata.describe(whole_walk(tx, walk, params), packed=pack_symmetric)
    saved[metadata.KEY] = metadata.encode(described)
    return saved


def from_state_dict(tx: Transformation, params: Tree, state_dict: Mapping[str, Tensor]) -> Any:
    """Return the state that `to_state_dict` saved, bit for bit.

    Keys that do not begin with `state/` are left alone, so one dict may hold more. On a mesh
    each rank takes the blocks that it owns now, so a dict of all blocks (the union of those of
    other ranks) fits any number of ranks, any storage, and one process.

    Args:
        tx: The transformation; hyper-parameters may have changed, the shapes of its state not.
        params: The parameters; their values do not matter, their paths and shapes do.
        state_dict: What `to_state_dict` returned, on any device.

    Raises:
        CheckpointError: If it does not fit: the message says which keys are missing or
            unexpected, and which block sizes, shapes or dtypes differ.

    Example:
        >>> from shampoo_func.transforms import trace
        >>> tx, params = trace(0.9), {"w": torch.ones(2)}
        >>> _, state = tx.update({"w": torch.ones(2)}, tx.init(params))
        >>> from_state_dict(tx, params, to_state_dict(tx, state, params))
        TraceState(trace={'w': tensor([1., 1.])})
    """
    state = first_state(tx, params)
    walk = Walk(tx, state, params)
    entries = by_key(walk.entries)
    described = metadata.check(state_dict, walk)
    saved = {key: value for key, value in state_dict.items() if key.startswith("state/")}
    whole = whole_walk(tx, walk, params)
    fill(entries, saved, elsewhere=() if whole is walk else by_key(whole.entries))
    metadata.check_same(described, whole)
    return state


def whole_walk(tx: Transformation, walk: Walk, params: Tree) -> Walk:
    """Return the walk through the state of all ranks, on the meta device.

    Args:
        tx: The transformation.
        walk: The walk through this rank's state: the answer if `tx` is on no mesh.
        params: The parameters.
    """
    alone = with_sharding(tx, lambda stage: None)
    if alone is tx:
        return walk
    shapes = tree.map(lambda leaf: torch.empty(leaf.shape, dtype=leaf.dtype, device="meta"), params)
    return Walk(alone, alone.init(shapes), shapes)


def carried_over(
    old: tuple[Transformation, Any, Tree], tx: Transformation, params: Tree
) -> tuple[Any, list[str]]:
    """Return a new state with all that an old one has of it, and the names that found no place.

    Args:
        old: A transformation, its state and its parameters.
        tx: The new transformation.
        params: The new parameters.
    """
    before = named_entries(*old)
    state = first_state(tx, params)
    after = named_entries(tx, state, params)
    kept = {
        key: entry.tensor
        for key, entry in before.items()
        if key in after and fits(entry.tensor, False, after[key].tensor)
    }
    fill({key: after[key] for key in kept}, kept)
    return state, [key for key in before if key not in kept]


def first_state(tx: Transformation, params: Tree) -> Any:
    """Return a first state whose leaves share no memory, so that each can be written.

    Args:
        tx: The transformation.
        params: The parameters, which a state may begin as.
    """
    params = tree.map(torch.detach, params)
    taken = {_memory(leaf) for leaf in tree.leaves(params)}

    def own(leaf: Tensor) -> Tensor:
        memory = _memory(leaf)
        if memory in taken or 0 in leaf.stride():
            return leaf.clone()
        taken.add(memory)
        return leaf

    return tree.map(own, tx.init(params))


def _memory(tensor: Tensor) -> int:
    """Return what tensors that share memory have in common."""
    own = as_local(tensor)
    return own.untyped_storage().data_ptr() or id(own)
