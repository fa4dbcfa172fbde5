"""What the solvers by matrix products share: a damped matrix of size about 1, and checks."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from shampoo_func.errors import HyperparameterError, check_number
from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg.scaling import compute_dtype
from shampoo_func.linalg.solver import Root, RootSolver, all_finite, identity_root
from shampoo_func.types import Scalar

if TYPE_CHECKING:
    from fractions import Fraction

__all__ = ["ScaledRoot", "Solution", "check_damping", "eye_like", "frobenius", "identity_error"]

# Where nothing else is asked for, damping is this many machine precisions of |A|: rounding
# makes the smallest eigenvalues of a rank-deficient matrix negative by about as much.
_PRECISIONS = 8


class Solution(NamedTuple):
    """What `ScaledRoot._solve` finds for the scaled matrix: as `Root`."""

    value: Tensor
    residual: Tensor
    ok: Tensor


class ScaledRoot(RootSolver):
    """A solver that works on B = (A + damping I) / s, with s the largest element of A.

    The root of A is s^(-p) times that of B, and no norm or product of B can overflow. All is
    computed in at least float32 and returned in the dtype of the matrix.
    """

    __slots__ = ()

    relative_epsilon: Scalar | None

    @abstractmethod
    def _solve(self, matrix: Float[Tensor, "*batch n n"], exponent: float) -> Solution:
        """Solve for a symmetric, damped matrix whose largest element is about 1."""

    def _norm(self, matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the norm that `relative_epsilon` refers to."""
        return frobenius(matrix)

    def __call__(self, matrix: Float[Tensor, "*batch n n"], exponent: float) -> Root:
        """Return `matrix ** -exponent`, `[*batch, n, n]`, with residual and ok, `[*batch]`."""
        self.check_exponent(exponent)
        if exponent == 0 or matrix.numel() == 0:
            return identity_root(matrix)
        finite = all_finite(matrix)
        eye = eye_like(matrix)
        # the identity stands in for what is not finite, so that no derivative is spoiled
        safe = torch.where(finite[..., None, None], matrix, eye).to(compute_dtype(matrix.dtype))
        scale = self._scale(safe)
        scaled = safe / scale[..., None, None]
        scaled = self._damped((scaled + scaled.mT) / 2, scale)
        value, residual, ok = self._solve(scaled, exponent)
        value = (value * scale.pow(-exponent)[..., None, None]).to(matrix.dtype)
        ok = finite & ok & all_finite(value) & torch.isfinite(residual)
        residual = torch.where(
            finite, residual.nan_to_num(nan=torch.inf, posinf=torch.inf), torch.inf
        )
        return Root(value, residual.detach().to(matrix.dtype), ok)

    def _scale(self, matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return s; the root does not depend on it, and no derivative goes through it."""
        largest = matrix.detach().abs().amax((-2, -1))
        # damping that is larger than all of the matrix must not overflow either
        if isinstance(self.epsilon, Tensor):
            largest = torch.maximum(largest, self.epsilon.detach().to(largest.dtype))
        else:
            largest = largest.clamp(min=self.epsilon)
        return torch.where(largest > 0, largest, 1.0)

    def _damped(
        self, matrix: Float[Tensor, "*batch n n"], scale: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch n n"]:
        """Add max(epsilon, relative_epsilon |A|) I, in units of the scale."""
        relative = self.relative_epsilon
        if relative is None:
            relative = _PRECISIONS * torch.finfo(matrix.dtype).eps
        ridge = self.epsilon / scale
        if isinstance(relative, Tensor) or relative > 0.0:
            ridge = torch.maximum(ridge, (relative * self._norm(matrix)).to(ridge.dtype))
        return matrix + ridge.to(matrix.dtype)[..., None, None] * eye_like(matrix)


def eye_like(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "n n"]:
    """Return the identity of the size of `matrix`."""
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def frobenius(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
    """Return the Frobenius norm of each matrix."""
    return torch.linalg.vector_norm(matrix, dim=(-2, -1))


def identity_error(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
    """Return the largest element of |M - I|, of each matrix, as a constant."""
    return (matrix.detach() - eye_like(matrix)).abs().amax((-2, -1))


def check_damping(epsilon: Scalar, relative_epsilon: Scalar | None) -> None:
    """Check both epsilons.

    Raises:
        HyperparameterError: If one is negative, NaN, or no number.
    """
    check_number("epsilon", epsilon)
    if relative_epsilon is not None:
        check_number("relative_epsilon", relative_epsilon)


def check_constant(name: str, value: Any) -> None:
    """Check that `value` is a number and no tensor, since the graph depends on it.

    Raises:
        HyperparameterError: If it is a tensor.
    """
    if isinstance(value, Tensor):
        raise HyperparameterError(
            f"{name} must be a Python number, got a tensor: how much is computed depends on it."
        )


def rational(exponent: float) -> Fraction:
    """Return a fraction with a denominator of at most 100, which may be a poor approximation."""
    from fractions import Fraction  # imports decimal too: not worth the time at every start

    return Fraction(exponent).limit_denominator(100)


def is_close(fraction: Fraction, exponent: float) -> bool:
    """Whether the fraction is the exponent but for rounding."""
    return abs(float(fraction) - exponent) <= 1e-9 * abs(exponent)


def whole_root(solver: str, exponent: float) -> int:
    """Return p of the exponent 1/p.

    Raises:
        HyperparameterError: If p is not an integer.
    """
    fraction = rational(exponent)
    if fraction.numerator != 1 or not is_close(fraction, exponent):
        raise HyperparameterError(
            f"{solver} takes the exponents 1/p with an integer p from 1 to 100, got {exponent!r}; "
            "higher_order_newton_root takes fractions, eigh_root any exponent."
        )
    return fraction.denominator


def halvings(solver: str, exponent: float) -> int:
    """Return j of the exponent 1/2^j, at least 1.

    Raises:
        HyperparameterError: If there is none.
    """
    for count in range(1, 7):
        if abs(exponent * 2**count - 1.0) <= 1e-9:
            return count
    raise HyperparameterError(
        f"{solver} takes the exponents 1/2, 1/4, 1/8 ... 1/64, got {exponent!r}; newton_root takes "
        "1/p, eigh_root any exponent."
    )
