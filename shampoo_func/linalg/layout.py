"""Memory layout: results laid out as their inputs, so that strides never change."""

from __future__ import annotations

from torch import Tensor

from shampoo_func.linalg._shapes import Float

__all__ = ["stacked", "with_layout_of"]


def with_layout_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Give `tensor` the order of strides of `like` (channels_last, transposed ...), dense.

    Args:
        tensor: Any tensor of the shape of `like`.
        like: The tensor whose layout is taken.

    Example:
        >>> import torch
        >>> like = torch.zeros(1, 2, 3, 4).to(memory_format=torch.channels_last)
        >>> with_layout_of(torch.ones(1, 2, 3, 4), like).stride() == like.stride()
        True
    """
    if tensor.is_contiguous() and like.is_contiguous():
        return tensor
    strides: tuple[int, ...] = like.stride()
    order = sorted(range(like.ndim), key=lambda dim: (-strides[dim], dim))
    back = sorted(range(like.ndim), key=lambda position: order[position])
    return tensor.permute(order).contiguous().permute(back)


def stacked(matrices: Float[Tensor, "*batch m n"]) -> Float[Tensor, "count m n"]:
    """Return matrices with one batch dimension: a view, where the strides allow one.

    Example:
        >>> import torch
        >>> stacked(torch.zeros(4, 0)).shape, stacked(torch.zeros(2, 3, 4, 5)).shape
        (torch.Size([1, 4, 0]), torch.Size([6, 4, 5]))
    """
    return matrices.flatten(0, -3) if matrices.ndim > 2 else matrices.unsqueeze(0)
