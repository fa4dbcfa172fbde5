"""Shampoo that keeps eigenbases and eigenvalues of its factors, not only their roots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import HyperparameterError, check_choice, check_dtype
from shampoo_func.preconditioners.factors import (
    Factors,
    Sides,
    block_shape,
    counted,
    factors_of,
    preconditioned,
)
from shampoo_func.preconditioners.rotation import (
    checked_basis,
    eye_bases,
    refreshed_bases,
    rotated,
    rotated_back,
    scaled_along,
    transposed,
)
from shampoo_func.types import Preconditioner, Scalar, named_roles

__all__ = ["Eigendecomposed", "EigendecomposedState", "EigenvalueUpdate", "eigendecomposed"]

EigenvalueUpdate = Literal["refresh", "every_step", "ema"]


class EigendecomposedState(NamedTuple):
    """Statistics, eigenbases and eigenvalues of a stack of order-k blocks.

    step: int64 `[n]`. factors, bases: k tensors `[n, d, d]`, eigenvectors in the columns.
    eigenvalues: k tensors `[n, d]`. roots: k tensors `[n, d, d]`, what is applied, if the
    eigenvalues change with the bases only, else `[n, 0, 0]`. started: bool `[n]`, whether a
    block was ever refreshed. failures, failures_in_a_row: int64 `[n]`, as in `kronecker`.
    """

    step: Tensor
    factors: tuple[Tensor, ...]
    bases: tuple[Tensor, ...]
    eigenvalues: tuple[Tensor, ...]
    roots: tuple[Tensor, ...]
    started: Tensor
    failures: Tensor
    failures_in_a_row: Tensor


@dataclass(frozen=True, slots=True)
class Eigendecomposed(Preconditioner):
    """See `eigendecomposed`."""

    factors: Factors = field(default_factory=Factors)
    basis: linalg.BasisSolver = field(default_factory=linalg.eigh_basis)
    kl: bool = False
    eigenvalues: EigenvalueUpdate = "refresh"
    basis_dtype: torch.dtype | None = None

    def init(self, block: Tensor) -> EigendecomposedState:
        """Return zero factors, identity bases, eigenvalues of one, and the roots of those."""
        factors = self.factors.init(block)
        bases = eye_bases(factors, self.basis_dtype)
        eigenvalues = tuple(basis.new_ones(basis.shape[:-1]) for basis in bases)
        roots = [basis.new_zeros((0, 0)) for basis in bases]
        if self.eigenvalues == "refresh":
            for dim in preconditioned(factors):
                exponent = self.factors.exponent(len(bases), dim)
                roots[dim] = self.basis.root(eigenvalues[dim], bases[dim], exponent)
        zero = torch.zeros((), dtype=torch.int64, device=block.device)
        return EigendecomposedState(
            step=zero,
            factors=factors,
            bases=bases,
            eigenvalues=eigenvalues,
            roots=tuple(roots),
            started=torch.zeros((), dtype=torch.bool, device=block.device),
            failures=zero.clone(),
            failures_in_a_row=zero.clone(),
        )

    def accumulate(self, state: EigendecomposedState, grads: Tensor) -> EigendecomposedState:
        """Add the gradient's Gram matrices to the factors."""

        def whiten(blocks: Tensor, dim: int) -> Tensor:
            order = len(state.factors)
            if self.eigenvalues == "refresh":
                return linalg.multiply(blocks, state.roots[dim].to(blocks.dtype), dim, order)
            # a Gram matrix does not change when another dimension is rotated, so none is undone
            basis = transposed(state.bases[dim]).to(blocks.dtype)
            turned = linalg.multiply(blocks, basis, dim, order)
            return scaled_along(turned, self._powers(state, dim), dim, order)

        factors = self.factors.accumulate(state.factors, grads, whiten if self.kl else None)
        values = state.eigenvalues
        if self.eigenvalues == "ema":
            values = self._re_estimated(state, lambda dim: self._averaged(state, grads, dim))
        return state._replace(step=state.step + 1, factors=factors, eigenvalues=values)

    def refresh(self, state: EigendecomposedState) -> EigendecomposedState:
        """Decompose the factors; keep a basis where that cannot be had."""
        bases, found, failed = refreshed_bases(self.basis, self.factors, state)
        eigenvalues, roots = list(state.eigenvalues), list(state.roots)
        for dim in preconditioned(state.factors):
            new = found[dim].values.to(eigenvalues[dim].dtype)
            if self.eigenvalues == "ema" and self.basis.follows:
                carried = eigenvalues[dim].gather(-1, found[dim].order)
                new = linalg.choose(state.started, carried, new)
            ok = found[dim].ok
            eigenvalues[dim] = linalg.choose(ok, new, eigenvalues[dim])
            if self.eigenvalues == "refresh":
                exponent = self.factors.exponent(len(bases), dim)
                root = self.basis.root(eigenvalues[dim], bases[dim], exponent)
                roots[dim] = linalg.choose(ok, root, roots[dim])
        failures, in_a_row = counted(state.failures, state.failures_in_a_row, failed)
        return EigendecomposedState(
            step=state.step,
            factors=state.factors,
            bases=bases,
            eigenvalues=tuple(eigenvalues),
            roots=tuple(roots),
            started=torch.ones_like(state.started),
            failures=failures,
            failures_in_a_row=in_a_row,
        )

    def correct(self, state: EigendecomposedState, grads: Tensor) -> EigendecomposedState:
        """Re-estimate the eigenvalues in the bases, if they are to change at every step."""
        if self.eigenvalues != "every_step":
            return state
        values = self._re_estimated(state, lambda dim: self._rayleigh(state, dim))
        return state._replace(eigenvalues=values)

    def _re_estimated(
        self, state: EigendecomposedState, estimate: Callable[[int], Tensor]
    ) -> tuple[Tensor, ...]:
        """Return new eigenvalues of every factor, for the blocks that have been refreshed."""
        values = list(state.eigenvalues)
        for dim in preconditioned(state.factors):
            new = estimate(dim).to(values[dim].dtype)
            values[dim] = linalg.choose(state.started, new, values[dim])
        return tuple(values)

    def _rayleigh(self, state: EigendecomposedState, dim: int) -> Tensor:
        """Return diag(Q^T F Q) of one factor."""
        basis = state.bases[dim]
        factor = self.factors.corrected(state.factors[dim], state.step, self.basis.epsilon)
        values = ((factor.to(basis.dtype) @ basis) * basis).sum(-2)
        return values + linalg.align(self.basis.shift, values)

    def _averaged(self, state: EigendecomposedState, grads: Tensor, dim: int) -> Tensor:
        """Return the moving average of diag(Q^T G G^T Q) for one factor."""
        order = len(state.factors)
        turned = rotated(state.bases, grads)
        if self.kl:
            for other in preconditioned(state.factors):
                if other != dim:
                    turned = scaled_along(turned, self._powers(state, other), other, order)
        new = linalg.mode_norms(turned, dim, order)
        if self.factors.normalize:
            new = new * (new.shape[-1] / self.factors.size(state.factors, grads))
        return linalg.ema(state.eigenvalues[dim], new, self.factors.beta2)

    def apply(self, state: EigendecomposedState, updates: Tensor) -> Tensor:
        """Multiply by the roots: cached ones, or by way of the eigenbases."""
        order = len(state.factors)
        if self.eigenvalues == "refresh":
            result = updates
            for dim in preconditioned(state.factors):
                root = state.roots[dim]
                result = linalg.multiply(result.to(root.dtype), root, dim, order)
        else:
            result = rotated(state.bases, updates)
            for dim in preconditioned(state.factors):
                result = scaled_along(result, self._powers(state, dim), dim, order)
            result = rotated_back(state.bases, result)
        return linalg.with_layout_of(result.to(updates.dtype), updates)

    def _powers(self, state: EigendecomposedState, dim: int) -> Tensor:
        exponent = self.factors.exponent(len(state.factors), dim)
        return self.basis.powers(state.eigenvalues[dim], exponent)

    def block_shape(self, state: EigendecomposedState) -> tuple[int | None, ...]:
        """Return the sizes of the factors; None for a dimension that has none."""
        return block_shape(state.step, state.factors)

    def roles(self, state: EigendecomposedState) -> EigendecomposedState:
        """Return what every leaf is."""
        named: EigendecomposedState = named_roles(
            state,
            {"factors": "factor", "bases": "basis", "eigenvalues": "eigenvalues", "roots": "root"},
        )
        return named

    def reads(self, function: str) -> frozenset[str]:
        """Return what is read: a direction needs no factors, and plain factors no bases."""
        caches = self.eigenvalues == "refresh"
        applied = {"root"} if caches else {"basis", "eigenvalues"}
        read = {
            "accumulate": {"factor"} | (applied if self.kl or self.eigenvalues == "ema" else set()),
            "refresh": {"factor", "basis", "eigenvalues", "root"},
            "correct": {"factor", "basis", "eigenvalues"} if not caches else set(),
            "apply": applied,
        }
        return frozenset(read.get(function, ()))

    def with_tolerance(self, tolerance: float) -> Eigendecomposed:
        """Return the same preconditioner, for bases that are off by more."""
        return replace(self, basis=self.basis.with_tolerance(tolerance))


