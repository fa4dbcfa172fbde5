"""DTensors at the boundary: unwrapped once, wrapped once; nothing is computed on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

from shampoo_func.sharding.storage import Kind, local_indices

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = [
    "as_local",
    "from_shards",
    "is_dtensor",
    "kinds_of",
    "stored_like",
    "to_shards",
    "whole_norms",
    "wrapped",
]


def is_dtensor(leaf: Any) -> TypeGuard[DTensor]:
    """Whether something is a DTensor; for an ordinary tensor the class is not even imported."""
    if leaf is None or type(leaf) is Tensor or type(leaf) is Parameter:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(leaf, DTensor)


def kind_of(leaf: Tensor | None) -> Kind:
    """Return mesh and placements of a DTensor, and None for anything else."""
    if is_dtensor(leaf):
        return leaf.device_mesh, leaf.placements
    return None


def wrapped(local: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Return a local result as a DTensor, stored as its gradient or, for a sum, replicated.

    Args:
        local: The local result.
        like: The gradient.
    """
    if local is None or not is_dtensor(like):
        return local
    from torch.distributed.tensor import DTensor, Replicate

    placements = [Replicate() if own.is_partial() else own for own in like.placements]
    return DTensor.from_local(
        local,
        like.device_mesh,
        placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def kinds_of(leaves: Sequence[Tensor | None]) -> tuple[Kind, ...]:
    """Return how each tensor is stored."""
    return tuple(kind_of(leaf) for leaf in leaves)


def as_local(leaf: Any) -> Any:
    """Return the local tensor of a DTensor, and anything else as it is."""
    return leaf.to_local() if is_dtensor(leaf) else leaf


def stored_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return a tensor stored as another: the local part of a plain one, or a gathered DTensor.

    Args:
        whole: A plain tensor, the same on every rank, or a DTensor.
        like: What it is to be stored as. A DTensor for a plain one is gathered, by all ranks.
    """
    if is_dtensor(whole):
        if not is_dtensor(like):
            return whole.full_tensor()
        return whole.redistribute(like.device_mesh, like.placements)
    if not is_dtensor(like):
        return whole
    from torch.distributed.tensor import DTensor

    place = like.device_mesh.get_coordinate()
    mesh_shape = tuple(like.device_mesh.shape)
    part = whole
    if place is not None:
        rows = local_indices(tuple(whole.shape), mesh_shape, tuple(place), like.placements)
        for dim, spans in enumerate(rows):
            index = [i for start, stop in spans for i in range(start, stop)]
            if len(index) < whole.shape[dim]:
                part = part.index_select(dim, torch.tensor(index, device=whole.device).long())
    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def whole_norms(norms: list[Tensor]) -> list[Tensor]:
    """Return norms of which those of DTensors are combined, per mesh, to plain ones.

    Args:
        norms: 0-d tensors; the result has the same norm. With DTensors every rank must call.
    """
    plain = [norm for norm in norms if not is_dtensor(norm)]
    groups: list[list[Any]] = []
    for norm in norms:
        if is_dtensor(norm):
            for group in groups:
                if group[0].device_mesh == norm.device_mesh:
                    group.append(norm)
                    break
            else:
                groups.append([norm])
    for group in groups:
        total: Any = torch.linalg.vector_norm(torch.stack(group))
        plain.append(total.full_tensor())
    return plain


def to_shards(rows: Tensor, count: int, mesh: DeviceMesh) -> Tensor:
    """Return every rank's rows, filled up with zeros, as one tensor `[ranks * count, ...]`.

    Args:
        rows: This rank's, `[n, ...]`.
        count: How many every rank is to have, at least n.
        mesh: The ranks, in one dimension.
    """
    from torch.distributed.tensor import DTensor, Shard

    missing = rows.new_zeros((count - rows.shape[0], *rows.shape[1:]))
    local = torch.cat([rows, missing])
    shape = torch.Size((mesh.size() * count, *rows.shape[1:]))
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=shape, stride=local.stride()
    )


def from_shards(tensor: Tensor, count: int) -> Tensor:
    """Return the first rows of this rank's part of what `to_shards` returned."""
    return as_local(tensor)[:count].clone()
