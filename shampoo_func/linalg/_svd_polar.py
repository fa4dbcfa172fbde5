"""The polar factor by SVD, with its true derivative in every kind of differentiation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from shampoo_func.linalg._shapes import Float

__all__ = ["exact_polar"]


def exact_polar(
    matrix: Float[Tensor, "*batch m n"], tolerance: float
) -> Float[Tensor, "*batch m n"]:
    """Return U V^T without the singular values that are at most `tolerance` of the largest."""
    if forward_ad._current_level >= 0:
        # torch.compile takes no custom jvp: value of a constant, derivative of a linear map
        fixed = matrix.detach()
        parts = _decompose(fixed, tolerance)
        return _product(fixed, *parts) + _derivative(*parts, matrix - fixed)
    apply: Any = _ExactPolar.apply
    factor: Tensor = apply(matrix, tolerance)
    return factor


class _ExactPolar(torch.autograd.Function):
    """U V^T; the polar factor is a gradient (of the nuclear norm), so its Jacobian is symmetric."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, tolerance: float) -> Tensor:
        return _product(matrix, *_decompose(matrix, tolerance))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        matrix, ctx.tolerance = inputs
        ctx.save_for_backward(matrix)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # decomposed anew, in differentiable operations, so that second derivatives are right
        (matrix,) = ctx.saved_tensors
        return _derivative(*_decompose(matrix, ctx.tolerance), grads[0]), None


def _finite(matrix: Tensor) -> Tensor:
    return torch.isfinite(matrix).all(-1).all(-1)[..., None, None]


def _decompose(matrix: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, the singular values (0 where dropped), and V^T."""
    # LAPACK raises on a non-finite matrix; zero stands in
    safe = torch.where(_finite(matrix), matrix, 0.0)
    u, values, vt = torch.linalg.svd(safe, full_matrices=False)
    kept = values > tolerance * values[..., :1]
    return u, torch.where(kept, values, 0.0), vt


def _product(matrix: Tensor, u: Tensor, values: Tensor, vt: Tensor) -> Tensor:
    factor = (u * (values > 0).to(u.dtype).unsqueeze(-2)) @ vt
    return torch.where(_finite(matrix), factor, torch.nan)


def _derivative(u: Tensor, values: Tensor, vt: Tensor, tangent: Tensor) -> Tensor:
    """Return the derivative of U V^T in the direction T; it is its own adjoint.

    With E = U^T T V, U [(E - E^T)_ij / (s_i + s_j)] V^T, and T's part outside of U (or V) times
    S^-1. Next to a dropped direction, E_ij / s_i takes the place of the difference.
    """
    kept = values > 0
    sums = values.unsqueeze(-1) + values.unsqueeze(-2)
    weight = torch.where(sums > 0, 1.0 / torch.where(sums > 0, sums, 1.0), 0.0)
    both = kept.unsqueeze(-1) & kept.unsqueeze(-2)
    inner = u.mT @ tangent @ vt.mT
    change = u @ (weight * (inner - torch.where(both, inner.mT, 0.0))) @ vt
    inverse = torch.where(kept, 1.0 / torch.where(kept, values, 1.0), 0.0)
    rows, columns = tangent.shape[-2:]
    if rows > columns:
        outside = tangent @ vt.mT - u @ inner
        change = change + (outside * inverse.unsqueeze(-2)) @ vt
    elif rows < columns:
        outside = u.mT @ tangent - inner @ vt
        change = change + u @ (inverse.unsqueeze(-1) * outside)
    return change
