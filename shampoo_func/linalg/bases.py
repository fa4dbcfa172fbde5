"""Eigenbases of symmetric positive semi-definite matrices, batched, from a previous basis."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from shampoo_func.errors import HyperparameterError, check_choice, check_count, check_number
from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg.control import compute_where
from shampoo_func.linalg.diagonal import diagonal, with_diagonal
from shampoo_func.linalg.eigenpairs import eigenpairs
from shampoo_func.linalg.roots import EighRoot, eigh_root
from shampoo_func.linalg.solver import all_finite
from shampoo_func.types import Scalar

__all__ = ["Basis", "BasisSolver", "EighBasis", "QrBasis", "eigh_basis", "off_diagonal", "qr_basis"]


class Basis(NamedTuple):
    """An eigenbasis, exact or estimated.

    values: `[*batch, n]`, the (estimated) eigenvalues. vectors: `[*batch, n, n]`, one in every
    column. order: int64 `[*batch, n]`, the columns of the previous basis in the order in which
    they were taken up. ok: `[*batch]`, whether the matrix could be decomposed.
    """

    values: Tensor
    vectors: Tensor
    order: Tensor
    ok: Tensor


class BasisSolver(ABC):
    """A function from a stack of matrices and their previous bases to bases.

    `damping` says what is added to a matrix before it is decomposed, and how eigenvalues are
    kept positive when a power of them is taken.
    """

    __slots__ = ()

    damping: EighRoot
    tolerance: float

    @abstractmethod
    def solve(self, matrix: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return values, vectors and order for damped, finite matrices."""

    def __call__(
        self, matrix: Float[Tensor, "*batch n n"], previous: Float[Tensor, "*batch n n"]
    ) -> Basis:
        """Return the bases; where `previous` is good to the tolerance, its own estimate."""
        finite = all_finite(matrix)
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        safe = torch.where(finite[..., None, None], matrix, eye) + self.shift * eye
        safe = safe.to(self.damping.compute_dtype or matrix.dtype)
        values, vectors, order = self.solve(safe, previous.to(safe.dtype))
        ok = finite & all_finite(vectors)
        return Basis(values.to(matrix.dtype), vectors.to(matrix.dtype), order, ok)

    def powers(
        self, values: Float[Tensor, "*batch n"], exponent: float
    ) -> Float[Tensor, "*batch n"]:
        """Return `values ** -exponent`, damped; 0 for a direction that is dropped."""
        damping = self.damping
        kept = damping.eigenvalues_kept(values, damping.epsilon, damping.relative_epsilon)
        if damping.pseudo_inverse is None:
            return kept.pow(-exponent)
        positive = kept > 0
        return torch.where(positive, torch.where(positive, kept, 1.0).pow(-exponent), 0.0)

    def root(
        self,
        values: Float[Tensor, "*batch n"],
        vectors: Float[Tensor, "*batch n n"],
        exponent: float,
    ) -> Float[Tensor, "*batch n n"]:
        """Return Q diag(values ** -exponent) Q^T, damped."""
        value = (vectors * self.powers(values, exponent).unsqueeze(-2)) @ vectors.mT
        return (value + value.mT) / 2

    @property
    def follows(self) -> bool:
        """Whether new columns continue old ones, in the order that `Basis.order` tells."""
        return False

    @property
    def epsilon(self) -> Scalar:
        """The absolute damping."""
        return self.damping.epsilon

    @property
    def shift(self) -> Scalar:
        """What is added to the diagonal before the decomposition."""
        return self.damping.epsilon if self.damping.perturb == "before" else 0.0

    def with_tolerance(self, tolerance: float) -> BasisSolver:
        """Return the same solver, for bases that are off by more than `tolerance`."""
        changed: Any = replace(self, tolerance=tolerance)  # type: ignore[type-var]
        return changed


