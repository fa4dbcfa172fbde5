"""Parameters to stacks of blocks and back again, exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shampoo_func.blocks.plan import BlockPlan, ParameterPlan, Tile
from shampoo_func.linalg import with_layout_of
from shampoo_func.linalg._shapes import Float

__all__ = ["gather", "present_rows", "scatter"]


def gather(plan: BlockPlan, leaves: Sequence[Tensor | None]) -> dict[str, Float[Tensor, "n ..."]]:
    """Stack the blocks of all tensors that are there, `[n_blocks, d1, ..., dk]` per stack.

    Args:
        plan: The plan for tensors of these shapes.
        leaves: One tensor per planned parameter; None leaves its blocks out.

    Returns:
        A stack per block shape; one without any block is left out.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name, _ in plan.stacks}
    for parameter, leaf in zip(plan.parameters, leaves, strict=True):
        if leaf is None or not parameter.tiles:
            continue
        if _is_one_block(parameter):  # one view for each of many small parameters
            tile = parameter.tiles[0]
            parts[tile.stack].append(leaf.reshape(1, *tile.block))
            continue
        merged = leaf.reshape(parameter.merged)
        for tile in parameter.tiles:
            parts[tile.stack].append(_blocks_of(merged, tile))
    return {name: _concatenate(stack, 0) for name, stack in parts.items() if stack}


def present_rows(plan: BlockPlan, present: Sequence[bool]) -> dict[str, list[int]]:
    """Return, per stack, the rows that belong to parameters that are present."""
    rows: dict[str, list[int]] = {name: [] for name, _ in plan.stacks}
    for parameter, there in zip(plan.parameters, present, strict=True):
        for tile in parameter.tiles if there else ():
            rows[tile.stack].extend(range(tile.row, tile.row + math.prod(tile.grid)))
    return rows


def scatter(
    plan: BlockPlan, stacks: dict[str, Float[Tensor, "n ..."]], like: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Undo `gather`: cut the stacks and lay the blocks back where they came from.

    Args:
        plan: The plan that the stacks were gathered with.
        stacks: What `gather` returned, with new values.
        like: The gathered tensors; each result has the dtype and strides of its partner.
    """
    parts = _split(plan, stacks, like)
    results: list[Tensor | None] = []
    for parameter, leaf in zip(plan.parameters, like, strict=True):
        if leaf is None or not parameter.tiles:
            results.append(leaf)
            continue
        if _is_one_block(parameter):
            whole = next(parts[parameter.tiles[0].stack])
        else:
            tiles = [_rectangle_of(next(parts[tile.stack]), tile) for tile in parameter.tiles]
            whole = tiles[0] if len(tiles) == 1 else _assemble(tiles, parameter)
        whole = whole.reshape(parameter.shape)
        if whole.dtype != leaf.dtype:
            whole = whole.to(leaf.dtype)
        results.append(with_layout_of(whole, leaf))
    return results


def _is_one_block(parameter: ParameterPlan) -> bool:
    return parameter.tiles[0].block == parameter.merged


def _split(
    plan: BlockPlan, stacks: dict[str, Tensor], like: Sequence[Tensor | None]
) -> dict[str, Iterator[Tensor]]:
    """Cut every stack, at once, into the blocks of one tile after the other."""
    counts: dict[str, list[int]] = {name: [] for name in stacks}
    for parameter, leaf in zip(plan.parameters, like, strict=True):
        for tile in () if leaf is None else parameter.tiles:
            # not tile.count: dynamo does not see properties of a plan that it takes as constant
            counts[tile.stack].append(math.prod(tile.grid))
    return {name: iter(torch.split(stack, counts[name])) for name, stack in stacks.items()}


def _blocks_of(merged: Tensor, tile: Tile) -> Tensor:
    """Return the blocks of one tile, `[count, d1, ..., dk]`, in row-major order."""
    order = len(tile.block)
    for dim in range(order):
        length = tile.grid[dim] * tile.block[dim]
        if length != merged.shape[dim]:
            merged = merged.narrow(dim, tile.start[dim], length)
    if _is_interleaved(tile):
        split = [size for pair in zip(tile.grid, tile.block, strict=True) for size in pair]
        axes = [*range(0, 2 * order, 2), *range(1, 2 * order, 2)]
        merged = merged.reshape(split).permute(axes)
    return merged.reshape(math.prod(tile.grid), *tile.block)


def _rectangle_of(blocks: Tensor, tile: Tile) -> Tensor:
    """Undo `_blocks_of`."""
    if _is_interleaved(tile):
        order = len(tile.block)
        axes = [axis for dim in range(order) for axis in (dim, order + dim)]
        blocks = blocks.reshape(*tile.grid, *tile.block).permute(axes)
    return blocks.reshape([tile.grid[dim] * size for dim, size in enumerate(tile.block)])


def _is_interleaved(tile: Tile) -> bool:
    """Whether the rows of one block are not all next to each other."""
    return math.prod(tile.grid[1:]) != 1


def _assemble(tiles: list[Tensor], parameter: ParameterPlan) -> Tensor:
    """Join the tiles of a parameter, last dimension first."""
    for dim in reversed(range(len(parameter.segments))):
        width = parameter.segments[dim]
        tiles = [_concatenate(tiles[i : i + width], dim) for i in range(0, len(tiles), width)]
    return tiles[0]


def _concatenate(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
