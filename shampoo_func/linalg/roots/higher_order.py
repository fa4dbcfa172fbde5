"""Inverse rational roots by the coupled Newton iteration of higher order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_func.errors import HyperparameterError, check_count
from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg.decompose import probe
from shampoo_func.linalg.roots.iteration import Stopping, begin, check_stopping, run
from shampoo_func.linalg.roots.newton import matrix_power
from shampoo_func.linalg.roots.scaled import (
    ScaledRoot,
    Solution,
    check_damping,
    eye_like,
    identity_error,
    is_close,
    rational,
)
from shampoo_func.types import Scalar

__all__ = ["HigherOrderNewtonRoot", "higher_order_newton_root"]

# A root X of which |A X^p v - v| / |v| is larger is none. Rounding alone makes it 0.1 where the
# damping is 1e-6 |A| in float32, with an X that is good to 1e-2.
_WORST = 0.5


@dataclass(frozen=True, slots=True)
class HigherOrderNewtonRoot(ScaledRoot):
    """See `higher_order_newton_root`."""

    epsilon: Scalar = 1e-12
    relative_epsilon: Scalar | None = None
    order: int = 3
    iterations: int | None = None
    tolerance: float = 1e-8
    max_iterations: int = 100

    def check_exponent(self, exponent: float) -> None:
        """Check that the exponent is a fraction with a denominator of at most 100."""
        ScaledRoot.check_exponent(self, exponent)
        if not is_close(rational(exponent), exponent):
            raise HyperparameterError(
                "higher_order_newton_root takes the exponents q/p with integers q and p, p at most "
                f"100, got {exponent!r}; eigh_root takes any exponent."
            )

    def _norm(self, matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
        """Return the largest sum of a row of |A|."""
        return matrix.abs().sum(-1).amax(-1)

    def _solve(self, matrix: Float[Tensor, "*batch n n"], exponent: float) -> Solution:
        q, p = rational(exponent).as_integer_ratio()
        stopping = Stopping(self.iterations, self.tolerance, self.max_iterations)
        eye = eye_like(matrix)
        weights = [1.0]
        for i in range(1, self.order):
            weights.append(weights[-1] * (1 + (i - 1) * p) / (i * p))

        def improve(matrices: tuple[Tensor, ...], order: int) -> tuple[Tensor, Tensor]:
            root, product = matrices
            gap = eye - product
            factor = weights[order - 1] * eye
            for i in range(order - 2, -1, -1):
                # the first product is that of a multiple of the identity
                left = weights[i + 1] * gap if i == order - 2 else factor @ gap
                factor = left + weights[i] * eye
            return root @ factor, matrix_power(factor, p) @ product

        def step(matrices: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
            root, product = improve(matrices, self.order)
            return (root, product), identity_error(product)

        trace = (matrix * eye).sum((-2, -1))
        z = (1 / trace.where(trace != 0, 1.0))[..., None, None]
        first = improve((z.pow(1 / p) * eye, z * matrix), 2)
        end = run(step, begin(first, identity_error(first[1]), self.tolerance), stopping)
        root = (end.matrices[0] + end.matrices[0].mT) / 2
        residual = _residual(matrix, root, p)
        ok = stopping.ok(end)
        if self.iterations is None:
            ok = ok & (residual <= _WORST)
        return Solution(matrix_power(root, q), residual, ok)


def _residual(matrix: Tensor, root: Tensor, p: int) -> Tensor:
    """Return |A X^p v - v| / |v|."""
    vector = probe(matrix)
    image = vector.expand(matrix.shape[:-1]).unsqueeze(-1)
    for _ in range(p):
        image = root.detach() @ image
    error = (matrix.detach() @ image).squeeze(-1) - vector
    return torch.linalg.vector_norm(error, dim=-1)


def higher_order_newton_root(
    epsilon: Scalar = 1e-12,
    *,
    relative_epsilon: Scalar | None = None,
    order: int = 3,
    iterations: int | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 100,
) -> HigherOrderNewtonRoot:
    """Inverse root A^(-q/p) by a coupled Newton iteration of higher order: products only.

    From z = 1 / trace(A), X = z^(1/p) I, M = z A and one Newton step, repeat, with b_0 = 1 and
    b_i = b_(i-1) (1 + (i-1) p) / (i p): M' = sum over i < order of b_i (I - M)^i, X <- X M',
    M <- M'^p M. Order 2 is Newton's iteration. X tends to A^(-1/p), and the root is X^q.

    It stops as `newton_root` does. The residual is |A X^p v - v| for a fixed unit vector v; with
    a tolerance, a root with more than 0.5 is not ok.

    Args:
        epsilon: Absolute damping, in the units of the eigenvalues.
        relative_epsilon: Damping relative to the largest sum of a row of |A|; the larger of both
            is used. None means 8 machine precisions, 1e-6 in float32.
        order: Order of convergence, at least 2.
        iterations: A fixed number of steps; None to stop at the tolerance.
        tolerance: The largest element of |M - I| at which a matrix stops.
        max_iterations: At most so many steps.

    Raises:
        HyperparameterError: If a number is out of range; when called, if the exponent is no
            fraction with a denominator of at most 100.

    Source: Lakic, On the computation of the matrix k-th root, ZAMM 78(3), 1998; Amat, Ezquerro
    and Hernandez-Veron, SeMA J. 65, 2014.

    Example:
        >>> root = higher_order_newton_root(epsilon=0.0)
        >>> root(torch.diag(torch.tensor([8.0, 1.0])), exponent=2 / 3).value.round(decimals=4)
        tensor([[0.2500, 0.0000],
                [0.0000, 1.0000]])
    """
    check_damping(epsilon, relative_epsilon)
    check_count("order", order, low=2)
    stopping = check_stopping(iterations, tolerance, max_iterations)
    return HigherOrderNewtonRoot(epsilon, relative_epsilon, order, *stopping)
