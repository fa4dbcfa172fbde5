"""How parameters are stored on the ranks of a mesh, as index sets, without communication.

A rank stores of every merged dimension of a parameter a set of indices, and of the parameter
the product of these sets. For `Shard`, strided or uneven, on any number of mesh dimensions, the
sets are unions of few intervals; their order is that of the local tensor.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from shampoo_func.errors import ShardingError

if TYPE_CHECKING:  # importing them takes a second, which only a run on a mesh should pay
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

__all__ = [
    "Indices",
    "Kind",
    "LeafStorage",
    "Region",
    "local_indices",
    "local_shape",
    "store_leaf",
]

Indices = tuple[tuple[int, int], ...]
"""A set of indices as sorted, disjoint intervals [start, stop)."""

Region = tuple[Indices, ...]
"""A product of index sets, one per merged dimension."""

Kind: TypeAlias = "tuple[DeviceMesh, tuple[Placement, ...]] | None"
"""Mesh and placements of a DTensor; None for a plain tensor, which every rank has whole."""


@dataclass(frozen=True, slots=True)
class LeafStorage:
    """Who stores what of one tensor.

    regions: for every rank of the group what it stores, None where nothing. places: its
    coordinates in the tensor's mesh. parts: for every rank which summand of a `Partial` tensor
    it holds (0 for all others). summands: how many there are. average: whether they are averaged.
    """

    regions: tuple[Region | None, ...]
    places: tuple[tuple[int, ...], ...]
    parts: tuple[int, ...]
    summands: int = 1
    average: bool = False

    @property
    def whole(self) -> bool:
        """Whether every rank stores all of it."""
        return len(set(self.regions)) == 1 and self.regions[0] is not None


@functools.lru_cache(maxsize=4096)
def store_leaf(
    shape: tuple[int, ...],
    merged: tuple[int, ...],
    kind: Kind,
    ranks: tuple[int, ...],
    mesh: DeviceMesh | None = None,
) -> LeafStorage:
    """Return who stores what of a tensor.

    Args:
        shape: The tensor's global shape.
        merged: Its merged shape.
        kind: Its mesh and placements.
        ranks: The global ranks that share the blocks.
        mesh: Their mesh; a tensor on a part of it is the same in all such parts.

    Raises:
        ShardingError: If a placement is none that blocks can be cut from; the message lacks
            the parameter's name, which the caller knows.
    """
    everything = tuple(((0, size),) if size else () for size in merged)
    if kind is None:
        count = len(ranks)
        return LeafStorage((everything,) * count, ((),) * count, (0,) * count)
    own_mesh, placements = kind
    _check_placements(placements, len(shape))
    coordinates = _coordinates(own_mesh, ranks, mesh)
    sums = [dim for dim, placement in enumerate(placements) if placement.is_partial()]
    regions: list[Region | None] = []
    parts = []
    for place in coordinates:
        if place is None:
            regions.append(None)
            parts.append(0)
            continue
        rows = local_indices(shape, tuple(own_mesh.shape), place, placements)
        regions.append(_merge(rows, shape, merged))
        part = 0
        for dim in sums:
            part = part * own_mesh.shape[dim] + place[dim]
        parts.append(part)
    summands = math.prod(own_mesh.shape[dim] for dim in sums)
    average = any(getattr(placements[dim], "reduce_op", "sum") == "avg" for dim in sums)
    return LeafStorage(
        tuple(regions),
        tuple(place or () for place in coordinates),
        tuple(parts),
        summands,
        average,
    )


def local_shape(region: Region) -> tuple[int, ...]:
    """Return the merged shape of the local tensor of a region.

    Example:
        >>> local_shape((((0, 2), (4, 6)), ((0, 3),)))
        (4, 3)
    """
    return tuple(sum(stop - start for start, stop in indices) for indices in region)


def _check_placements(placements: tuple[Placement, ...], order: int) -> None:
    """Check that every placement is one that is understood.

    Raises:
        ShardingError: If one is not.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    kinds = set()
    for placement in placements:
        if isinstance(placement, Shard | _StridedShard):
            known = 0 <= placement.dim < max(order, 1)
        elif type(placement) is Partial:
            known = placement.reduce_op in ("sum", "avg")
            kinds.add(placement.reduce_op)
        else:
            known = isinstance(placement, Replicate)
        if not known:
            raise ShardingError(
                f"has the placements {placements}, of which {placement!r} cannot be shared by "
                "blocks; redistribute it to Shard, Replicate, or Partial with sum or avg."
            )
    if len(kinds) > 1:
        raise ShardingError(
            f"has the placements {placements}, which sum over one mesh dimension and average over "
            "another; redistribute one of them to Replicate."
        )


