"""Eigenvalues and eigenvectors with a derivative that is finite where eigenvalues repeat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg.decompose import eigh
from shampoo_func.linalg.diagonal import diagonal, with_diagonal

__all__ = ["eigenpairs"]


def eigenpairs(
    matrix: Float[Tensor, "*batch n n"],
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n n"]]:
    """Return eigenvalues, ascending, and eigenvectors, row-major, of symmetric matrices.

    The derivative of the vectors is dQ = Q (F * Q^T dA Q), F_ij = 1 / (l_j - l_i); within a
    repeated eigenvalue, where the vectors are arbitrary, F is 0. Source: Magnus, Econometric
    Theory 1 (1985) 179.

    Args:
        matrix: Symmetric; one that cannot be decomposed gets NaN.

    Example:
        >>> eigenpairs(torch.diag(torch.tensor([3.0, 1.0])))[0]
        tensor([1., 3.])
    """
    if forward_ad._current_level >= 0:
        # torch.compile takes no custom jvp: value of a constant, derivative of a linear map
        fixed = matrix.detach()
        values, vectors = _decompose(fixed)
        rotated = vectors.mT @ (matrix - fixed) @ vectors
        turned = vectors + vectors @ (_gaps(values) * rotated)
        return values + diagonal(rotated), turned
    apply: Any = _Eigenpairs.apply
    values, vectors = apply(matrix)
    return values, vectors


class _Eigenpairs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor]:
        return _decompose(matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # decomposed anew, by the same function, so that second derivatives are finite too
        (matrix,) = ctx.saved_tensors
        values, vectors = eigenpairs(matrix)
        inner = with_diagonal(_gaps(values) * (vectors.mT @ grads[1]), grads[0])
        grad = vectors @ inner @ vectors.mT
        return (grad + grad.mT) / 2


def _decompose(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors, _ = eigh(matrix, retry_double=True)
    return values, vectors.contiguous()


def _gaps(values: Tensor) -> Tensor:
    """Return 1 / (l_j - l_i), and 0 where the two are equal."""
    gap = values.unsqueeze(-2) - values.unsqueeze(-1)
    return torch.where(gap == 0, 0.0, 1 / torch.where(gap == 0, 1.0, gap))
