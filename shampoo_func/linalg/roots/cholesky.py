"""Whitening by a Cholesky factor: the inverse square root up to a rotation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_func.errors import HyperparameterError
from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg.decompose import probe
from shampoo_func.linalg.roots.scaled import ScaledRoot, Solution, check_damping, eye_like
from shampoo_func.types import Scalar

__all__ = ["CholeskyRoot", "cholesky_root"]

# |W A W^T v - v| / |v| beyond this is no whitening.
_WORST = 0.1


@dataclass(frozen=True, slots=True)
class CholeskyRoot(ScaledRoot):
    """See `cholesky_root`."""

    epsilon: Scalar = 1e-12
    relative_epsilon: Scalar | None = None

    def check_exponent(self, exponent: float) -> None:
        """Check that the exponent is 1/2 (or 0)."""
        ScaledRoot.check_exponent(self, exponent)
        if exponent not in (0, 0.5):
            raise HyperparameterError(
                f"cholesky_root takes the exponent 1/2 alone, got {exponent!r}; eigh_root takes "
                "any exponent."
            )

    def _solve(self, matrix: Float[Tensor, "*batch n n"], exponent: float) -> Solution:
        factor, info = torch.linalg.cholesky_ex(matrix)
        eye = eye_like(matrix)
        # half of a factor is left where it cannot be had, and the identity stands in
        factor = torch.where((info == 0)[..., None, None], factor, eye)
        value = torch.linalg.solve_triangular(factor, eye.expand(matrix.shape), upper=False)
        vector, fixed = probe(matrix), value.detach()
        image = fixed @ (matrix.detach() @ (fixed.mT @ vector).unsqueeze(-1))
        residual = torch.linalg.vector_norm(image.squeeze(-1) - vector, dim=-1)
        residual = torch.where(info == 0, residual, torch.inf)
        return Solution(value.contiguous(), residual, (info == 0) & (residual <= _WORST))


def cholesky_root(
    epsilon: Scalar = 1e-12, *, relative_epsilon: Scalar | None = None
) -> CholeskyRoot:
    """Whitening by Cholesky: A = L L^T gives W = L^(-1), with W A W^T = I.

    The cheapest exact solver, for the exponent 1/2 alone. **W is not symmetric**: it is lower
    triangular, and differs from A^(-1/2) by a rotation, W = U A^(-1/2) with U orthogonal. Where
    W G stands for A^(-1/2) G this is another optimizer, with the same lengths: W^T W = A^(-1).

    A matrix without a Cholesky factor, which is not positive definite even after damping, is
    left out by its ok flag. The residual is |W A W^T v - v| for a fixed unit vector v.

    Args:
        epsilon: Absolute damping, in the units of the eigenvalues.
        relative_epsilon: Damping relative to |A|_F; the larger of both is used. None means 8
            machine precisions, 1e-6 in float32.

    Raises:
        HyperparameterError: If a number is out of range; when called, if the exponent is not 1/2.

    Source: Kessy, Lewin and Strimmer, Optimal whitening and decorrelation, The American
    Statistician 72(4), 2018.

    Example:
        >>> root = cholesky_root(epsilon=0.0, relative_epsilon=0.0)
        >>> root(torch.tensor([[4.0, 2.0], [2.0, 2.0]]), exponent=0.5).value
        tensor([[ 0.5000,  0.0000],
                [-0.5000,  1.0000]])
    """
    check_damping(epsilon, relative_epsilon)
    return CholeskyRoot(epsilon, relative_epsilon)
