"""Blocks of local shards: no communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_func.blocks import LeafSpec, gather, plan_blocks, scatter
from shampoo_func.errors import ShardingError
from shampoo_func.linalg import with_layout_of
from shampoo_func.sharding.cells import lines_of, spans_of
from shampoo_func.sharding.exchange import LocalExchange, Request
from shampoo_func.sharding.storage import local_shape

__all__ = ["ShardLocalExchange", "plan_shard_local"]


@dataclass(frozen=True, slots=True)
class ShardLocalExchange(LocalExchange):
    """See `shard_local`: the plan is one of local tensors in their merged shapes.

    starts: where each local tensor begins in its merged parameter.
    """

    starts: tuple[tuple[int, ...], ...]

    def collect(self, leaves: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Cut the local tensors into blocks."""
        return gather(self.plan, self._merged(leaves))

    def deliver(
        self, stacks: dict[str, Tensor], leaves: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Lay the blocks back into the local tensors."""
        out = scatter(self.plan, stacks, self._merged(leaves))
        return [
            None
            if leaf is None or own is None
            else with_layout_of(own.reshape(leaf.shape), leaf)
            for own, leaf in zip(out, leaves, strict=True)
        ]

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
    entries = zip(
        request.plan.paths,
        request.plan.blocks.parameters,
        request.storages,
        request.dtypes,
        strict=True,
    )
    for name, parameter, storage, dtype in entries:
        if storage.summands > 1:
            raise ShardingError(
                f"shard_local needs gradients that are summed, but that of {name!r} is Partial; "
                "use transport=all_to_all()."
            )
        for region in storage.regions if exact else ():
            for lines, spans in zip(lines_of(parameter), spans_of(parameter, region or ()), strict=False):
                for (first, last), span in zip(lines, spans, strict=True):
                    if span.size not in (0, last - first):
                        raise ShardingError(
                            f"parameter {name!r} is stored in shards that end within a block "
                            f"(of {request.block_size}), so shard_local would cut other blocks than "
                            "one process; use all_to_all(), a block size that divides the shards, "
                            "or shard_local(exact=False)."
                        )
        region = storage.regions[request.rank]
        empty = region is None or not all(region)
        specs.append(
            LeafSpec((0,) if empty else local_shape(region or ()), dtype, torch.device("cpu"))
        )
        starts.append(() if empty else tuple(dim[0][0] for dim in region or ()))
    plan = plan_blocks(specs, block_size=request.block_size, merge_dims=False)
    return ShardLocalExchange(plan, request.present, tuple(starts))
