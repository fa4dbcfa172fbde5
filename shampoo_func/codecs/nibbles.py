"""Four bits per number: the levels, and two of them in a byte."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo_func.linalg._shapes import Float

__all__ = ["from_levels", "halves", "join", "to_levels"]


def to_levels(relative: Float[Tensor, "*shape"]) -> Tensor:
    """Return, for numbers in [-1, 1], the nearest of 16 levels, uint8 from 0 to 15.

    Level j is 0 for j = 7, else sign(x) x^2 with x = 2 j / 15 - 1.
    Source: arXiv 2405.18144 (linear square quantisation).

    Example:
        >>> to_levels(torch.tensor([-1.0, 0.0, 0.1, 1.0]))
        tensor([ 0,  7, 10, 15], dtype=torch.uint8)
    """
    # between two levels of the square map; the nearer one is found by their mean
    root = relative.sign() * relative.abs().sqrt()
    below = ((root + 1) * 7.5).floor().clamp(0, 14)
    middle = (_level(below) + _level(below + 1)) / 2
    return (below + (relative > middle)).nan_to_num().to(torch.uint8)


def from_levels(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers in [-1, 1] of levels 0 to 15.

    Example:
        >>> from_levels(torch.tensor([0, 7, 15]), torch.float32)
        tensor([-1.,  0.,  1.])
    """
    return _level(levels.to(dtype))


def _level(number: Tensor) -> Tensor:
    linear = (2 * number - 15) / 15
    return torch.where(number == 7, 0.0, linear * linear.abs())


def join(low: Tensor, high: Tensor) -> Tensor:
    """Return bytes of two numbers from 0 to 15 each."""
    return low | (high << 4)


def halves(byte: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two numbers of every byte, the low one first."""
    return byte & 15, byte >> 4
