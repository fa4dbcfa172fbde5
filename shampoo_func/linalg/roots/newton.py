"""Inverse p-th roots by the coupled inverse Newton iteration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg.roots.iteration import Stopping, begin, check_stopping, run
from shampoo_func.linalg.roots.scaled import (
    ScaledRoot,
    Solution,
    check_damping,
    eye_like,
    frobenius,
    identity_error,
    whole_root,
)
from shampoo_func.types import Scalar

__all__ = ["NewtonRoot", "matrix_power", "newton_root"]


@dataclass(frozen=True, slots=True)
class NewtonRoot(ScaledRoot):
    """See `newton_root`."""

    epsilon: Scalar = 1e-12
    relative_epsilon: Scalar | None = None
    iterations: int | None = None
    tolerance: float = 1e-6
    max_iterations: int = 100

    def check_exponent(self, exponent: float) -> None:
        """Check that the exponent is 1/p with an integer p (or 0)."""
        ScaledRoot.check_exponent(self, exponent)
        if exponent != 0:
            whole_root("newton_root", exponent)

    def _solve(self, matrix: Float[Tensor, "*batch n n"], exponent: float) -> Solution:
        p = whole_root("newton_root", exponent)
        stopping = Stopping(self.iterations, self.tolerance, self.max_iterations)
        eye = eye_like(matrix)

        def step(matrices: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
            root, product = matrices
            factor = ((p + 1) / p) * eye - product / p
            product = matrix_power(factor, p) @ product
            return (root @ factor, product), identity_error(product)

        norm = frobenius(matrix)
        z = ((p + 1) / 2 / norm.where(norm > 0, 1.0))[..., None, None]
        start = (z.pow(1 / p) * eye, z * matrix)
        # the first step takes all eigenvalues of M into (0, 1], from where they only grow; it may
        # enlarge the largest element of |M - I|, which is no divergence
        error = identity_error(start[1]).clamp(min=1.0)
        end = run(step, begin(start, error, self.tolerance), stopping)
        root = end.matrices[0]
        return Solution((root + root.mT) / 2, end.error, stopping.ok(end))


def newton_root(
    epsilon: Scalar = 1e-12,
    *,
    relative_epsilon: Scalar | None = None,
    iterations: int | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
) -> NewtonRoot:
    """Inverse p-th root by coupled Newton iteration: matrix products only.

    From z = (p + 1) / (2 |A|_F), X = z^(1/p) I and M = z A, where A has its damping, repeat
    M' = ((p + 1) I - M) / p, X <- X M', M <- M'^p M; M tends to I and X to A^(-1/p). The
    residual is the largest element of |M - I|.

    A matrix stops by itself: at the tolerance, where the error stands still near convergence,
    and where it grows, which keeps the iterate before; so the members of a stack do not
    influence each other. With `iterations` the number of steps is fixed, nothing is read back
    from the device, and small eigenvalues that have not converged yet are damped: 10 steps keep
    the 4th root exact down to 6e-5 |A|, 20 to 1e-8 |A|. Such a root is ok unless its error grew;
    with a tolerance it must reach 0.1, or the tolerance itself if that is larger.

    Choose damping of at least 1e-6 |A| in float32: rounding errors of smaller eigenvalues are as
    large as they are, and `eigh_root` in float64 is the solver for those.

    Args:
        epsilon: Absolute damping, in the units of the eigenvalues.
        relative_epsilon: Damping relative to |A|_F; the damping used is max(epsilon,
            relative_epsilon |A|_F). None means 8 machine precisions, 1e-6 in float32.
        iterations: A fixed number of steps; None to stop at the tolerance.
        tolerance: The residual at which a matrix stops.
        max_iterations: At most so many steps.

    Raises:
        HyperparameterError: If a number is out of range; when called, if the exponent is not 1/p.

    Source: Guo and Higham, A Schur-Newton method for the matrix p-th root, SIAM J. Matrix Anal.
    Appl. 28(3), 2006; arXiv 2002.09018, appendix.

    Example:
        >>> import torch
        >>> root = newton_root(epsilon=0.0)
        >>> root(torch.diag(torch.tensor([16.0, 1.0])), exponent=0.25).value.round(decimals=4)
        tensor([[0.5000, 0.0000],
                [0.0000, 1.0000]])
    """
    check_damping(epsilon, relative_epsilon)
    stopping = check_stopping(iterations, tolerance, max_iterations)
    return NewtonRoot(epsilon, relative_epsilon, *stopping)


def matrix_power(matrix: Float[Tensor, "*batch n n"], power: int) -> Float[Tensor, "*batch n n"]:
    """Return `matrix` multiplied by itself, by repeated squaring; `power` is at least 1."""
    result: Tensor | None = None
    square = matrix
    while power:
        if power % 2:
            result = square if result is None else result @ square
        power //= 2
        square = square @ square if power else square
    return matrix if result is None else result
