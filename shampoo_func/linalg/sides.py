"""Multiplying matrix blocks from both sides, a few at a time, so that the half product is small."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg.control import is_recorded, is_transformed
from shampoo_func.linalg.layout import stacked

__all__ = ["multiply_both_sides"]

# Elements of a half product that is held at once on a CPU: it should stay in cache.
_PIECE = 2**19


def multiply_both_sides(
    left: Float[Tensor, "*batch m m"],
    blocks: Float[Tensor, "*batch m n"],
    right: Float[Tensor, "*batch n n"],
) -> Float[Tensor, "*batch m n"]:
    """Return `left @ blocks @ right^T`.

    Args:
        left: `[*batch, m, m]`.
        blocks: `[*batch, m, n]`, of the same dtype.
        right: `[*batch, n, n]`.

    Example:
        >>> multiply_both_sides(2 * torch.eye(2), torch.ones(2, 1), torch.full((1, 1), 3.0))
        tensor([[6.],
                [6.]])
    """
    if is_transformed() or is_recorded(left, blocks, right):
        return left @ blocks @ right.transpose(-1, -2)
    if torch.compiler.is_compiling():
        new = blocks.clone()  # gone from the graph, unless something else reads the blocks
        _multiply_(left, new, right)
        return new
    new = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    return _multiplied(left, blocks, right, new)


def _multiplied(left: Tensor, blocks: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write the products into `out`, which may be `blocks`."""
    rows, columns = blocks.shape[-2:]
    # view, not reshape: a copy would be written in vain
    into = out.view(out.shape[:-2].numel(), rows, columns)
    if not into.numel():
        return out
    stacks = (stacked(left), stacked(blocks), stacked(right.transpose(-1, -2)), into)
    piece = max(1, _PIECE // (rows * columns)) if blocks.device.type == "cpu" else len(into)
    half = torch.empty_like(into[:piece])
    for own, block, other, result in zip(
        *(torch.split(stack, piece) for stack in stacks), strict=True
    ):
        torch.bmm(torch.bmm(own, block, out=half[: len(own)]), other, out=result)
    return out


# the schema is written out: it cannot be inferred where jaxtyping wraps the annotations
@torch.library.custom_op(
    "shampoo_func::multiply_both_sides_",
    mutates_args=("blocks",),
    schema="(Tensor left, Tensor(a!) blocks, Tensor right) -> ()",
)
def _multiply_(left: Tensor, blocks: Tensor, right: Tensor) -> None:
    _multiplied(left, blocks, right, blocks)


@_multiply_.register_fake
def _fake(left: Tensor, blocks: Tensor, right: Tensor) -> None:
    return None
