"""Inverse powers by a Chebyshev polynomial of the matrix."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shampoo_func.errors import check_count, check_number
from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg.constant import constant_result
from shampoo_func.linalg.roots.scaled import (
    ScaledRoot,
    Solution,
    check_constant,
    eye_like,
    frobenius,
)
from shampoo_func.types import Scalar

__all__ = ["ChebyshevRoot", "chebyshev_root"]


@dataclass(frozen=True, slots=True)
class ChebyshevRoot(ScaledRoot):
    """See `chebyshev_root`."""

    epsilon: Scalar = 1e-12
    offset: float = 1e-2
    degree: int = 20
    # the offset is damping enough
    relative_epsilon: Scalar | None = field(default=0.0, init=False)

    def _solve(self, matrix: Float[Tensor, "*batch n n"], exponent: float) -> Solution:
        series = _chebyshev_series(float(exponent), self.offset, self.degree)
        *coefficients, bound, error = series
        eye = eye_like(matrix)
        norm = torch.minimum(frobenius(matrix), matrix.abs().sum(-1).amax(-1))
        scale = norm.where(norm > 0, 1.0)
        # [offset, 1 + offset] is the interval of the polynomial, [-1, 1] that of the recurrence
        shifted = (2.0 / scale)[..., None, None] * matrix - eye
        later, last = torch.zeros_like(matrix), coefficients[-1] * eye.expand(matrix.shape)
        for coefficient in reversed(coefficients[1:-1]):
            later, last = last, 2.0 * (shifted @ last) - later + coefficient * eye
        value = shifted @ last - later + coefficients[0] * eye
        value = (value + value.mT) / 2
        # on the interval the polynomial is no larger than this; beyond it, a matrix is indefinite
        inside = frobenius(value.detach()) <= 1.01 * bound * math.sqrt(matrix.shape[-1])
        residual = torch.full_like(norm, error)
        return Solution(value * scale.pow(-exponent)[..., None, None], residual, inside)


def chebyshev_root(
    epsilon: Scalar = 1e-12, *, offset: float = 1e-2, degree: int = 20
) -> ChebyshevRoot:
    """Inverse power (A + offset s I)^(-p) by a Chebyshev polynomial, for any real p.

    With s = min(|A|_F, largest sum of a row of |A|), at least the largest eigenvalue, this is
    s^(-p) (A/s + offset)^(-p): x^(-p) on [offset, 1 + offset] is replaced by its Chebyshev
    series of the given degree, summed by Clenshaw's recurrence in degree - 1 products. The
    coefficients are computed once per exponent, in float64.

    The offset is damping, and a large one: what is approximated is not A^(-p). A small offset
    needs a high degree. For p = 1/4 the relative error is 2e-3 for 1e-2 and degree 20, 6e-2 for
    1e-3 and 20, 1e-4 for 1e-3 and 100. The residual is this error, known beforehand, not
    measured. A matrix whose polynomial exceeds its bound on the interval is not ok: it is
    indefinite.

    Args:
        epsilon: Absolute damping, in the units of the eigenvalues, added to A beforehand.
        offset: Damping relative to s, a Python number.
        degree: Degree of the polynomial, at least 2.

    Raises:
        HyperparameterError: If a number is out of range.

    Source: Clenshaw, Math. Comp. 9, 1955; arXiv 2602.02016.

    Example:
        >>> root = chebyshev_root(epsilon=0.0, offset=0.01, degree=40)
        >>> root(torch.diag(torch.tensor([1.0, 0.0])), exponent=0.5).value.round(decimals=3)
        tensor([[0.9950, 0.0000],
                [0.0000, 9.9990]])
    """
    check_number("epsilon", epsilon)
    check_constant("offset", offset)
    check_number("offset", offset, low_open=True, high_open=True)
    check_count("degree", degree, low=2)
    return ChebyshevRoot(epsilon, offset, degree)


@constant_result
def _chebyshev_series(exponent: float, offset: float, degree: int) -> tuple[float, ...]:
    """Return the coefficients of x^(-p) on [offset, 1 + offset], its maximum, and its error."""
    return _computed_series(exponent, offset, degree)


@functools.lru_cache(maxsize=64)
def _computed_series(exponent: float, offset: float, degree: int) -> tuple[float, ...]:
    nodes = max(4096, 16 * degree)
    angles = [math.pi * (k + 0.5) / nodes for k in range(nodes)]
    values = [((math.cos(angle) + 1) / 2 + offset) ** -exponent for angle in angles]
    grid = torch.tensor(angles, dtype=torch.float64, device="cpu")
    exact = torch.tensor(values, dtype=torch.float64, device="cpu")
    waves = torch.cos(torch.arange(degree + 1, dtype=torch.float64, device="cpu")[:, None] * grid)
    series = waves @ exact * (2.0 / nodes)
    series[0] /= 2
    approximate = series @ waves
    error = (approximate / exact - 1).abs().max()
    # the ends of the interval are no nodes
    ends = torch.stack([series.sum(), (series * (-1.0) ** torch.arange(degree + 1)).sum()])
    bound = torch.maximum(approximate.abs().max(), ends.abs().max())
    return (*series.tolist(), bound.item(), error.item())
