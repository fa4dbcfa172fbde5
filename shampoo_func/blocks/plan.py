"""How parameters are cut into blocks: a frozen plan, from shapes alone."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shampoo_func.linalg import constant_result

__all__ = [
    "BlockPlan",
    "LeafSpec",
    "ParameterPlan",
    "Tile",
    "merge_small_dims",
    "plan_blocks",
    "plan_shapes",
]


@dataclass(frozen=True, slots=True)
class LeafSpec:
    """What the plan needs to know of a tensor: shape, dtype and device, never its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> LeafSpec:
        """Describe a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device)


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of a merged parameter that is a regular grid of equal blocks.

    start, grid, block: per merged dimension, the first index, the number of blocks, and the
    size of a block. stack, row: where its first block stands; its blocks are consecutive.
    """

    start: tuple[int, ...]
    grid: tuple[int, ...]
    block: tuple[int, ...]
    stack: str = ""
    row: int = 0

    @property
    def count(self) -> int:
        """The number of blocks."""
        return math.prod(self.grid)


@dataclass(frozen=True, slots=True)
class ParameterPlan:
    """How one parameter is cut: its shape, its merged shape, and its tiles in row-major order.

    segments: how many tiles lie along each merged dimension (one, or two where the size is no
    multiple of the block size); empty for a parameter without elements.
    """

    shape: tuple[int, ...]
    merged: tuple[int, ...]
    segments: tuple[int, ...]
    tiles: tuple[Tile, ...]

    def blocks(self) -> list[tuple[tuple[int, ...], tuple[int, ...], str, int]]:
        """List (start, shape, stack, row) of every block, in row-major order."""
        found = []
        for tile in self.tiles:
            cells = itertools.product(*(range(count) for count in tile.grid))
            for offset, cell in enumerate(cells):
                steps = zip(tile.start, cell, tile.block, strict=True)
                start = tuple(first + index * size for first, index, size in steps)
                found.append((start, tile.block, tile.stack, tile.row + offset))
        return sorted(found)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """The blocks of a whole tree: a plan per parameter, and the size of every stack."""

    parameters: tuple[ParameterPlan, ...]
    stacks: tuple[tuple[str, int], ...]


def merge_small_dims(shape: Sequence[int], limit: int | None, merge_to: int = 1) -> tuple[int, ...]:
    """Drop dimensions of size 1 and merge neighbours, from the last on, up to `limit`.

    Args:
        shape: The shape of a parameter.
        limit: The largest size that a merged dimension may have; a larger one stays as it is.
            None for no limit.
        merge_to: Merge only while more than this many dimensions are left.

    Returns:
        The merged shape: `(1,)` for a scalar, `(0,)` for a parameter without elements.

    Example:
        >>> merge_small_dims((64, 3, 7, 7), 256), merge_small_dims((10, 20), 1024)
        ((64, 147), (200,))
        >>> merge_small_dims((8, 3, 7, 7), 2000, merge_to=2)
        (8, 147)
    """
    if 0 in shape:
        return (0,)
    sizes = [size for size in reversed(shape) if size != 1] or [1]
    merged = [sizes[0]]
    for done, size in enumerate(sizes[1:], start=1):
        left = len(merged) + len(sizes) - done
        if left > merge_to and (limit is None or merged[-1] * size <= limit):
            merged[-1] *= size
        else:
            merged.append(size)
    return tuple(reversed(merged))


def plan_blocks(
    specs: Sequence[LeafSpec],
    *,
    block_size: int | None,
    merge_dims: bool = True,
    merge_to: int | None = None,
) -> BlockPlan:
    """Plan the blocks of a tree of parameters.

    Every parameter is merged (`merge_small_dims`), each merged dimension is cut into pieces of
    `block_size` with a smaller one at the end, and blocks of equal shape, dtype and device are
    stacked in the order of parameters and, within one, in row-major order.

    Args:
        specs: One per parameter, in tree order.
        block_size: Largest size of a block's dimension, and the limit for merging; None leaves
            every parameter whole.
        merge_dims: Whether to merge small dimensions first; if not, the shape is kept (a 0-d
            parameter becomes one of shape (1,)).
        merge_to: Merge only while more than this many dimensions are left, without a limit if
            `block_size` is None; None for 1, and for no merging if `block_size` is None.

    Example:
        >>> spec = LeafSpec((5, 3), torch.float32, torch.device("cpu"))
        >>> plan_blocks([spec], block_size=2).stacks
        (('2x2', 2), ('2x1', 2), ('1x2', 1), ('1x1', 1))
    """
    return _plan(tuple(specs), block_size, merge_dims, merge_to)


