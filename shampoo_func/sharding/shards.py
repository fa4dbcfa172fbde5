"""Blocks of local shards: no communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shampoo_func.blocks import BlockPlan, LeafSpec, ParameterPlan, gather, plan_blocks, scatter
from shampoo_func.errors import ShardingError
from shampoo_func.linalg import with_layout_of
from shampoo_func.sharding.cells import lines_of, spans_of
from shampoo_func.sharding.exchange import Here, LocalExchange, Request, blocks_of
from shampoo_func.sharding.storage import LeafStorage, Region, local_shape

__all__ = ["ShardLocalExchange", "plan_shard_local"]


@dataclass(frozen=True, slots=True)
class ShardLocalExchange(LocalExchange):
    """See `shard_local`: the plan is one of local tensors in their merged shapes.

    whole: the plan of the global tensors. starts: where each local tensor begins in its own.
    """

    whole: BlockPlan
    starts: tuple[tuple[int, ...], ...]

    def here(self) -> list[list[Here]]:
        """The blocks of this rank's shards, by their places in the whole parameters."""
        found = []
        parameters = zip(self.plan.parameters, self.whole.parameters, self.starts, strict=True)
        for local, whole, first in parameters:
            lines = lines_of(whole)
            blocks = []
            for block in blocks_of(local):
                start = tuple(a + b for a, b in zip(first, block.start, strict=True))
                # the line of blocks that a shard's block begins in: its own if they are aligned
                place = tuple(
                    sum(line[0] <= at for line in dim) - 1
                    for dim, at in zip(lines, start, strict=True)
                )
                blocks.append(replace(block, place=place, start=start))
            found.append(blocks)
        return found

    def collect(self, leaves: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Cut the local tensors into blocks."""
        return gather(self.plan, self._merged(leaves))

    def deliver(
        self, stacks: dict[str, Tensor], leaves: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Lay the blocks back into the local tensors."""
        results: list[Tensor | None] = list(leaves)
        out = scatter(self.plan, stacks, self._merged(leaves))
        for index, (own, leaf) in enumerate(zip(out, leaves, strict=True)):
            if own is not None and leaf is not None:
                results[index] = with_layout_of(own.reshape(leaf.shape), leaf)
        return results

    def _merged(self, leaves: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [
            None if leaf is None else leaf.reshape(parameter.shape)
            for leaf, parameter in zip(leaves, self.plan.parameters, strict=True)
        ]


def plan_shard_local(request: Request, *, exact: bool) -> ShardLocalExchange:
    """Plan the blocks of the local shards.

    Raises:
        ShardingError: If a gradient is a summand, or a shard ends within a block and `exact`.
    """
    specs, starts = [], []
    for leaf, parameter in enumerate(request.plan.blocks.parameters):
        name, storage = request.plan.paths[leaf], request.storages[leaf]
        if storage.summands > 1:
            raise ShardingError(
                f"shard_local needs gradients that are summed, but that of {name!r} is Partial; "
                "use transport=all_to_all()."
            )
        if exact and not _is_aligned(parameter, storage):
            raise ShardingError(
                f"parameter {name!r} is stored in shards that end within a block (of "
                f"{request.block_size}), so shard_local would cut other blocks than one process; "
                "use all_to_all(), a block size that divides the shards, or "
                "shard_local(exact=False)."
            )
        region = storage.regions[request.rank]
        shape = _shape_of(region)
        specs.append(LeafSpec(shape, request.dtypes[leaf], torch.device("cpu")))
        starts.append(tuple(dim[0][0] for dim in region) if region and all(region) else ())
    plan = plan_blocks(specs, block_size=request.block_size, merge_dims=False)
    return ShardLocalExchange(plan, request.present, request.plan.blocks, tuple(starts))


def _shape_of(region: Region | None) -> tuple[int, ...]:
    return local_shape(region) if region and all(region) else (0,)


def _is_aligned(parameter: ParameterPlan, storage: LeafStorage) -> bool:
    """Whether every rank has only whole blocks."""
    for region in {own for own in storage.regions if own is not None and all(own)}:
        spans = spans_of(parameter, region)
        for lines, dim in zip(lines_of(parameter), spans, strict=True):
            for (start, stop), span in zip(lines, dim, strict=True):
                if span.size not in (0, stop - start):
                    return False
    return True
