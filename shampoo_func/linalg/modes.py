"""Gram matrices and products along one dimension of a stack of order-k blocks."""

from __future__ import annotations

from torch import Tensor

from shampoo_func.linalg._shapes import Float

__all__ = ["gram", "mode_norms", "multiply", "unfold"]


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
    unfolded = unfold(blocks, dim, order)
    return unfolded @ unfolded.mT


def mode_norms(blocks: Float[Tensor, "*shape"], dim: int, order: int) -> Float[Tensor, "*batch d"]:
    """Return the diagonal of `gram`: the sums of squares over every dimension but one.

    Args:
        blocks: `[*batch, d1, ..., dk]`.
        dim: Which of the k block dimensions, from 0.
        order: k, the number of block dimensions.

    Example:
        >>> import torch
        >>> mode_norms(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0, 2)
        tensor([ 5., 25.])
    """
    return unfold(blocks, dim, order).square().sum(-1)


def multiply(
    blocks: Float[Tensor, "*shape"], matrix: Float[Tensor, "*batch d d"], dim: int, order: int
) -> Float[Tensor, "*shape"]:
    """Multiply a matrix onto one dimension of every block: the mode product G x_dim M.

    For a matrix block, M G (dim 0) or G M^T (dim 1).

    Args:
        blocks: `[*batch, d1, ..., dk]`.
        matrix: `[*batch, d, d]`, d the size of that dimension.
        dim: Which of the k block dimensions, from 0.
        order: k, the number of block dimensions.

    Example:
        >>> import torch
        >>> x, m = torch.arange(6.0).reshape(1, 2, 3), torch.arange(9.0).reshape(1, 3, 3)
        >>> torch.equal(multiply(x, m, 1, 2), x @ m.mT)
        True
    """
    batch = blocks.ndim - order
    if dim == order - 1:
        rows = blocks.flatten(batch, -2) if order > 1 else blocks.unsqueeze(-2)
        # not .mT: Dynamo would hand the view into the branch of a torch.cond, which refuses it
        return (rows @ matrix.transpose(-1, -2)).reshape(blocks.shape)
    moved = blocks.movedim(batch + dim, batch)
    product = matrix @ moved.flatten(batch + 1)
    return product.reshape(moved.shape).movedim(batch, batch + dim)


def unfold(blocks: Tensor, dim: int, order: int) -> Tensor:
    """Return every block as a matrix with one row per index of `dim`."""
    batch = blocks.ndim - order
    moved = blocks.movedim(batch + dim, batch)
    return moved.flatten(batch + 1) if order > 1 else moved.unsqueeze(-1)
