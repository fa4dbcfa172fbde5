"""The polar factor U V^T of a matrix U S V^T, batched: by SVD and by Newton-Schulz iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo_func.errors import (
    HyperparameterError,
    check_choice,
    check_count,
    check_dtype,
    check_number,
)
from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg._svd_polar import exact_polar
from shampoo_func.linalg.polar_coefficients import (
    POLAR_SETS,
    Coefficients,
    check_stages,
    polar_express_coefficients,
    with_safety,
)
from shampoo_func.linalg.scaling import compute_dtype as at_least_float32

__all__ = [
    "NewtonSchulzPolar",
    "PolarMethod",
    "SvdPolar",
    "newton_schulz_polar",
    "normalized",
    "polar_express",
    "svd_polar",
]

PolarMethod = Callable[[Tensor], Tensor]
"""A function from matrices `[*batch, m, n]` to their polar factors, of the same shape."""


def normalized(
    matrix: Float[Tensor, "*batch m n"], epsilon: float = 1e-8
) -> Float[Tensor, "*batch m n"]:
    """Return every matrix divided by max(its Frobenius norm, epsilon).

    Neither overflows nor underflows on the way, whatever the scale; zero stays zero. A matrix
    with an element that is not finite becomes NaN altogether.

    Args:
        matrix: `[*batch, m, n]`, of float32 or float64.
        epsilon: Smallest norm that is divided by; 0 for none.

    Example:
        >>> normalized(torch.tensor([[3e30, 4e30]]))
        tensor([[0.6000, 0.8000]])
    """
    if matrix.numel() == 0:
        return matrix
    balanced, peak = _balanced(matrix)
    squares = balanced.square().sum((-2, -1), keepdim=True)
    # the derivative of a root at 0 is infinite; the clamp changes no other value
    norm = squares.clamp(min=torch.finfo(matrix.dtype).tiny).sqrt()
    unit = balanced / norm
    return unit * (peak * norm / epsilon).clamp(max=1.0) if epsilon else unit


def _balanced(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrix with a largest element of 1, and the former largest, a constant."""
    peak = matrix.detach().abs().amax((-2, -1), keepdim=True)
    peak = torch.where(peak > 0, peak, 1.0)
    return matrix / peak, peak


