"""Gram matrices and products along one dimension of a stack of order-k blocks."""

from __future__ import annotations

from torch import Tensor

from shampoo_func.linalg._shapes import Float

__all__ = ["gram", "multiply"]


def gram(blocks: Float[Tensor, "*shape"], dim: int, order: int) -> Float[Tensor, "*batch d d"]:
    """Contract `blocks` with itself over every block dimension but one.

    O[a, b] = sum over the others of G[.., a, ..] G[.., b, ..]; for a matrix, G G^T (dim 0) or
    G^T G (dim 1). Source: arXiv 1802.09568, section 4.

    Args:
        blocks: `[*batch, d1, ..., dk]`.
        dim: Which of the k block dimensions, from 0.
        order: k, the number of block dimensions.

    Example:
        >>> import torch
        >>> x = torch.arange(6.0).reshape(1, 2, 3)
        >>> torch.equal(gram(x, 0, 2), x @ x.mT)
        True
    """
    batch = blocks.ndim - order
    unfolded = blocks.movedim(batch + dim, batch)
    unfolded = unfolded.flatten(batch + 1) if order > 1 else unfolded.unsqueeze(-1)
    return unfolded @ unfolded.mT


def multiply(
    blocks: Float[Tensor, "*shape"], matrix: Float[Tensor, "*batch d d"], dim: int, order: int
) -> Float[Tensor, "*shape"]:
    """Multiply a symmetric `matrix` onto one dimension of every block.

    For a matrix block, X G (dim 0) or G X (dim 1); in general the mode product of X with G
    along `dim`.

    Args:
        blocks: `[*batch, d1, ..., dk]`.
        matrix: `[*batch, d, d]`, symmetric, d the size of that dimension.
        dim: Which of the k block dimensions, from 0.
        order: k, the number of block dimensions.

    Example:
        >>> import torch
        >>> x, eye = torch.arange(6.0).reshape(1, 2, 3), 2 * torch.eye(3).unsqueeze(0)
        >>> torch.equal(multiply(x, eye, 1, 2), 2 * x)
        True
    """
    batch = blocks.ndim - order
    if dim == order - 1:
        rows = blocks.flatten(batch, -2) if order > 1 else blocks.unsqueeze(-2)
        return (rows @ matrix).reshape(blocks.shape)
    moved = blocks.movedim(batch + dim, batch)
    product = matrix @ moved.flatten(batch + 1)
    return product.reshape(moved.shape).movedim(batch, batch + dim)