def off_diagonal(estimate: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
    """Return |B - diag B| / |B|, by which a basis is off, B = Q^T A Q; 0 for a zero matrix.

    Source: arXiv 2506.03595, section 5.
    """
    rest = torch.linalg.matrix_norm(with_diagonal(estimate, 0.0))
    return rest / torch.linalg.matrix_norm(estimate).clamp(min=torch.finfo(rest.dtype).tiny)


@dataclass(frozen=True, slots=True)
class EighBasis(BasisSolver):
    """See `eigh_basis`."""

    damping: EighRoot = field(default_factory=eigh_root)
    tolerance: float = 0.0

    def solve(self, matrix: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the exact eigenbasis, in ascending order, where the previous one is off."""
        if self.tolerance == 0.0:
            values, vectors = eigenpairs(matrix)
            return values, vectors, _in_order(values)
        estimate = previous.mT @ matrix @ previous
        stale = off_diagonal(estimate) > self.tolerance
        kept = diagonal(estimate).contiguous()
        values, vectors = compute_where(stale, eigenpairs, (matrix,), (kept, previous))
        return values, vectors, _in_order(values)


@dataclass(frozen=True, slots=True)
class QrBasis(BasisSolver):
    """See `qr_basis`."""

    damping: EighRoot = field(default_factory=eigh_root)
    tolerance: float = 0.0
    iterations: int = 1
    sort: Literal["before", "after", "never"] = "after"
    first: Literal["qr", "eigh"] = "qr"

    @property
    def follows(self) -> bool:
        """Columns are those of the previous basis, turned a little."""
        return True

    def solve(self, matrix: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the basis after a few iterations from the previous one."""
        values, vectors, order = self._iterate(matrix, previous)
        if self.first == "eigh":
            eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
            fresh = (previous == eye).all(-1).all(-1)
            values, vectors = compute_where(fresh, self._begin, (matrix,), (values, vectors))
        return values.contiguous(), vectors.contiguous(), order

    def _begin(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigenpairs(matrix)
        return (values.flip(-1), vectors.flip(-1)) if self.sort == "before" else (values, vectors)

    def _iterate(self, matrix: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vectors, order = previous, _in_order(previous[..., 0, :])
        estimate = vectors.mT @ matrix @ vectors
        if self.sort == "before":
            _, order = diagonal(estimate).sort(stable=True, descending=True)
            vectors = _columns(vectors, order)
            estimate = vectors.mT @ matrix @ vectors
        for _ in range(self.iterations):
            if self.tolerance == 0.0:
                estimate, vectors = _turned(estimate, vectors)
            else:
                stale = off_diagonal(estimate) > self.tolerance
                estimate, vectors = compute_where(
                    stale, _turned, (estimate, vectors), (estimate, vectors)
                )
        values = diagonal(estimate)
        if self.sort == "after":
            values, order = values.sort(stable=True)
            vectors = _columns(vectors, order)
        return values, vectors, order


def _turned(estimate: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q^T A Q and Q after one iteration of the QR algorithm."""
    turn, triangle = torch.linalg.qr(estimate)
    return triangle @ turn, vectors @ turn


def _in_order(values: Tensor) -> Tensor:
    """Return the order that changes nothing, `[*batch, n]`."""
    return torch.arange(values.shape[-1], device=values.device).expand(values.shape).contiguous()


def _columns(matrix: Tensor, order: Tensor) -> Tensor:
    """Return the columns of every matrix in a new order."""
    return matrix.gather(-1, order.unsqueeze(-2).expand(matrix.shape))


def eigh_basis(
    epsilon: Scalar = 1e-12, *, tolerance: float = 0.0, damping: EighRoot | None = None
) -> EighBasis:
    """Eigenbasis by eigendecomposition, in ascending order of the eigenvalues.

    Args:
        epsilon: Absolute damping, see `eigh_root`.
        tolerance: Keep a previous basis Q while |B - diag B| <= tolerance |B|, B = Q^T A Q, and
            take diag B for its eigenvalues; 0 decomposes always. Each matrix is judged apart.
        damping: An `eigh_root` with more settings, in the place of `epsilon`.

    Raises:
        HyperparameterError: If a number is out of range.

    Source: arXiv 2506.03595, section 5 (tolerance).

    Example:
        >>> basis = eigh_basis(0.0)(torch.diag(torch.tensor([4.0, 1.0])), torch.eye(2))
        >>> basis.values
        tensor([1., 4.])
    """
    check_number("tolerance", tolerance, high=1.0)
    return EighBasis(_checked(epsilon, damping), tolerance)


def qr_basis(
    epsilon: Scalar = 1e-12,
    *,
    iterations: int = 1,
    tolerance: float = 0.0,
    sort: Literal["before", "after", "never"] = "after",
    first: Literal["qr", "eigh"] = "qr",
    damping: EighRoot | None = None,
) -> QrBasis:
    """Eigenbasis by the QR algorithm, started from the previous basis: Q <- Q qr(Q^T A Q).

    One iteration equals one of orthogonal iteration, Q <- qr(A Q), to the signs of columns.

    Args:
        epsilon: Absolute damping, see `eigh_root`.
        iterations: How many, at most.
        tolerance: Stop, and do not even begin, where |B - diag B| <= tolerance |B|.
        sort: Sort the columns by their estimated eigenvalues "after" the iterations, ascending;
            "before" them, descending (as SOAP does); or "never".
        first: Whether the first basis, where the previous one is the identity, is found in the
            same way, by "qr", or by "eigh".
        damping: An `eigh_root` with more settings, in the place of `epsilon`.

    Raises:
        HyperparameterError: If a number is out of range.

    Source: arXiv 2409.11321, algorithm 4 (SOAP); arXiv 2506.03595, algorithm 2.

    Example:
        >>> matrix = torch.tensor([[2.0, 0.1], [0.1, 1.0]])
        >>> qr_basis(0.0, iterations=5)(matrix, torch.eye(2)).values
        tensor([0.9901, 2.0099])
    """
    check_count("iterations", iterations)
    check_number("tolerance", tolerance, high=1.0)
    check_choice("sort", sort, ("before", "after", "never"))
    check_choice("first", first, ("qr", "eigh"))
    return QrBasis(_checked(epsilon, damping), tolerance, iterations, sort, first)


def _checked(epsilon: Scalar, damping: EighRoot | None) -> EighRoot:
    if damping is None:
        return eigh_root(epsilon)
    if not isinstance(damping, EighRoot):
        raise HyperparameterError(f"damping must be an eigh_root(...), got {damping!r}.")
    return damping
