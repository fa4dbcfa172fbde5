"""DTensors at the boundary: unwrapped once, wrapped once; nothing is computed on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from shampoo_func.sharding.storage import Kind, local_indices

__all__ = ["as_local", "kinds_of", "stored_like", "whole_norms", "wrapped"]


def kind_of(leaf: Tensor | None) -> Kind:
    """Return mesh and placements of a DTensor, and None for anything else."""
    if isinstance(leaf, DTensor):
        return leaf.device_mesh, leaf.placements
    return None


def wrapped(local: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Return a local result as a DTensor, stored as its gradient or, for a sum, replicated.

    Args:
        local: The local result.
        like: The gradient.
    """
    if local is None or not isinstance(like, DTensor):
        return local
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
    return leaf.to_local() if isinstance(leaf, DTensor) else leaf


def stored_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return a tensor stored as another: the local part of a plain one, or a gathered DTensor.

    Args:
        whole: A plain tensor, the same on every rank, or a DTensor.
        like: What it is to be stored as. A DTensor for a plain one is gathered, by all ranks.
    """
    if isinstance(whole, DTensor):
        if not isinstance(like, DTensor):
            return whole.full_tensor()
        return whole.redistribute(like.device_mesh, like.placements)
    if not isinstance(like, DTensor):
        return whole
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
    plain = [norm for norm in norms if not isinstance(norm, DTensor)]
    groups: list[list[Any]] = []
    for norm in norms:
        if isinstance(norm, DTensor):
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
