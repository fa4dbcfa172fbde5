"""Taking Gram matrices into moving averages: one product that reads and writes the average."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg.control import is_recorded, is_transformed
from shampoo_func.linalg.layout import stacked
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
    if is_transformed():  # torch 2.13 crashes in the forward-mode derivative of baddbmm
        return decay * factor + weight * (rows @ rows.transpose(-1, -2))
    if torch.compiler.is_compiling() and not is_recorded(factor, rows):
        # Inductor drops the copy where the old factor is overwritten by the new one anyway
        new = factor.clone()
        _add_gram_(new, rows, decay, weight)
        return new
    stack, rows = stacked(factor), stacked(rows)
    added = torch.baddbmm(stack, rows, rows.transpose(-1, -2), beta=decay, alpha=weight)
    return added.reshape(factor.shape)


# the schema is written out: it cannot be inferred where jaxtyping wraps the annotations
@torch.library.custom_op(
    "shampoo_func::add_gram_",
    mutates_args=("factor",),
    schema="(Tensor(a!) factor, Tensor rows, float decay, float weight) -> ()",
)
def _add_gram_(factor: Tensor, rows: Tensor, decay: float, weight: float) -> None:
    # view, not reshape: a copy would be written in vain
    own, rows = factor.view(factor.shape[:-2].numel(), *factor.shape[-2:]), stacked(rows)
    own.baddbmm_(rows, rows.transpose(-1, -2), beta=decay, alpha=weight)


@_add_gram_.register_fake
def _fake(factor: Tensor, rows: Tensor, decay: float, weight: float) -> None:
    return None