@constant_result  # a traced call is planned once, on the host
def plan_shapes(
    specs: tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...],
    block_size: int | None,
    merge_dims: bool,
    merge_to: int | None,
) -> BlockPlan:
    """Call `plan_blocks` with plain arguments, which tracing can pass.

    Args:
        specs: Shape, dtype and device of every parameter, in tree order.
        block_size: As in `plan_blocks`.
        merge_dims: As in `plan_blocks`.
        merge_to: As in `plan_blocks`.
    """
    return _plan(tuple(LeafSpec(*spec) for spec in specs), block_size, merge_dims, merge_to)


@functools.lru_cache(maxsize=512)
def _plan(
    specs: tuple[LeafSpec, ...], block_size: int | None, merge_dims: bool, merge_to: int | None
) -> BlockPlan:
    cut = [_cut(spec.shape, block_size, merge_dims, merge_to) for spec in specs]
    names = _stack_names(specs, cut)
    sizes: dict[str, int] = {}
    parameters = []
    for index, parameter in enumerate(cut):
        tiles = []
        for tile in parameter.tiles:
            stack = names[index, tile.block]
            row = sizes.get(stack, 0)
            sizes[stack] = row + tile.count
            tiles.append(Tile(tile.start, tile.grid, tile.block, stack, row))
        parameters.append(
            ParameterPlan(parameter.shape, parameter.merged, parameter.segments, tuple(tiles))
        )
    return BlockPlan(tuple(parameters), tuple(sizes.items()))


def _cut(
    shape: tuple[int, ...], block_size: int | None, merge_dims: bool, merge_to: int | None
) -> ParameterPlan:
    """Cut one parameter into tiles, not yet assigned to stacks."""
    if 0 in shape:
        return ParameterPlan(shape, (0,), (), ())
    limit = 0 if block_size is None and merge_to is None else block_size
    merged = merge_small_dims(shape, limit, merge_to or 1) if merge_dims else (shape or (1,))
    pieces = [_segments(size, block_size or size) for size in merged]
    tiles = tuple(
        Tile(
            tuple(piece[0] for piece in choice),
            tuple(piece[1] for piece in choice),
            tuple(piece[2] for piece in choice),
        )
        for choice in itertools.product(*pieces)
    )
    return ParameterPlan(shape, merged, tuple(len(piece) for piece in pieces), tiles)


def _segments(size: int, block_size: int) -> list[tuple[int, int, int]]:
    """Cut a dimension: (start, number of blocks, block size) of the full part and of the rest."""
    whole, rest = divmod(size, block_size)
    full = [(0, whole, block_size)] if whole else []
    return full + ([(whole * block_size, 1, rest)] if rest else [])


def _stack_names(
    specs: tuple[LeafSpec, ...], cut: list[ParameterPlan]
) -> dict[tuple[int, tuple[int, ...]], str]:
    """Name the stack of each block: "256x256", with dtype and device only where they differ."""
    kinds: dict[tuple[int, ...], list[tuple[torch.dtype, torch.device]]] = {}
    for spec, parameter in zip(specs, cut, strict=True):
        for tile in parameter.tiles:
            seen = kinds.setdefault(tile.block, [])
            if (spec.dtype, spec.device) not in seen:
                seen.append((spec.dtype, spec.device))
    names = {}
    for index, (spec, parameter) in enumerate(zip(specs, cut, strict=True)):
        for tile in parameter.tiles:
            name = "x".join(str(size) for size in tile.block)
            if len(kinds[tile.block]) > 1:
                name += f":{str(spec.dtype).removeprefix('torch.')}:{spec.device}"
            names[index, tile.block] = name
    return names