def _coordinates(
    own: DeviceMesh, ranks: tuple[int, ...], mesh: DeviceMesh | None
) -> list[tuple[int, ...] | None]:
    """Return the place of every rank in the mesh of a tensor; None for ranks outside."""
    places = _places(own)
    inside = [places.get(rank) for rank in ranks]
    if None not in inside or mesh is None:
        return inside
    names, known = own.mesh_dim_names, mesh.mesh_dim_names
    if not names or not known or not set(names) < set(known):
        return inside
    dims = [known.index(name) for name in names]
    if [mesh.shape[dim] for dim in dims] != list(own.shape):
        return inside
    # the tensor's mesh is a slice of the blocks' mesh: its siblings hold the same tensor
    whole = _places(mesh)
    return [tuple(whole[rank][dim] for dim in dims) for rank in ranks]


def _places(mesh: DeviceMesh) -> dict[int, tuple[int, ...]]:
    """Return the coordinates of every rank of a mesh."""
    cells = itertools.product(*(range(size) for size in mesh.shape))
    return dict(zip(mesh.mesh.flatten().tolist(), cells, strict=True))


def local_indices(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    place: tuple[int, ...],
    placements: tuple[Placement, ...],
) -> list[Indices]:
    """Return, per dimension of the tensor, the indices that the rank at `place` stores.

    Placements act from the first mesh dimension on, each on what those before it have left.
    """
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    rows: list[Indices] = [((0, size),) if size else () for size in shape]
    for placement, size, coordinate in zip(placements, mesh_shape, place, strict=True):
        if isinstance(placement, _StridedShard):
            groups = [
                _chunk(rows[placement.dim], int(placement.split_factor), group)
                for group in range(int(placement.split_factor))
            ]
            parts = [_chunk(group, size, coordinate) for group in groups]
            rows[placement.dim] = _join(tuple(span for part in parts for span in part))
        elif isinstance(placement, Shard):
            rows[placement.dim] = _chunk(rows[placement.dim], size, coordinate)
    return rows


def _chunk(indices: Indices, pieces: int, which: int) -> Indices:
    """Return one of the pieces that torch.chunk makes of a list of indices, maybe empty."""
    total = sum(stop - start for start, stop in indices)
    size = -(-total // pieces)
    return _positions(indices, min(which * size, total), min((which + 1) * size, total))


def _positions(indices: Indices, first: int, last: int) -> Indices:
    """Return the indices that stand at the positions [first, last) of the list."""
    found = []
    at = 0
    for start, stop in indices:
        low, high = max(first - at, 0), min(last - at, stop - start)
        if low < high:
            found.append((start + low, start + high))
        at += stop - start
    return tuple(found)


def _join(indices: Indices) -> Indices:
    """Join intervals that touch."""
    joined: list[tuple[int, int]] = []
    for start, stop in indices:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def _merge(rows: list[Indices], shape: tuple[int, ...], merged: tuple[int, ...]) -> Region:
    """Return the indices of the merged dimensions, each the product of neighbouring ones."""
    region: list[Indices] = []
    dim = len(shape)
    for target in reversed(merged):
        size = 1
        inner: Indices = ((0, 1),)  # the indices of a product of no dimensions
        last = len(region) == len(merged) - 1
        while dim > 0 and (size < target or last or shape[dim - 1] == 1):
            dim -= 1
            inner = _outer(rows[dim], inner, size)
            size *= shape[dim]
        region.append(inner)
    return tuple(reversed(region))


def _outer(outer: Indices, inner: Indices, size: int) -> Indices:
    """Return the indices i * size + j for i in `outer`, j in `inner`."""
    if inner == ((0, size),):
        return tuple((start * size, stop * size) for start, stop in outer)
    return _join(
        tuple(
            (index * size + start, index * size + stop)
            for first, last in outer
            for index in range(first, last)
            for start, stop in inner
        )
    )
