"""What is sent to owners and back: pieces, and how tensors are put together from them."""

from __future__ import annotations

from dataclasses import dataclass

from shampoo_func.sharding.cells import Window
from shampoo_func.sharding.storage import LeafStorage, Region

__all__ = ["Cut", "Grid", "Join", "Part", "Sources", "Trade"]


@dataclass(frozen=True, slots=True)
class Cut:
    """A rectangle of a stored tensor that is sent to the owner of a block."""

    leaf: int
    merged: tuple[int, ...]
    window: Window


@dataclass(frozen=True, slots=True)
class Grid:
    """A tensor put together from received pieces that tile it.

    pieces: which ones, in row-major order. shapes: theirs. widths: how many along each
    dimension. order: per dimension the places that the indices of the joined pieces have to
    come from; None where they are in order.
    """

    pieces: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    order: tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True, slots=True)
class Join:
    """An owned block, put together: one grid, or the sum of several for a `Partial` tensor."""

    leaf: int
    stack: str
    summands: tuple[Grid, ...]
    average: bool


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an owned block that is sent back: where the block is, and which indices.

    window: the rectangle that holds them. listed: per dimension the indices themselves where they
    are no interval.
    """

    leaf: int
    stack: str
    at: int
    window: Window
    listed: tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True, slots=True)
class Trade:
    """One buffer to the owners and one back, for all tensors of a dtype.

    cuts, sent: what goes out, and how much to each rank. sizes, received: what comes, piece by
    piece, and how much from each. joins: the owned blocks. parts: what goes back, in the order of
    ranks, `received` of it. layouts: for every parameter that is stored here the grid of its local
    tensor; their pieces, of the sizes `back`, come in the order of `cuts` sent by all owners.
    """

    cuts: tuple[Cut, ...]
    sent: tuple[int, ...]
    sizes: tuple[int, ...]
    received: tuple[int, ...]
    joins: tuple[Join, ...]
    parts: tuple[Part, ...]
    returned: tuple[int, ...]
    back: tuple[int, ...]
    arriving: tuple[int, ...]
    layouts: tuple[tuple[int, Grid], ...]


class Sources:
    """Which ranks store the same of a tensor, and which of them sends it to an owner."""

    def __init__(self, storage: LeafStorage) -> None:
        """Group the ranks by what they store of which summand."""
        self.storage = storage
        self.holders: dict[tuple[Region, int], list[int]] = {}
        self._found: dict[tuple[int, int], int] = {}
        for rank, region in enumerate(storage.regions):
            if region is not None:
                self.holders.setdefault((region, storage.parts[rank]), []).append(rank)

    def nearest(self, ranks: list[int], owner: int) -> int:
        """Return which of the ranks that store the same is the nearest to an owner.

        That is the owner itself if it is one of them, or else the one that shares the most mesh
        coordinates with it.
        """
        known = self._found.get((ranks[0], owner))
        if known is not None:
            return known
        places, here = self.storage.places, self.storage.places[owner]

        def distance(rank: int) -> tuple[int, int]:
            same = sum(a == b for a, b in zip(places[rank], here, strict=False))
            return -same, (rank - owner) % len(places)

        found = owner if owner in ranks else min(ranks, key=distance)
        self._found[ranks[0], owner] = found
        return found
