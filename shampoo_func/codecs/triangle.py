"""Symmetric matrices by their lower triangle, which is the one that `eigh` reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shampoo_func.linalg._shapes import Float

__all__ = ["matrix_size", "pack", "unpack"]


def pack(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch m"]:
    """Return the lower triangle, row by row, `m = n (n + 1) / 2` numbers.

    Example:
        >>> pack(torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
        tensor([1., 2., 3.])
    """
    size = matrix.shape[-1]
    return matrix.flatten(-2).index_select(-1, _places(size, matrix.device)[0])


def unpack(packed: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch n n"]:
    """Return the symmetric matrix of a packed triangle.

    Example:
        >>> unpack(torch.tensor([1.0, 2.0, 3.0]))
        tensor([[1., 2.],
                [2., 3.]])
    """
    size = matrix_size(packed.shape[-1])
    lower, upper = _places(size, packed.device)
    number = torch.arange(packed.shape[-1], device=packed.device)
    # a table made by scattering is computed once; one of index arithmetic would be fused into
    # the copy and computed for every matrix of a stack
    table = number.new_zeros(size * size).scatter(0, lower, number).scatter(0, upper, number)
    return packed.index_select(-1, table).reshape(*packed.shape[:-1], size, size)


def matrix_size(packed: int) -> int:
    """Return n for `n (n + 1) / 2` numbers."""
    return (math.isqrt(8 * packed + 1) - 1) // 2


def _places(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where the packed numbers lie in a flattened matrix, and where their mirrors do."""
    row, column = torch.tril_indices(size, size, device=device)
    return row * size + column, column * size + row
