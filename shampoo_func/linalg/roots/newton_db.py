"""Inverse roots of order 2^j by nested coupled Newton-Denman-Beavers iterations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg.roots.iteration import Stopping, begin, check_stopping, run
from shampoo_func.linalg.roots.scaled import (
    ScaledRoot,
    Solution,
    check_damping,
    eye_like,
    frobenius,
    halvings,
    identity_error,
)
from shampoo_func.types import Scalar

__all__ = ["NewtonDbRoot", "newton_db_root"]


@dataclass(frozen=True, slots=True)
class NewtonDbRoot(ScaledRoot):
    """See `newton_db_root`."""

    epsilon: Scalar = 1e-12
    relative_epsilon: Scalar | None = None
    iterations: int | None = None
    tolerance: float = 1e-6
    max_iterations: int = 100

    def check_exponent(self, exponent: float) -> None:
        """Check that the exponent is 1/2, 1/4, 1/8 ... (or 0)."""
        ScaledRoot.check_exponent(self, exponent)
        if exponent != 0:
            halvings("newton_db_root", exponent)

    def _solve(self, matrix: Float[Tensor, "*batch n n"], exponent: float) -> Solution:
        root, inverse, residual, ok = self._square_roots(matrix)
        for _ in range(halvings("newton_db_root", exponent) - 1):
            root, inverse, error, fine = self._square_roots(root)
            residual, ok = torch.maximum(residual, error), ok & fine
        return Solution(inverse, residual, ok)

    def _square_roots(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return A^(1/2), A^(-1/2), the error and whether it is fine."""
        stopping = Stopping(self.iterations, self.tolerance, self.max_iterations)
        eye = eye_like(matrix)

        def step(matrices: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
            root, inverse, product = matrices
            factor = 1.5 * eye - 0.5 * product
            root, inverse = root @ factor, factor @ inverse
            product = inverse @ root
            return (root, inverse, product), identity_error(product)

        norm = frobenius(matrix)
        scale = norm.where(norm > 0, 1.0)[..., None, None]
        scaled = matrix / scale
        start = (scaled, eye.expand(matrix.shape).clone(), scaled)
        end = run(step, begin(start, identity_error(scaled), self.tolerance), stopping)
        root, inverse, _ = ((m + m.mT) / 2 for m in end.matrices)
        return root * scale.sqrt(), inverse / scale.sqrt(), end.error, stopping.ok(end)


def newton_db_root(
    epsilon: Scalar = 1e-12,
    *,
    relative_epsilon: Scalar | None = None,
    iterations: int | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
) -> NewtonDbRoot:
    """Inverse roots A^(-1/2), A^(-1/4), A^(-1/8) ... by Newton-Denman-Beavers: products only.

    From Y = A / |A|_F and Z = I, repeat E = (3 I - Z Y) / 2, Y <- Y E, Z <- E Z; then
    Y |A|_F^(1/2) tends to A^(1/2) and Z |A|_F^(-1/2) to A^(-1/2). A^(-1/4) is had by a second
    run on A^(1/2), and so on. The residual is the largest element of |I - Z Y|, and the largest
    of all runs.

    The iteration is unstable once it has converged: each matrix stops where its error grows, or
    stands still near convergence, and keeps the iterate before. `iterations`, `tolerance` and
    what is ok are as for `newton_root`; a fixed number is one for every run. Its steps gain less
    than Newton's: 10 are exact down to 5e-4 |A|_F, 20 to 2e-7 |A|_F.

    Args:
        epsilon: Absolute damping, in the units of the eigenvalues.
        relative_epsilon: Damping relative to |A|_F; the larger of both is used. None means 8
            machine precisions, 1e-6 in float32.
        iterations: A fixed number of steps; None to stop at the tolerance.
        tolerance: The residual at which a matrix stops.
        max_iterations: At most so many steps.

    Raises:
        HyperparameterError: If a number is out of range; when called, if the exponent is not
            1/2^j.

    Source: Denman and Beavers, Appl. Math. Comput. 2, 1976; Higham, Functions of Matrices,
    section 6.7 (coupled Newton-Schulz form); arXiv 2602.02016.

    Example:
        >>> root = newton_db_root(epsilon=0.0)
        >>> root(torch.diag(torch.tensor([16.0, 1.0])), exponent=0.25).value.round(decimals=4)
        tensor([[0.5000, 0.0000],
                [0.0000, 1.0000]])
    """
    check_damping(epsilon, relative_epsilon)
    stopping = check_stopping(iterations, tolerance, max_iterations)
    return NewtonDbRoot(epsilon, relative_epsilon, *stopping)
