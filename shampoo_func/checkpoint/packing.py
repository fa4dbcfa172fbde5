"""Symmetric matrices as their upper triangles."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_symmetric", "pack", "unpack"]

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_symmetric(matrix: Tensor) -> bool:
    """Whether `[..., d, d]` equals its transpose in every bit, so that nothing is lost."""
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or not matrix.is_floating_point():
        return False
    bits = matrix.contiguous().view(_INTEGER_OF_SIZE[matrix.element_size()])
    return torch.equal(bits, bits.mT)


def pack(matrix: Tensor) -> Tensor:
    """Return the upper triangle of `[..., d, d]` row by row, `[..., d (d + 1) / 2]`.

    Example:
        >>> pack(torch.tensor([[1, 2], [2, 3]]))
        tensor([1, 2, 3])
    """
    rows, columns = _upper(matrix.shape[-1], matrix.device)
    return matrix[..., rows, columns]


def unpack(triangle: Tensor, size: int) -> Tensor:
    """Undo `pack` of matrices of the given size.

    Example:
        >>> unpack(torch.tensor([1, 2, 3]), 2)
        tensor([[1, 2],
                [2, 3]])
    """
    rows, columns = _upper(size, triangle.device)
    matrix = triangle.new_empty((*triangle.shape[:-1], size, size))
    matrix[..., rows, columns] = triangle
    matrix[..., columns, rows] = triangle
    return matrix


def _upper(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(size, size, device=device)
    return rows, columns
