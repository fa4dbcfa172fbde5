"""Refreshes shared by ranks that all have the whole state: each computes some blocks' roots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo_func import tree
from shampoo_func.blocks import present_rows
from shampoo_func.errors import ShardingError
from shampoo_func.sharding import collectives
from shampoo_func.sharding.exchange import LocalExchange, Request
from shampoo_func.types import Preconditioner

__all__ = ["RefreshExchange", "SharedRefresh", "Shares", "plan_refresh"]


@dataclass(frozen=True, slots=True)
class Shares:
    """Who refreshes which blocks of one stack.

    own: the rows of this rank. most: how many a rank has at most. back: for every row its place
    among those of all ranks, `most` of each. group: the name of the process group.
    """

    own: tuple[int, ...]
    most: int
    back: tuple[int, ...]
    world: int
    group: str


@dataclass(frozen=True, slots=True)
class RefreshExchange(LocalExchange):
    """See `refresh_sharded`: all blocks are here, and their refreshes are shared.

    shares: of every stack, for the blocks that have gradients.
    """

    shares: tuple[tuple[str, Shares], ...]

    def refreshes(self, stack: str) -> Shares:
        """Return who refreshes which of the blocks of a stack that have gradients."""
        return dict(self.shares)[stack]


@dataclass(frozen=True, slots=True)
class SharedRefresh(Preconditioner):
    """A preconditioner of which this rank refreshes its share, and gets the rest from the others.

    inner: the preconditioner. shares: who refreshes which rows.
    """

    inner: Preconditioner
    shares: Shares

    def init(self, block: Tensor) -> Any:
        """Return the inner state."""
        return self.inner.init(block)

    def accumulate(self, state: Any, grads: Tensor) -> Any:
        """Take in the gradients of all blocks."""
        return self.inner.accumulate(state, grads)

    def refresh(self, state: Any) -> Any:
        """Refresh the own rows, and gather on every rank what a refresh may have changed.

        The bytes are sent as they are, so every rank has the same bits afterwards.
        """
        own = self.shares.own
        held, structure = tree.flatten(state)
        part = [leaf.index_select(0, _index(own, leaf)) for leaf in held]
        new = tree.leaves(self.inner.refresh(tree.unflatten(structure, part)))
        roles, reads = tree.leaves(self.inner.roles(state)), self.inner.reads("refresh")
        sent = [at for at, role in enumerate(roles) if _may_change(role, reads)]
        rows = torch.cat([_bytes_of(new[at], len(own)) for at in sent], dim=1)
        padded = torch.nn.functional.pad(rows, (0, 0, 0, self.shares.most - len(own)))
        shares = self.shares
        arrived = collectives.all_gather(padded.reshape(-1), shares.world, shares.group)
        arrived = arrived.reshape(shares.world * shares.most, -1)
        ordered = arrived.index_select(0, _index(shares.back, arrived))
        first = 0
        for at in sent:
            size = held[at][0].numel() * held[at].element_size()
            values = ordered[:, first : first + size].clone(memory_format=torch.contiguous_format)
            # as a vector: the strides of a single row could be anything
            held[at] = values.reshape(-1).view(held[at].dtype).reshape(held[at].shape)
            first += size
        return tree.unflatten(structure, held)

    def correct(self, state: Any, grads: Tensor) -> Any:
        """Take in the gradients of all blocks after the refresh."""
        return self.inner.correct(state, grads)

    def apply(self, state: Any, updates: Tensor) -> Tensor:
        """Precondition all blocks."""
        return self.inner.apply(state, updates)

    @property
    def refreshes(self) -> bool:
        """Whether the inner one has anything to recompute."""
        return self.inner.refreshes

    def block_shape(self, state: Any) -> tuple[int | None, ...] | None:
        """Return what the inner one says."""
        return self.inner.block_shape(state)

    def roles(self, state: Any) -> Any:
        """Return what the inner one says."""
        return self.inner.roles(state)

    def reads(self, function: str) -> frozenset[str] | None:
        """Return what the inner one says."""
        return self.inner.reads(function)


def plan_refresh(request: Request) -> RefreshExchange:
    """Plan who refreshes what.

    Raises:
        ShardingError: If a rank does not have all of a tensor, or a dtype to send in is given.
    """
    plan = request.plan
    for name, storage in zip(plan.paths, request.storages, strict=True):
        if not storage.whole or storage.summands > 1:
            raise ShardingError(
                f"refresh_sharded needs gradients that every rank has whole and summed, but "
                f"{name!r} is stored otherwise; use transport=all_to_all(), or leave the choice to "
                "transport=None."
            )
    if request.communication_dtype is not None:
        raise ShardingError(
            f"refresh_sharded sends roots as they are kept, not in {request.communication_dtype}; "
            "leave out communication_dtype (root_dtype makes the roots themselves smaller)."
        )
    owners = dict(zip(plan.stacks, plan.owners, strict=True))
    shares = []
    for name, rows in present_rows(plan.blocks, request.present).items():
        by_rank = [
            [at for at, row in enumerate(rows) if owners[name][row] == rank]
            for rank in range(plan.world)
        ]
        most = max(map(len, by_rank))
        place = {
            at: rank * most + index
            for rank, own in enumerate(by_rank)
            for index, at in enumerate(own)
        }
        back = tuple(place[at] for at in range(len(rows)))
        own = tuple(by_rank[request.rank])
        shares.append((name, Shares(own, most, back, plan.world, request.group)))
    return RefreshExchange(plan.blocks, request.present, tuple(shares))


def _may_change(role: str, reads: frozenset[str] | None) -> bool:
    """Whether a refresh may change leaves of a role.

    Factors are what it starts from, and what it does not read it passes on; counts and the like
    ("other") are always there to read.
    """
    kind = role.removesuffix(" code")
    return kind != "factor" and (reads is None or kind == "other" or kind in reads)


def _index(rows: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=like.device)


def _bytes_of(leaf: Tensor, rows: int) -> Tensor:
    """Return a stack as bytes, `[rows, bytes of a block]`."""
    size = leaf.element_size() * leaf.shape[1:].numel()
    flat = leaf.contiguous().reshape(-1).view(torch.uint8)
    return flat.reshape(rows, size)
