"""Blocks to their owners and back with one all-to-all each, whatever the storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_func.linalg import with_layout_of
from shampoo_func.sharding import collectives
from shampoo_func.sharding.exchange import OwnedExchange, Request
from shampoo_func.sharding.pieces import cut, grid
from shampoo_func.sharding.routes import plan_trade
from shampoo_func.sharding.trade import Part, Trade

__all__ = ["AllToAllExchange", "plan_all_to_all"]


@dataclass(frozen=True, slots=True)
class AllToAllExchange(OwnedExchange):
    """See `all_to_all`. trades: one for each dtype that is sent."""

    trades: tuple[tuple[torch.dtype, Trade], ...]

    def collect(self, leaves: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Send pieces to the owners and put the owned blocks together."""
        blocks: dict[str, list[Tensor]] = {}
        for dtype, trade in self.trades:
            out = []
            for piece in trade.cuts:
                leaf = leaves[piece.leaf]
                if leaf is not None:
                    own = cut(leaf, piece.merged, piece.window)
                    out.append(own.reshape(-1).to(dtype))
            buffer = _joined(out, dtype, leaves)
            arrived = collectives.all_to_all(buffer, trade.received, trade.sent, self.group)
            pieces = torch.split(arrived, list(trade.sizes)) if trade.sizes else ()
            for join in trade.joins:
                leaf = leaves[join.leaf]
                wanted = dtype if leaf is None else leaf.dtype
                summands = [grid(pieces, summand).to(wanted) for summand in join.summands]
                block = summands[0]
                for summand in summands[1:]:
                    block = block + summand
                if join.average:
                    block = block / len(summands)
                blocks.setdefault(join.stack, []).append(block)
        return {name: torch.stack(own) for name, own in blocks.items()}

    def deliver(
        self, stacks: dict[str, Tensor], leaves: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Send the parts of the owned blocks to all who store them."""
        results = list(leaves)
        for dtype, trade in self.trades:
            out = [_taken(stacks[part.stack][part.at], part).to(dtype) for part in trade.parts]
            buffer = _joined(out, dtype, leaves)
            arrived = collectives.all_to_all(buffer, trade.arriving, trade.returned, self.group)
            pieces = torch.split(arrived, list(trade.back)) if trade.back else ()
            for index, layout in trade.layouts:
                leaf = leaves[index]
                if leaf is not None:
                    whole = grid(pieces, layout).reshape(leaf.shape)
                    results[index] = with_layout_of(whole.to(leaf.dtype), leaf)
        return results


def plan_all_to_all(request: Request) -> AllToAllExchange:
    """Plan the trades of a request.

    Raises:
        ShardingError: If the ranks do not store all of a parameter between them.
    """
    channels: dict[torch.dtype, list[int]] = {}
    for leaf, here in enumerate(request.present):
        if here and request.plan.blocks.parameters[leaf].tiles:
            channels.setdefault(request.channel(leaf), []).append(leaf)
    trades = tuple((dtype, plan_trade(request, leaves)) for dtype, leaves in channels.items())
    return AllToAllExchange(
        request.plan.blocks, request.group, request.owned(), request.rows_of_present(), trades
    )


def _taken(block: Tensor, part: Part) -> Tensor:
    """Return the elements of a block that one rank stores, as a vector."""
    own = cut(block, tuple(block.shape), part.window)
    for dim, listed in enumerate(part.listed):
        if listed is not None:
            own = own.index_select(dim, torch.tensor(listed, device=own.device))
    return own.reshape(-1)


def _joined(parts: list[Tensor], dtype: torch.dtype, leaves: Sequence[Tensor | None]) -> Tensor:
    """Join vectors; without any, an empty one on the device of the leaves."""
    if parts:
        return torch.cat(parts)
    like = next(leaf for leaf in leaves if leaf is not None)
    return like.new_empty(0, dtype=dtype)
