"""Diagonals, without `torch.diagonal`, whose lowering in Inductor warns of a deprecation."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo_func.linalg._shapes import Float

__all__ = ["diagonal", "with_diagonal"]


def diagonal(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n"]:
    """Return the diagonal of every matrix.

    Example:
        >>> diagonal(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([1., 4.])
    """
    return matrix.flatten(-2)[..., :: matrix.shape[-1] + 1]


def with_diagonal(
    matrix: Float[Tensor, "*batch n n"], values: Float[Tensor, "*batch n"] | float
) -> Float[Tensor, "*batch n n"]:
    """Return every matrix with other numbers on its diagonal.

    Example:
        >>> with_diagonal(torch.ones(2, 2), 0.0)
        tensor([[0., 1.],
                [1., 0.]])
    """
    index = torch.arange(matrix.shape[-1], device=matrix.device)
    new = values.unsqueeze(-2) if isinstance(values, Tensor) else values
    return torch.where(index == index.unsqueeze(-1), new, matrix)