def eigendecomposed(
    beta2: Scalar = 1.0,
    *,
    basis: linalg.BasisSolver | None = None,
    eigenvalues: EigenvalueUpdate = "refresh",
    kl: bool = False,
    normalize: bool = False,
    bias_correction: bool = True,
    exponents: Mapping[int, float | Mapping[int, float]] | None = None,
    sides: Sides = "all",
    max_dim: int | None = None,
    trace_scaling: float | None = None,
    drop_weighting: bool = False,
    factor_dtype: torch.dtype | None = None,
    basis_dtype: torch.dtype | None = None,
    product_dtype: torch.dtype | None = None,
) -> Eigendecomposed:
    """Shampoo with its factors kept as eigenbases Q and eigenvalues l: F = Q diag(l) Q^T.

    The direction is that of `kronecker`, G x_1 F_1^(-p) ... x_k F_k^(-p). What the bases allow
    more: to skip those that are still good (`adaptive`), to improve them by a QR step
    (`qr_basis`), and to re-estimate the eigenvalues between refreshes:

        "refresh"     l changes with Q; F^(-p) is computed once, at the refresh
        "every_step"  l = diag(Q^T F Q) at every step (per-factor eigenvalue correction)
        "ema"         l <- beta2 l + (1 - beta2) diag(Q^T G G^T Q) at every step; it goes on
                      over a refresh by `qr_basis`, and starts anew after an `eigh_basis`

    Args:
        beta2: Decay of the factors, see `kronecker`.
        basis: Solver of the eigenbases; `eigh_basis()` if not given.
        eigenvalues: When the eigenvalues are estimated.
        kl: Whether gradients are whitened along the other dimensions, see `kronecker`.
        normalize: Whether Gram matrices are divided by the elements summed, see `kronecker`.
        bias_correction: Whether F / (1 - beta2^t) is decomposed.
        exponents: p by order and dimension, see `kronecker`.
        sides: Which dimensions are preconditioned, see `kronecker`.
        max_dim: Dimensions larger than this are left unpreconditioned.
        trace_scaling: See `kronecker`.
        drop_weighting: See `kronecker`.
        factor_dtype: dtype of the factors.
        basis_dtype: dtype of bases, eigenvalues and roots, float32 or float64; as the factors,
            and at least float32, if not given.
        product_dtype: dtype of the products of gradients.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Source: arXiv 2506.03595, section 4; arXiv 2509.03378, algorithm 1 ("ema", with `kl` and
    `normalize`).

    Example:
        >>> tx = eigendecomposed(beta2=1.0)
        >>> state = tx.init(torch.zeros(2, 3))
        >>> state = tx.refresh(tx.accumulate(state, torch.tensor([[4.0, 0, 0], [0, 9.0, 0]])))
        >>> state.eigenvalues[0]
        tensor([16., 81.])
    """
    check_choice("eigenvalues", eigenvalues, ("refresh", "every_step", "ema"))
    check_dtype("basis_dtype", basis_dtype)
    factors = factors_of(
        beta2,
        bias_correction=bias_correction,
        exponents=exponents,
        sides=sides,
        max_dim=max_dim,
        trace_scaling=trace_scaling,
        normalize=normalize,
        drop_weighting=drop_weighting,
        dtype=factor_dtype,
        product_dtype=product_dtype,
    )
    if eigenvalues == "ema" and not factors.averages:
        raise HyperparameterError(
            f'eigenvalues="ema" needs a beta2 below 1 and no drop_weighting, got beta2={beta2!r} '
            f'and drop_weighting={drop_weighting}; use eigenvalues="every_step" with sums.'
        )
    return Eigendecomposed(factors, checked_basis(basis), kl, eigenvalues, basis_dtype)
