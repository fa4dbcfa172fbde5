"""Cutting rectangles out of tensors, and putting tensors together from pieces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_func.sharding.cells import Window
from shampoo_func.sharding.trade import Grid

__all__ = ["cut", "grid"]


def cut(leaf: Tensor, merged: tuple[int, ...], window: Window) -> Tensor:
    """Return a rectangle of a tensor in its merged shape.

    Args:
        leaf: The tensor.
        merged: The shape it is seen in.
        window: First index and size per dimension.
    """
    part = leaf.reshape(merged)
    for dim, (start, size) in enumerate(window):
        part = part.narrow(dim, start, size)
    return part


def grid(pieces: Sequence[Tensor], layout: Grid) -> Tensor:
    """Put a tensor together from its pieces.

    Args:
        pieces: All that have come, as vectors.
        layout: Which of them go where.
    """
    tiles = [
        pieces[which].reshape(shape)
        for which, shape in zip(layout.pieces, layout.shapes, strict=True)
    ]
    for dim in reversed(range(len(layout.widths))):
        width = layout.widths[dim]
        if width > 1:
            tiles = [torch.cat(tiles[i : i + width], dim) for i in range(0, len(tiles), width)]
    whole = tiles[0]
    for dim, order in enumerate(layout.order):
        if order is not None:
            whole = whole.index_select(dim, torch.tensor(order, device=whole.device))
    return whole
