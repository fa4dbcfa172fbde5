"""Inverse roots by eigendecomposition, batched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from shampoo_func.errors import HyperparameterError, check_choice, check_dtype, check_number
from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg.roots.scaled import eye_like
from shampoo_func.linalg.roots.spectral import spectral_root
from shampoo_func.linalg.scaling import compute_dtype as dtype_of_arithmetic
from shampoo_func.linalg.scaling import computed_once
from shampoo_func.linalg.solver import Root, RootSolver, all_finite, identity_root
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
    retry_double: bool = True

    def __call__(self, matrix: Float[Tensor, "*batch n n"], exponent: float) -> Root:
        """Return `matrix ** -exponent`, `[*batch, n, n]`, and its ok flags, `[*batch]`."""
        self.check_exponent(exponent)
        if exponent == 0 or matrix.numel() == 0:
            return identity_root(matrix)
        finite = all_finite(matrix)
        eye = _identity(matrix)
        # the identity stands in for a matrix that cannot be decomposed, and ok says so
        safe = torch.where(finite[..., None, None], matrix, eye)
        safe = self._damped(safe.to(self.compute_dtype or dtype_of_arithmetic(matrix.dtype)))
        value, residual = spectral_root(self, safe, exponent)
        converged = finite & (residual <= torch.finfo(safe.dtype).eps ** 0.5)
        residual = torch.where(finite, residual.to(matrix.dtype), torch.inf)
        if value.dtype != matrix.dtype:  # which may not hold it
            value = value.to(matrix.dtype)
            converged = converged & all_finite(value)
        return Root(value, residual, converged)

    def _damped(self, matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
        """Add what is added before the decomposition."""
        epsilon: Any = self.epsilon
        if self.perturb == "after":
            # added to the eigenvalues later; here only so that a derivative by it exists
            epsilon = epsilon - epsilon.detach() if isinstance(epsilon, Tensor) else 0.0
        if not isinstance(epsilon, Tensor) and epsilon == 0.0:
            return matrix
        return matrix + epsilon * _identity(matrix)

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


def _identity(matrix: Tensor) -> Tensor:
    # from memory: Inductor does not vectorise a loop that compares indices
    return computed_once(eye_like(matrix))


def eigh_root(
    epsilon: Scalar = 1e-12,
    *,
    relative_epsilon: Scalar = 0.0,
    perturb: Literal["before", "after"] = "before",
    pseudo_inverse: PseudoInverse | None = None,
    compute_dtype: torch.dtype | None = None,
    retry_double: bool = True,
) -> EighRoot:
    """Inverse root by eigendecomposition: A = Q diag(l) Q^T gives Q diag(f(l)) Q^T.

    f(l) = l^(-p) after damping. With `perturb="before"`, A + epsilon I is decomposed, and when
    its smallest eigenvalue is below epsilon the spectrum is shifted to begin at epsilon. With
    `perturb="after"`, A is decomposed and l - min(l_min, 0) + epsilon is used. A
    `pseudo_inverse` drops small eigenvalues instead, and needs epsilon = 0.

    A matrix whose decomposition fails is left out by its ok flag, and only that matrix. The
    residual is that of the decomposition, |A v - Q diag(l) Q^T v| / (max|l| |v|) for a fixed v;
    beyond the square root of the machine precision the root is not ok.

    The derivative is that of a matrix function (divided differences of f), so it is finite
    where eigenvalues repeat; relative damping, what rounding makes necessary, and cutoffs are
    treated as constants. First and second derivatives are right in every mode.

    Args:
        epsilon: Absolute damping, in the units of the eigenvalues; a number or 0-d tensor.
        relative_epsilon: Damping relative to the largest eigenvalue; the damping used is
            max(epsilon, relative_epsilon * largest).
        perturb: Whether epsilon is added before or after the decomposition.
        pseudo_inverse: Drop small eigenvalues instead of damping them.
        compute_dtype: dtype of the decomposition; None takes the matrix's own, at least float32.
            float64 costs 1.5 to 2 times as much on a CPU and is exact to condition numbers
            beyond 1e10.
        retry_double: Decompose a matrix again in float64 where its first decomposition failed or
            has a large residual. Costs nothing where none has.

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
    check_choice("retry_double", retry_double, (True, False))
    return EighRoot(epsilon, relative_epsilon, perturb, pseudo_inverse, compute_dtype, retry_double)
