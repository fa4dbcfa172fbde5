"""Spectral descent: the polar factor of every block, scaled by its shape or nuclear norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import HyperparameterError, check_choice
from shampoo_func.types import Preconditioner

__all__ = ["Polar", "PolarScale", "PolarState", "polar"]

PolarScale = Literal["none", "spectral", "match_rms_adamw", "fan", "nuclear"]
ScaleByDims = Callable[[int, int], float]


class PolarState(NamedTuple):
    """step: int64 `[n]`, gradients taken in; it also tells a block from a stack of blocks."""

    step: Tensor


def _scale_none(d_in: int, d_out: int) -> float:
    return 1.0


def _scale_spectral(d_in: int, d_out: int) -> float:
    return math.sqrt(max(1.0, d_out / d_in))


def _scale_match_rms_adamw(d_in: int, d_out: int) -> float:
    return 0.2 * math.sqrt(max(d_in, d_out))


def _scale_fan(d_in: int, d_out: int) -> float:
    return math.sqrt(d_out / d_in)


_BY_DIMS: dict[str, ScaleByDims] = {
    "none": _scale_none,
    "spectral": _scale_spectral,
    "match_rms_adamw": _scale_match_rms_adamw,
    "fan": _scale_fan,
    "nuclear": _scale_none,
}


@dataclass(frozen=True, slots=True)
class Polar(Preconditioner):
    """See `polar`."""

    method: linalg.PolarMethod
    scale: PolarScale | ScaleByDims = "none"

    def init(self, block: Tensor) -> PolarState:
        """Return a counter at 0."""
        return PolarState(torch.zeros((), dtype=torch.int64, device=block.device))

    def accumulate(self, state: PolarState, grads: Tensor) -> PolarState:
        """Count: there are no statistics."""
        return PolarState(state.step + 1)

    def refresh(self, state: PolarState) -> PolarState:
        """Return the state as it is: nothing is derived from it."""
        return state

    def apply(self, state: PolarState, updates: Tensor) -> Tensor:
        """Return the scaled polar factor of every block, viewed as a matrix [d1, rest]."""
        if updates.numel() == 0:
            return updates
        batch = state.step.ndim
        shape = updates.shape[batch:]
        rows, columns = (shape[0] if shape else 1), math.prod(shape[1:])
        matrix = updates.reshape(*updates.shape[:batch], rows, columns)
        matrix = matrix.to(linalg.compute_dtype(updates.dtype))
        # the polar factor of one column needs no iteration
        factor = self.method(matrix) if len(shape) > 1 else linalg.normalized(matrix)
        if self.scale == "nuclear":
            factor = factor * (factor * matrix).sum((-2, -1), keepdim=True)
        else:
            by_dims = _BY_DIMS[self.scale] if isinstance(self.scale, str) else self.scale
            factor = factor * by_dims(columns, rows)
        result = factor.reshape(updates.shape).to(updates.dtype)
        return linalg.with_layout_of(result, updates)

    @property
    def refreshes(self) -> bool:
        """Nothing is ever recomputed."""
        return False


def polar(
    method: linalg.PolarMethod | None = None, *, scale: PolarScale | ScaleByDims = "none"
) -> Polar:
    """Spectral descent: a block G = U S V^T becomes scale * U V^T.

    This is the direction of steepest descent in the spectral norm, what Muon does to its
    momentum, and Shampoo without any memory. It depends on the (filtered) gradient alone. A
    block of m rows (outputs, as in `torch.nn.Linear`) and n columns (inputs) is scaled by

        "none"             1
        "spectral"         sqrt(max(1, m / n)), Muon's first rule
        "match_rms_adamw"  0.2 sqrt(max(m, n)): entries as large as AdamW's
        "fan"              sqrt(m / n): a change of the layer's function of constant size
        "nuclear"          the sum of G's singular values, <G, U V^T>

    A block of more than two dimensions, [d1, ..., dk], is taken as the matrix [d1, d2 ... dk]
    (so a convolution by its output channels). A vector is one column: G / max(|G|, 1e-8) in the
    Euclidean norm, without iteration; with n = 1 the rules make entries of size 1, 0.2, 1.

    The shape that counts is that of a block: inside `blocked` with `block_size` and
    `merge_dims`, that of the piece, not of the parameter. `block_size=None` and
    `merge_dims=False` keep parameters whole.

    Args:
        method: Finds polar factors of `[..., m, n]`; `newton_schulz_polar()` if not given,
            `svd_polar()` for exact ones, `polar_express()`, or any function.
        scale: A rule by name, or a function of the ints (d_in, d_out) = (n, m).

    Raises:
        HyperparameterError: If the method is no function, or the rule unknown.

    Source: arXiv 1708.00523 (spectral descent); arXiv 2409.20325, section 3; Jordan et al.,
        "Muon" (2024); arXiv 2502.16982, section 2.2 (match_rms_adamw); arXiv 2505.21799
        (nuclear).

    Example:
        >>> tx = polar(linalg.svd_polar(), scale="nuclear")
        >>> tx.apply(tx.init(torch.zeros(2, 2)), torch.tensor([[3.0, 4.0], [-4.0, 3.0]]))
        tensor([[ 6.,  8.],
                [-8.,  6.]])
    """
    chosen: Any = linalg.newton_schulz_polar() if method is None else method
    if not callable(chosen):
        raise HyperparameterError(
            f"method must be a function of matrices such as newton_schulz_polar() or "
            f"svd_polar(), got {method!r}."
        )
    if not callable(scale):
        check_choice("scale", scale, _BY_DIMS)
    return Polar(chosen, scale)
