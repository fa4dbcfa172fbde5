"""Q f(l) Q^T as a function of the matrix, differentiable in every mode."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg.decompose import eigh
from shampoo_func.linalg.eigenpairs import eigenpairs
from shampoo_func.types import Scalar

__all__ = ["Spectrum", "spectral_root"]


@runtime_checkable
class Spectrum(Protocol):
    """What is done to the eigenvalues before the power: damping, cutoffs."""

    @property
    def pseudo_inverse(self) -> Any:
        """Not None where eigenvalues may be dropped."""

    @property
    def retry_double(self) -> bool:
        """Whether a failed decomposition is tried again in float64."""

    def damping(self) -> tuple[Scalar, Scalar]:
        """Return both epsilons as constants of a derivative."""

    def eigenvalues_kept(
        self, eigenvalues: Tensor, epsilon: Scalar, relative_epsilon: Scalar
    ) -> Tensor:
        """Return the damped eigenvalues; 0 marks a direction that is dropped."""


def spectral_root(
    settings: Spectrum, matrix: Float[Tensor, "*batch n n"], exponent: float
) -> tuple[Float[Tensor, "*batch n n"], Float[Tensor, "*batch"]]:
    """Return the root and the residual of the decomposition (without a derivative).

    The residual is inf where the root overflows: Q is orthogonal, so that its elements are
    finite if the powers of the eigenvalues are, and need not be looked at.
    """
    epsilon, relative = settings.damping()
    if forward_ad._current_level >= 0:
        return _expanded(settings, matrix, epsilon, relative, exponent)
    apply: Any = _SpectralRoot.apply
    root, residual = apply(matrix, epsilon, relative, settings, exponent)
    return root, residual


def _expanded(
    settings: Spectrum, matrix: Tensor, epsilon: Scalar, relative: Scalar, exponent: float
) -> tuple[Tensor, Tensor]:
    """Return the root's expansion about a constant: right in value and two derivatives.

    torch.compile takes no custom forward-mode rule, so with C = matrix, a constant, and
    D = matrix - C, which is zero but has the derivatives of the matrix, the root is written as
    f(C) + f'(C + D/2)[D]. By the midpoint rule this has the first and second derivatives of
    f at C; f' needs the decomposition of C + D/2 only to first order in D.
    """
    fixed = matrix.detach()
    values, vectors, residual = eigh(fixed, retry_double=settings.retry_double)
    kept = settings.eigenvalues_kept(values, epsilon, relative)
    delta = matrix - fixed
    rotated = vectors.mT @ delta @ vectors / 2
    gap = values.unsqueeze(-2) - values.unsqueeze(-1)
    mixing = torch.where(gap == 0, 0.0, rotated / torch.where(gap == 0, 1.0, gap))
    eye = torch.eye(values.shape[-1], dtype=values.dtype, device=values.device)
    moved = vectors @ (eye + mixing)
    positive = kept > 0
    shifted = torch.where(positive, kept + (rotated * eye).sum(-1), kept)
    powers = _powers(settings, kept, exponent)
    root = _composed(vectors, powers)
    return root + _derivative(shifted, moved, delta, exponent), _checked(residual, powers)


class _SpectralRoot(torch.autograd.Function):
    """Q f(l) Q^T with the derivative of a matrix function, finite for repeated eigenvalues."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        matrix: Tensor, epsilon: Scalar, relative: Scalar, settings: Spectrum, exponent: float
    ) -> tuple[Tensor, Tensor]:
        values, vectors, residual = eigh(matrix, retry_double=settings.retry_double)
        kept = settings.eigenvalues_kept(values, epsilon, relative)
        powers = _powers(settings, kept, exponent)
        return _composed(vectors, powers), _checked(residual, powers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        matrix, ctx.epsilon, ctx.relative, ctx.settings, ctx.exponent = inputs
        ctx.save_for_backward(matrix)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # decomposed anew, in differentiable operations, so that second derivatives are right
        (matrix,) = ctx.saved_tensors
        values, vectors = eigenpairs(matrix)
        kept = ctx.settings.eigenvalues_kept(values, ctx.epsilon, ctx.relative)
        symmetric = (grads[0] + grads[0].mT) / 2
        return _derivative(kept, vectors, symmetric, ctx.exponent), None, None, None, None


def _power(kept: Tensor, exponent: float) -> Tensor:
    positive = kept > 0
    return torch.where(positive, torch.where(positive, kept, 1.0).pow(-exponent), 0.0)


def _powers(settings: Spectrum, kept: Tensor, exponent: float) -> Tensor:
    # a dropped direction contributes 0; without damping a zero eigenvalue is no dropped one
    return _power(kept, exponent) if settings.pseudo_inverse else kept.pow(-exponent)


def _composed(vectors: Tensor, powers: Tensor) -> Tensor:
    """Return Q diag(powers) Q^T, symmetric to the last bit."""
    value = (vectors * powers.unsqueeze(-2)) @ vectors.mT
    return (value + value.mT) / 2


def _checked(residual: Tensor, powers: Tensor) -> Tensor:
    """Return the residual, or inf where the sum of two elements could overflow."""
    bound = torch.finfo(powers.dtype).max / 4
    return torch.where((powers < bound).all(-1), residual, torch.inf)


def _derivative(kept: Tensor, vectors: Tensor, tangent: Tensor, exponent: float) -> Tensor:
    """Return the derivative of the root in the direction `tangent`.

    Q (F * (Q^T T Q)) Q^T with F the divided differences of f (Daleckii-Krein).
    """
    rotated = vectors.mT @ tangent @ vectors
    return vectors @ (_divided_differences(kept, exponent) * rotated) @ vectors.mT


def _divided_differences(kept: Tensor, exponent: float) -> Tensor:
    """Return (f(a) - f(b)) / (a - b) for f(a) = a^(-p), and f'(a) where a = b."""
    a, b = kept.unsqueeze(-1), kept.unsqueeze(-2)
    both = (a > 0) & (b > 0)
    ratio = torch.where(both, a, 1.0) / torch.where(both, b, 1.0)
    delta = ratio - 1.0
    equal = delta == 0
    growth = torch.expm1(-exponent * torch.log(ratio)) / torch.where(equal, 1.0, delta)
    smooth = torch.where(b > 0, b, 1.0).pow(-exponent - 1) * torch.where(equal, -exponent, growth)
    gap = a - b
    jump = (_power(kept, exponent).unsqueeze(-1) - _power(kept, exponent).unsqueeze(-2)) / (
        torch.where(gap == 0, 1.0, gap)
    )
    return torch.where(both, smooth, jump)
