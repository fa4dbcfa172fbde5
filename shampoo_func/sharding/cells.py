"""Blocks as cells of a grid, and what a region has of each cell."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from shampoo_func.blocks import ParameterPlan
from shampoo_func.sharding.storage import Indices, Region

__all__ = [
    "Cell",
    "Span",
    "Window",
    "cells_of",
    "common",
    "lines_of",
    "spans_of",
    "window_of",
    "windows",
]

Window = tuple[tuple[int, int], ...]
"""A rectangle of a tensor: first index and size per dimension."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One block: its place in the grid of its parameter, its shape, its stack and its row."""

    place: tuple[int, ...]
    shape: tuple[int, ...]
    stack: str
    row: int


@dataclass(frozen=True, slots=True)
class Span:
    """What a region has of one line of cells, in one dimension.

    start, size: where it stands in the region's local tensor. inside: its indices in the cell.
    """

    start: int
    size: int
    inside: Indices


@functools.lru_cache(maxsize=4096)
def lines_of(parameter: ParameterPlan) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Return, per merged dimension, the interval of every line of cells."""
    lines: list[list[tuple[int, int]]] = [[] for _ in parameter.merged]
    for tile in parameter.tiles:
        for dim, line in enumerate(lines):
            size = tile.block[dim]
            starts = (tile.start[dim] + index * size for index in range(tile.grid[dim]))
            line.extend((start, start + size) for start in starts)
    return tuple(tuple(sorted(set(line))) for line in lines)


@functools.lru_cache(maxsize=4096)
def cells_of(parameter: ParameterPlan) -> dict[tuple[int, ...], Cell]:
    """Return the blocks of a parameter by their places, in row-major order."""
    lines = lines_of(parameter)
    index = [{line[0]: at for at, line in enumerate(dim)} for dim in lines]
    found = {}
    for start, shape, stack, row in parameter.blocks():
        place = tuple(index[dim][first] for dim, first in enumerate(start))
        found[place] = Cell(place, shape, stack, row)
    return found


@functools.lru_cache(maxsize=65536)
def spans_of(parameter: ParameterPlan, region: Region) -> tuple[tuple[Span, ...], ...]:
    """Return, per merged dimension, what a region has of every line of cells."""
    spans = []
    for line, indices in zip(lines_of(parameter), region, strict=True):
        spans.append(tuple(_span(indices, start, stop) for start, stop in line))
    return tuple(spans)


def _span(indices: Indices, start: int, stop: int) -> Span:
    before, size, inside = 0, 0, []
    for first, last in indices:
        low, high = max(first, start), min(last, stop)
        if low < high:
            inside.append((low - start, high - start))
            size += high - low
        before += max(0, min(last, start) - first)
    return Span(before, size, tuple(inside))


def common(
    parameter: ParameterPlan, region: Region, place: tuple[int, ...]
) -> tuple[Span, ...] | None:
    """Return what a region has of one cell, or None if nothing."""
    spans = spans_of(parameter, region)
    found = tuple(spans[dim][at] for dim, at in enumerate(place))
    return found if all(span.size for span in found) else None


def windows(
    parameter: ParameterPlan, region: Region
) -> Iterator[tuple[tuple[int, ...], tuple[Span, ...]]]:
    """Yield the cells that a region meets, in row-major order, and what it has of each."""
    spans = spans_of(parameter, region)
    held = [[at for at, span in enumerate(dim) if span.size] for dim in spans]
    for place in itertools.product(*held):
        yield place, tuple(spans[dim][at] for dim, at in enumerate(place))


def window_of(spans: tuple[Span, ...]) -> Window:
    """Return where a region's part of a cell stands in the region's local tensor."""
    return tuple((span.start, span.size) for span in spans)
