"""Runs of numbers that share a scale: the largest magnitude among them."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.linalg._shapes import Float

__all__ = ["scale_of", "spread"]


def scale_of(numbers: Float[Tensor, "*batch m"], block: int) -> Float[Tensor, "*batch blocks"]:
    """Return the largest magnitude of every run of `block` numbers; NaN where one is not finite.

    The last run may be shorter. A scale that is NaN makes every number of its run NaN, so that
    nothing that is not finite can come back as an ordinary number.

    Example:
        >>> scale_of(torch.tensor([1.0, -2.0, 3.0]), block=2)
        tensor([2., 3.])
    """
    size = numbers.shape[-1]
    if size == 0:
        return numbers
    short = -size % block if size > block else 0
    padded = torch.nn.functional.pad(numbers, (0, short)) if short else numbers
    largest = padded.abs().reshape(*padded.shape[:-1], -1, min(block, size)).amax(-1)
    return torch.where(torch.isfinite(largest), largest, torch.nan)


def spread(
    scale: Float[Tensor, "*batch blocks"], size: int, block: int
) -> Float[Tensor, "*batch m"]:
    """Return the scale of each of `size` numbers, in at least float32."""
    wide = scale.to(linalg.compute_dtype(scale.dtype))
    if size == 0:
        return wide
    run = min(block, size)
    return wide.unsqueeze(-1).expand(*wide.shape, run).flatten(-2)[..., :size]