@dataclass(frozen=True, slots=True)
class NewtonSchulzPolar:
    """See `newton_schulz_polar`."""

    stages: Coefficients
    epsilon: float = 1e-8
    compute_dtype: torch.dtype | None = None

    def __call__(self, matrix: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        """Return approximate polar factors in the dtype of `matrix`."""
        if matrix.numel() == 0:
            return matrix
        dtype = self.compute_dtype or at_least_float32(matrix.dtype)
        rows, columns = matrix.shape[-2:]
        x = normalized(matrix.to(at_least_float32(matrix.dtype)), self.epsilon).to(dtype)
        x = x.reshape(-1, rows, columns)
        for a, b, c in self.stages:
            # on the side that is shorter: (X X^T) X or X (X^T X)
            gram = x @ x.mT if rows < columns else x.mT @ x
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else b * gram
            left, right = (factor, x) if rows < columns else (x, factor)
            x = torch.baddbmm(x, left, right, beta=a)
        return x.reshape(matrix.shape).to(matrix.dtype)


@dataclass(frozen=True, slots=True)
class SvdPolar:
    """See `svd_polar`."""

    scale_by_nuclear_norm: bool = False
    relative_tolerance: float | None = None
    compute_dtype: torch.dtype | None = None

    def __call__(self, matrix: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        """Return polar factors in the dtype of `matrix`."""
        if matrix.numel() == 0:
            return matrix
        wide = matrix.to(self.compute_dtype or at_least_float32(matrix.dtype))
        tolerance = self.relative_tolerance
        if tolerance is None:
            tolerance = max(matrix.shape[-2:]) * torch.finfo(wide.dtype).eps
        factor = exact_polar(_balanced(wide)[0], tolerance)
        if self.scale_by_nuclear_norm:
            factor = factor * (factor * wide).sum((-2, -1), keepdim=True)
        return factor.to(matrix.dtype)


def newton_schulz_polar(
    iterations: int | None = None,
    coefficients: str | tuple[float, float, float] | Sequence[tuple[float, float, float]] = "muon",
    *,
    safety: float | None = None,
    epsilon: float = 1e-8,
    compute_dtype: torch.dtype | None = None,
) -> NewtonSchulzPolar:
    """Approximate polar factors by matrix products only, as Muon does.

    X <- G / max(|G|_F, epsilon), then for every stage X <- a X + b (X X^T) X + c (X X^T)^2 X. This
    keeps the singular vectors and drives the singular values towards 1, as far as the
    coefficients do. Sets, and where they take singular values from [0.01, 1] and [0.001, 1] of
    the norm:

        "muon"            5 stages   [0.68, 1.13]    [0.47, 1.20]
        "quintic"         5          [0.98, 1.03]    [0.47, 1.15]
        "polar_express"   8          [1.00, 1.00]    [1.00, 1.00]
        "dion"            5          [0.86, 1.14]    [0.86, 1.14]
        "cans"            5          [0.87, 1.11]    [0.86, 1.11]
        "turbo"           4          [0.94, 1.05]    [0.15, 1.05]
        "cubic"           5          [0.77, 1.30]    [0.11, 1.30]  two products, not three
        "deepseek"       10          [1.00, 1.00]    [1.00, 1.00]
        "modula"          6          [1.00, 1.00]    [0.87, 1.00]

    A zero matrix gives zero; one with an element that is not finite gives NaN altogether.

    Args:
        iterations: Number of stages; as many as the set has, 5 for a single triple. Fewer take
            the first ones, more repeat the last.
        coefficients: A set by name, one triple (a, b, c) for all stages, or one per stage.
        safety: Shrink singular values by this before all stages but the last; 1.01 for
            "polar_express", "cans" and "cubic", which without it diverge (or flip the sign)
            where rounding lifts a singular value to 1.001, and 1 for all others.
        epsilon: Smallest norm that is divided by; 0 for none.
        compute_dtype: dtype of the iteration; None for the matrix's own and at least float32.
            bfloat16 is what most training runs use on a GPU.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range, or the coefficients
            take a singular value in (0, 1] to a negative or large one.

    Source: Jordan et al., "Muon" (2024); arXiv 2409.20325, appendix A.

    Example:
        >>> method = newton_schulz_polar(coefficients="polar_express")
        >>> method(torch.tensor([[3.0, 4.0], [-4.0, 3.0]]))
        tensor([[ 0.6000,  0.8000],
                [-0.8000,  0.6000]])
    """
    if isinstance(coefficients, str):
        check_choice("coefficients", coefficients, POLAR_SETS)
        stages, own_safety = POLAR_SETS[coefficients]
    else:
        stages, own_safety = _as_stages(coefficients), 1.0
    if iterations is not None:
        check_count("iterations", iterations)
        stages = stages[:iterations] + stages[-1:] * (iterations - len(stages))
    elif not isinstance(coefficients, str) and len(stages) == 1:
        stages = stages * 5
    return _newton_schulz(stages, own_safety if safety is None else safety, epsilon, compute_dtype)


def polar_express(
    iterations: int = 5,
    *,
    lower: float = 1e-3,
    safety: float = 1.01,
    epsilon: float = 1e-8,
    compute_dtype: torch.dtype | None = None,
) -> NewtonSchulzPolar:
    """Newton-Schulz polar factors with the best coefficients for an interval (Polar Express).

    The stages are computed for this many iterations and singular values in [lower, 1] of the
    norm. The error of the best polynomials is at most |1 - lower^2|^(3^iterations); with
    `lower=1e-3`, 5 iterations leave [0.86, 1.13] and 8 leave 1 to rounding.

    Args:
        iterations: Number of stages.
        lower: Smallest singular value, relative to the norm, that is to become 1; in (0, 1].
        safety: Shrink singular values by this before all stages but the last.
        epsilon: Smallest norm that is divided by; 0 for none.
        compute_dtype: dtype of the iteration; None for the matrix's own and at least float32.

    Raises:
        HyperparameterError: If a number is out of range.

    Source: arXiv 2505.16932, algorithm 1 and section 3.3.

    Example:
        >>> polar_express(8)(torch.tensor([[3.0, 4.0], [-4.0, 3.0]]))
        tensor([[ 0.6000,  0.8000],
                [-0.8000,  0.6000]])
    """
    stages = polar_express_coefficients(iterations, lower=lower)
    return _newton_schulz(stages, safety, epsilon, compute_dtype)


def _newton_schulz(
    stages: Coefficients, safety: float, epsilon: float, compute_dtype: torch.dtype | None
) -> NewtonSchulzPolar:
    """Check what all Newton-Schulz methods have in common, and make one."""
    _check_float("safety", safety, 1.0)
    _check_float("epsilon", epsilon, 0.0)
    check_dtype("compute_dtype", compute_dtype)
    stages = with_safety(stages, safety)
    check_stages(stages)
    return NewtonSchulzPolar(stages, epsilon, compute_dtype)


def _check_float(name: str, value: Any, low: float) -> None:
    """Check a number that a tensor cannot stand for: it is used on the host."""
    if isinstance(value, Tensor):
        raise HyperparameterError(f"{name} must be a Python number, got {value!r}.")
    check_number(name, value, low=low, high=1e6)


def _as_stages(coefficients: Any) -> Coefficients:
    """Return one or more triples of numbers as a tuple of tuples of floats."""
    stages = coefficients
    if isinstance(stages, Sequence) and stages and not isinstance(stages[0], Sequence):
        stages = (stages,)
    fits = isinstance(stages, Sequence) and len(stages) > 0
    if not fits or any(not isinstance(s, Sequence) or len(s) != 3 for s in stages):
        raise HyperparameterError(
            "coefficients must be the name of a set, a triple (a, b, c) or a sequence of such "
            f"triples, got {coefficients!r}; the sets are {', '.join(POLAR_SETS)}."
        )
    for stage in stages:
        for value in stage:
            _check_float("coefficients", value, -1e6)
    return tuple((float(a), float(b), float(c)) for a, b, c in stages)


def svd_polar(
    *,
    scale_by_nuclear_norm: bool = False,
    relative_tolerance: float | None = None,
    compute_dtype: torch.dtype | None = None,
) -> SvdPolar:
    """Exact polar factors by singular value decomposition: U S V^T gives U V^T.

    Directions whose singular value is at or below the tolerance contribute nothing, so that a
    matrix of low rank gives the partial isometry U_r V_r^T and zero gives zero; the vectors
    that a decomposition returns there are arbitrary. A matrix with an element that is not
    finite gives NaN altogether and never raises. The derivative is that of the polar factor,
    finite where singular values repeat; what the tolerance drops counts as a constant.

    Args:
        scale_by_nuclear_norm: Whether to multiply by the sum of the singular values, which
            makes the result the direction of steepest descent in the spectral norm with its
            length.
        relative_tolerance: Cutoff relative to the largest singular value; None for max(m, n)
            times the machine precision.
        compute_dtype: float32 or float64; None for the matrix's own and at least float32.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Source: arXiv 2409.20325, section 3; Higham, Functions of Matrices, chapter 8.

    Example:
        >>> svd_polar()(torch.tensor([[1.8, 2.4], [2.4, 3.2]]))
        tensor([[0.3600, 0.4800],
                [0.4800, 0.6400]])
    """
    if relative_tolerance is not None:
        check_number("relative_tolerance", relative_tolerance, high=1.0)
    check_choice("compute_dtype", compute_dtype, (None, torch.float32, torch.float64))
    return SvdPolar(bool(scale_by_nuclear_norm), relative_tolerance, compute_dtype)
