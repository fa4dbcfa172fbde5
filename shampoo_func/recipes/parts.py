"""What the recipes share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shampoo_func.types import Transformation

__all__ = ["is_matrix", "is_zero", "unless_zero"]


def is_matrix(path: str, leaf: Tensor) -> bool:
    """Whether a parameter has two dimensions or more."""
    return leaf.ndim >= 2


def is_zero(value: Any) -> bool:
    """Whether a hyper-parameter is the number 0; a tensor never is, its value may change."""
    return not isinstance(value, Tensor) and not callable(value) and value == 0


def unless_zero(value: Any, stage: Transformation) -> list[Transformation]:
    """Return the stage, or nothing if its hyper-parameter is the number 0: no state, no work."""
    return [] if is_zero(value) else [stage]
