"""Taking Gram matrices into moving averages: one product that reads and writes the average."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg.control import is_transformed
from shampoo_func.linalg.modes import unfold

__all__ = ["add_gram"]


def add_gram(
    factor: Float[Tensor, "*batch d d"],
    blocks: Float[Tensor, "*shape"],
    dim: int,
    order: int,
    *,
    decay: float,
    weight: float,
) -> Float[Tensor, "*batch d d"]:
    """Return `decay * factor + weight * gram(blocks, dim, order)`.

    The sum is taken inside the matrix product, which saves a stack of Gram matrices and a pass
    over the factors. In a compiled step that writes its results over its state (`donate`), the
    product writes into the factor itself.

    Args:
        factor: `[*batch, d, d]`, of the dtype of `blocks`.
        blocks: `[*batch, d1, ..., dk]`.
        dim: Which of the k block dimensions, from 0.
        order: k, the number of block dimensions.
        decay: Weight of the factor.
        weight: Weight of the Gram matrices.

    Example:
        >>> add_gram(torch.eye(2), torch.tensor([[1.0], [2.0]]), 0, 2, decay=0.5, weight=0.5)
        tensor([[1.0000, 1.0000],
                [1.0000, 2.5000]])
    """
    rows = unfold(blocks, dim, order)
    if _can_write(factor, rows):
        # Inductor drops the copy where the old factor is overwritten by the new one anyway
        new = factor.clone()
        _add_gram_(new, rows, decay, weight)
        return new
    flat = factor.reshape(-1, *factor.shape[-2:]), rows.reshape(-1, *rows.shape[-2:])
    return _added(*flat, decay, weight).reshape(factor.shape)


def _can_write(factor: Tensor, rows: Tensor) -> bool:
    """Whether a step is traced that nothing maps or differentiates."""
    if not torch.compiler.is_compiling() or is_transformed():
        return False
    return not (torch.is_grad_enabled() and (factor.requires_grad or rows.requires_grad))


def _added(factor: Tensor, rows: Tensor, decay: float, weight: float) -> Tensor:
    return torch.baddbmm(factor, rows, rows.transpose(-1, -2), beta=decay, alpha=weight)


# the schema is written out: it cannot be inferred where jaxtyping wraps the annotations
@torch.library.custom_op(
    "shampoo_func::add_gram_",
    mutates_args=("factor",),
    schema="(Tensor(a!) factor, Tensor rows, float decay, float weight) -> ()",
)
def _add_gram_(factor: Tensor, rows: Tensor, decay: float, weight: float) -> None:
    own, rows = factor.view(-1, *factor.shape[-2:]), rows.reshape(-1, *rows.shape[-2:])
    own.baddbmm_(rows, rows.transpose(-1, -2), beta=decay, alpha=weight)


@_add_gram_.register_fake
def _fake(factor: Tensor, rows: Tensor, decay: float, weight: float) -> None:
    return None
