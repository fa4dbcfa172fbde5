"""Inverse roots by eigendecomposition, batched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from shampoo_func.errors import HyperparameterError, check_choice, check_dtype, check_number
from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg.solver import Root, RootSolver, all_finite
from shampoo_func.types import Scalar

__all__ = ["EighRoot", "PseudoInverse", "eigh_root"]


@dataclass(frozen=True, slots=True)
class PseudoInverse:
    """Drop the eigenvalues at or below max(relative_tolerance * largest, absolute_tolerance).

    Args:
        absolute_tolerance: Cutoff in the units of the eigenvalues.
        relative_tolerance: Cutoff relative to the largest eigenvalue; None means n times the
            machine precision of the dtype that the decomposition runs in.

    Raises:
        HyperparameterError: If a tolerance is negative or NaN.

    Example:
        >>> root = eigh_root(epsilon=0.0, pseudo_inverse=PseudoInverse(relative_tolerance=1e-6))
        >>> root(torch.diag(torch.tensor([4.0, 0.0])), exponent=0.5).value
        tensor([[0.5000, 0.0000],
                [0.0000, 0.0000]])
    """

    absolute_tolerance: float = 0.0
    relative_tolerance: float | None = None

    def __post_init__(self) -> None:
        """Check the tolerances."""
        check_number("absolute_tolerance", self.absolute_tolerance)
        check_number("relative_tolerance", self.relative_tolerance or 0.0)

    def cutoff(self, eigenvalues: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch 1"]:
        """Return the eigenvalue at or below which a direction is dropped."""
        relative = self.relative_tolerance
        if relative is None:
            relative = eigenvalues.shape[-1] * torch.finfo(eigenvalues.dtype).eps
        largest = eigenvalues.amax(-1, keepdim=True).clamp(min=0.0)
        return (relative * largest).clamp(min=self.absolute_tolerance)


@dataclass(frozen=True, slots=True)
class EighRoot(RootSolver):
    """See `eigh_root`."""

    epsilon: Scalar = 1e-12
    relative_epsilon: Scalar = 0.0
    perturb: Literal["before", "after"] = "before"
    pseudo_inverse: PseudoInverse | None = None
    compute_dtype: torch.dtype | None = None

    def __call__(self, matrix: Float[Tensor, "*batch n n"], exponent: float) -> Root:
        """Return `matrix ** -exponent`, `[*batch, n, n]`, and its ok flags, `[*batch]`."""
        finite = all_finite(matrix)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        # LAPACK raises on a non-finite matrix; the identity stands in, and ok says so.
        safe = torch.where(finite[..., None, None], matrix, eye)
        safe = self._damped(safe.to(self.compute_dtype or matrix.dtype))
        value = _spectral_root(self, safe, exponent).to(matrix.dtype)
        residual = value.new_zeros(value.shape[:-2])
        return Root(value, residual, finite & all_finite(value))

    def _damped(self, matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
        """Add what is added before the decomposition."""
        epsilon: Any = self.epsilon
        if self.perturb == "after":
            # added to the eigenvalues later; here only so that a derivative by it exists
            epsilon = epsilon - epsilon.detach() if isinstance(epsilon, Tensor) else 0.0
        if not isinstance(epsilon, Tensor) and epsilon == 0.0:
            return matrix
        return matrix + epsilon * torch.eye(
            matrix.shape[-1], dtype=matrix.dtype, device=matrix.device
        )

    def damping(self) -> tuple[Scalar, Scalar]:
        """Return both epsilons as constants of a derivative."""
        epsilon, relative = self.epsilon, self.relative_epsilon
        return (
            epsilon.detach() if isinstance(epsilon, Tensor) else epsilon,
            relative.detach() if isinstance(relative, Tensor) else relative,
        )

    def eigenvalues_kept(
        self, eigenvalues: Float[Tensor, "*batch n"], epsilon: Scalar, relative_epsilon: Scalar
    ) -> Float[Tensor, "*batch n"]:
        """Return the damped eigenvalues; 0 marks a direction that is dropped."""
        if self.pseudo_inverse is not None:
            dropped = eigenvalues <= self.pseudo_inverse.cutoff(eigenvalues)
            return torch.where(dropped, torch.zeros_like(eigenvalues), eigenvalues)
        smallest = eigenvalues.amin(-1, keepdim=True)
        if self.perturb == "before":
            # epsilon is in the matrix already, so only what rounding lost is put back
            short = smallest < epsilon
            damped = torch.where(short, eigenvalues - smallest + epsilon, eigenvalues)
        else:
            damped = eigenvalues - smallest.clamp(max=0.0) + epsilon
        if isinstance(relative_epsilon, Tensor) or relative_epsilon != 0.0:
            largest = damped.amax(-1, keepdim=True)
            damped = damped + (relative_epsilon * largest - epsilon).clamp(min=0.0)
        return damped


def eigh_root(
    epsilon: Scalar = 1e-12,
    *,
    relative_epsilon: Scalar = 0.0,
    perturb: Literal["before", "after"] = "before",
    pseudo_inverse: PseudoInverse | None = None,
    compute_dtype: torch.dtype | None = None,
) -> EighRoot:
    """Inverse root by eigendecomposition: A = Q diag(l) Q^T gives Q diag(f(l)) Q^T.

    f(l) = l^(-p) after damping. With `perturb="before"`, A + epsilon I is decomposed, and when
    its smallest eigenvalue is below epsilon the spectrum is shifted to begin at epsilon. With
    `perturb="after"`, A is decomposed and l - min(l_min, 0) + epsilon is used. A
    `pseudo_inverse` drops small eigenvalues instead, and needs epsilon = 0.

    The derivative is that of a matrix function (divided differences of f), so it is finite
    where eigenvalues repeat; relative damping, what rounding makes necessary, and cutoffs are
    treated as constants.

    Args:
        epsilon: Absolute damping, in the units of the eigenvalues; a number or 0-d tensor.
        relative_epsilon: Damping relative to the largest eigenvalue; the damping used is
            max(epsilon, relative_epsilon * largest).
        perturb: Whether epsilon is added before or after the decomposition.
        pseudo_inverse: Drop small eigenvalues instead of damping them.
        compute_dtype: dtype of the decomposition; None takes the matrix's own. float64 costs
            1.5 to 2 times as much on a CPU and is exact to condition numbers beyond 1e10.

    Raises:
        HyperparameterError: If a number is out of range, or damping and pseudo-inverse meet.

    Source: arXiv 2309.06497, section 4; Higham, Functions of Matrices, theorem 3.11.

    Example:
        >>> root = eigh_root(epsilon=0.0)
        >>> root(torch.diag(torch.tensor([16.0, 1.0])), exponent=0.25).value
        tensor([[0.5000, 0.0000],
                [0.0000, 1.0000]])
    """
    check_number("epsilon", epsilon)
    check_number("relative_epsilon", relative_epsilon)
    check_choice("perturb", perturb, ("before", "after"))
    damped = any(isinstance(value, Tensor) or value != 0.0 for value in (epsilon, relative_epsilon))
    if pseudo_inverse is not None and damped:
        raise HyperparameterError(
            f"pseudo_inverse needs epsilon=0 and relative_epsilon=0, got {epsilon!r} and "
            f"{relative_epsilon!r}: damping would lift the directions that it is to drop."
        )
    check_dtype("compute_dtype", compute_dtype)
    return EighRoot(epsilon, relative_epsilon, perturb, pseudo_inverse, compute_dtype)


def _spectral_root(
    settings: EighRoot, matrix: Float[Tensor, "*batch n n"], exponent: float
) -> Float[Tensor, "*batch n n"]:
    """Compute the root so that every kind of differentiation gets its true derivative."""
    epsilon, relative = settings.damping()
    if forward_ad._current_level >= 0:
        # torch.compile takes no custom jvp: value of a constant, derivative of a linear map
        fixed = matrix.detach()
        kept, vectors = _decompose(settings, fixed, epsilon, relative)
        return _root(settings, kept, vectors, exponent) + _derivative(
            kept, vectors, matrix - fixed, exponent
        )
    apply: Any = _SpectralRoot.apply
    root: Tensor = apply(matrix, epsilon, relative, settings, exponent)
    return root


class _SpectralRoot(torch.autograd.Function):
    """Q f(l) Q^T with the derivative of a matrix function, finite for repeated eigenvalues."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        matrix: Tensor, epsilon: Scalar, relative: Scalar, settings: EighRoot, exponent: float
    ) -> Tensor:
        kept, vectors = _decompose(settings, matrix, epsilon, relative)
        return _root(settings, kept, vectors, exponent)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        matrix, ctx.epsilon, ctx.relative, ctx.settings, ctx.exponent = inputs
        ctx.save_for_backward(matrix)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # decomposed anew, in differentiable operations, so that second derivatives are right
        (matrix,) = ctx.saved_tensors
        kept, vectors = _decompose(ctx.settings, matrix, ctx.epsilon, ctx.relative)
        symmetric = (grads[0] + grads[0].mT) / 2
        return _derivative(kept, vectors, symmetric, ctx.exponent), None, None, None, None


def _decompose(
    settings: EighRoot, matrix: Tensor, epsilon: Scalar, relative: Scalar
) -> tuple[Tensor, Tensor]:
    """Return the damped eigenvalues and the eigenvectors."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return settings.eigenvalues_kept(eigenvalues, epsilon, relative), vectors


def _power(kept: Tensor, exponent: float) -> Tensor:
    positive = kept > 0
    return torch.where(positive, torch.where(positive, kept, 1.0).pow(-exponent), 0.0)


def _root(settings: EighRoot, kept: Tensor, vectors: Tensor, exponent: float) -> Tensor:
    # a dropped direction contributes 0; without damping a zero eigenvalue is no dropped one
    powers = _power(kept, exponent) if settings.pseudo_inverse else kept.pow(-exponent)
    value = (vectors * powers.unsqueeze(-2)) @ vectors.mT
    return (value + value.mT) / 2


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
