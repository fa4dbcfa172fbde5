"""Owners of blocks that every rank has whole: all-gather of directions, reduce-scatter of sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_func.blocks import gather, present_rows, scatter
from shampoo_func.sharding import collectives
from shampoo_func.sharding.cells import Window, cells_of, lines_of
from shampoo_func.sharding.exchange import OwnedExchange, Request
from shampoo_func.sharding.pieces import cut

__all__ = ["GatherExchange", "plan_gather"]


@dataclass(frozen=True, slots=True)
class Slot:
    """The rows of one stack in the buffers: ordered by owner, and how many each has.

    order: the rows that are present, owner by owner. back: the place in `order` of every row.
    """

    stack: str
    shape: tuple[int, ...]
    counts: tuple[int, ...]
    order: tuple[int, ...]
    back: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Channel:
    """A buffer of one dtype, `length` elements per rank, for some stacks."""

    dtype: torch.dtype
    length: int
    loads: tuple[int, ...]
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class GatherExchange(OwnedExchange):
    """See `all_gather` and `reduce_scatter`.

    cuts: where the owned blocks are in the tensors. summed: whether gradients are summands that
    are added on the way to the owners, or averaged.
    """

    rank: int
    world: int
    cuts: tuple[tuple[str, int, Window], ...]
    channels: tuple[Channel, ...]
    summed: bool = False
    average: bool = False

    def collect(self, leaves: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Cut the owned blocks out of the tensors, which may first have to be summed."""
        if self.summed:
            return self._reduce(leaves)
        blocks: dict[str, list[Tensor]] = {}
        for stack, index, window in self.cuts:
            leaf = leaves[index]
            if leaf is not None:
                merged = self.plan.parameters[index].merged
                blocks.setdefault(stack, []).append(cut(leaf, merged, window))
        return {name: torch.stack(own) for name, own in blocks.items()}

    def _reduce(self, leaves: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Sum each block over all ranks, on its owner."""
        stacks = gather(self.plan, leaves)
        owned = {}
        for channel in self.channels:
            chunks: list[list[Tensor]] = [[] for _ in range(self.world)]
            for slot in channel.slots:
                ordered = _reordered(stacks[slot.stack], slot.order)
                parts = torch.split(ordered, list(slot.counts))
                for own, part in zip(chunks, parts, strict=True):
                    own.append(part.reshape(-1).to(channel.dtype))
            rows = [_padded(own, channel.length) for own in chunks]
            total = collectives.reduce_scatter(torch.stack(rows), self.world, self.group)
            first = 0
            for slot in channel.slots:
                count = slot.counts[self.rank]
                size = count * math.prod(slot.shape)
                if count:
                    part = total[first : first + size].reshape(count, *slot.shape)
                    part = part.to(stacks[slot.stack].dtype)
                    owned[slot.stack] = part / self.world if self.average else part
                first += size
        return owned

    def deliver(
        self, stacks: dict[str, Tensor], leaves: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gather the blocks of all owners on every rank."""
        whole = {}
        for channel in self.channels:
            own = [
                stacks[slot.stack].reshape(-1).to(channel.dtype)
                for slot in channel.slots
                if slot.counts[self.rank]
            ]
            like = next(leaf for leaf in leaves if leaf is not None)
            buffer = _padded(own or [like.new_empty(0, dtype=channel.dtype)], channel.length)
            arrived = collectives.all_gather(buffer, self.world, self.group)
            first = [0] * self.world
            for slot in channel.slots:
                size = math.prod(slot.shape)
                parts = []
                for rank, count in enumerate(slot.counts):
                    if count:
                        part = arrived[rank, first[rank] : first[rank] + count * size]
                        parts.append(part.reshape(count, *slot.shape))
                    first[rank] += count * size
                whole[slot.stack] = _reordered(torch.cat(parts), slot.back)
        return scatter(self.plan, whole, leaves)


def plan_gather(request: Request, *, summed: bool) -> GatherExchange:
    """Plan buffers for tensors that every rank has whole.

    Args:
        request: What everybody knows.
        summed: Whether each rank has a summand of the gradients.
    """
    plan = request.plan
    parameters = plan.blocks.parameters
    owners = dict(zip(plan.stacks, plan.owners, strict=True))
    shapes = dict(zip(plan.stacks, plan.shapes, strict=True))
    dtypes: dict[str, torch.dtype] = {}
    cuts = []
    for leaf, here in enumerate(request.present):
        parameter = parameters[leaf]
        if not here or not parameter.tiles:
            continue
        lines = lines_of(parameter)
        for cell in cells_of(parameter).values():
            dtypes[cell.stack] = request.channel(leaf)
            if owners[cell.stack][cell.row] == request.rank:
                starts = [line[at][0] for line, at in zip(lines, cell.place, strict=True)]
                window = tuple(zip(starts, cell.shape, strict=True))
                cuts.append((cell.stack, leaf, window))
    rows = present_rows(plan.blocks, request.present)
    slots = {
        name: _slot(name, shapes[name], [owners[name][row] for row in rows[name]], plan.world)
        for name in dtypes
    }
    channels = []
    for dtype in dict.fromkeys(dtypes.values()):
        own = tuple(slots[name] for name in slots if dtypes[name] == dtype)
        loads = [0] * plan.world
        for slot in own:
            for rank, count in enumerate(slot.counts):
                loads[rank] += count * math.prod(slot.shape)
        channels.append(Channel(dtype, max(loads), tuple(loads), own))
    return GatherExchange(
        plan.blocks,
        request.group,
        request.owned(),
        request.rows_of_present(),
        request.rank,
        plan.world,
        tuple(cuts),
        tuple(channels),
        summed,
        any(storage.average for storage in request.storages),
    )


def _slot(name: str, shape: tuple[int, ...], owners: list[int], world: int) -> Slot:
    order = sorted(range(len(owners)), key=lambda row: (owners[row], row))
    back = sorted(range(len(owners)), key=order.__getitem__)
    counts = [0] * world
    for owner in owners:
        counts[owner] += 1
    return Slot(name, shape, tuple(counts), tuple(order), tuple(back))


def _reordered(stack: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return the rows of a stack in another order; itself where that is the same."""
    if order == tuple(range(len(order))):
        return stack
    return stack.index_select(0, torch.tensor(order, device=stack.device))


def _padded(parts: list[Tensor], length: int) -> Tensor:
    """Join vectors to one of the given length."""
    joined = torch.cat(parts)
    missing = length - joined.shape[0]
    return torch.nn.functional.pad(joined, (0, missing)) if missing else joined
