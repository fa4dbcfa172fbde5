"""Another preconditioner run in the eigenbasis of Kronecker factors: SOAP and its kin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import (
    HyperparameterError,
    check_choice,
    check_dtype,
    check_number,
)
from shampoo_func.preconditioners.eigenbasis_state import InEigenbasisState, RotatedMomentum
from shampoo_func.preconditioners.factors import (
    Factors,
    Sides,
    block_shape,
    counted,
    factors_of,
    ignored,
    preconditioned,
)
from shampoo_func.preconditioners.rotation import (
    check_permutable,
    checked_basis,
    eye_bases,
    permuted,
    refreshed_bases,
    rotated,
    rotated_back,
    scaled_along,
    transposed,
    where_started,
)
from shampoo_func.types import Preconditioner, Scalar, named_roles

__all__ = ["InEigenbasis", "KlForm", "in_eigenbasis"]

KlForm = Literal["paper", "reference"]


@dataclass(frozen=True, slots=True)
class InEigenbasis(Preconditioner):
    """See `in_eigenbasis`."""

    inner: Preconditioner
    factors: Factors
    basis: linalg.BasisSolver
    kl: KlForm | None = None
    carry: Literal["keep", "permute"] = "keep"
    momentum: Scalar | None = None
    before_start: Literal["identity", "skip"] = "identity"
    basis_dtype: torch.dtype | None = None

    def init(self, block: Tensor) -> InEigenbasisState:
        """Return zero factors, identity bases, and the inner state."""
        factors = self.factors.init(block)
        bases = eye_bases(factors, self.basis_dtype)
        ones = tuple(basis.new_ones(basis.shape[:-1]) for basis in bases)
        zero = torch.zeros((), dtype=torch.int64, device=block.device)
        mean = torch.zeros_like(block, memory_format=torch.contiguous_format)
        inner = self.inner.init(block)
        if self.carry == "permute":
            check_permutable(self.inner.roles(inner))
        return InEigenbasisState(
            step=zero,
            factors=factors,
            bases=bases,
            eigenvalues=ones if self.kl else (),
            inner=inner,
            momentum=() if self.momentum is None else (RotatedMomentum(zero.clone(), mean),),
            started=torch.zeros((), dtype=torch.bool, device=block.device),
            failures=zero.clone(),
            failures_in_a_row=zero.clone(),
        )

    def accumulate(self, state: InEigenbasisState, grads: Tensor) -> InEigenbasisState:
        """Add the gradient's Gram matrices to the factors."""
        order = len(state.factors)

        def whiten(blocks: Tensor, dim: int) -> Tensor:
            basis = transposed(state.bases[dim]).to(blocks.dtype)
            turned = linalg.multiply(blocks, basis, dim, order)
            exponent = 0.5 if self.kl == "paper" else 1 / (2 * order)
            powers = self.basis.powers(state.eigenvalues[dim], exponent)
            return scaled_along(turned, powers, dim, order)

        factors = self.factors.accumulate(state.factors, grads, whiten if self.kl else None)
        return state._replace(step=state.step + 1, factors=factors)

    def refresh(self, state: InEigenbasisState) -> InEigenbasisState:
        """Find new bases, and carry over what is kept in the old ones."""
        bases, found, failed = refreshed_bases(self.basis, self.factors, state)
        eigenvalues = list(state.eigenvalues)
        for dim in preconditioned(state.factors) if self.kl else ():
            new = found[dim].values.to(eigenvalues[dim].dtype)
            eigenvalues[dim] = linalg.choose(found[dim].ok, new, eigenvalues[dim])
        failures, in_a_row = counted(state.failures, state.failures_in_a_row, failed)
        inner = state.inner
        if self.inner.refreshes:
            inner = self.inner.refresh(inner)
        if self.carry == "permute":
            orders = {dim: one.order for dim, one in found.items()}
            inner = permuted(inner, self.inner.roles(inner), orders, failed)
        return InEigenbasisState(
            step=state.step,
            factors=state.factors,
            bases=bases,
            eigenvalues=tuple(eigenvalues),
            inner=inner,
            momentum=tuple(
                own._replace(mean=self._rebased(own.mean, state.bases, bases))
                for own in state.momentum
            ),
            started=torch.ones_like(state.started),
            failures=failures,
            failures_in_a_row=in_a_row,
        )

    def _rebased(self, mean: Tensor, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> Tensor:
        """Return what is kept in one basis in another; in turn, so that nothing is lost."""
        return rotated(new, rotated_back(old, mean)).to(mean.dtype)

    def correct(self, state: InEigenbasisState, grads: Tensor) -> InEigenbasisState:
        """Feed the inner preconditioner, and the momentum, the gradient in the basis."""
        turned = rotated(state.bases, grads).to(grads.dtype)
        inner = self.inner.correct(self.inner.accumulate(state.inner, turned), turned)
        momentum = tuple(self._averaged(own, turned) for own in state.momentum)
        if self.before_start == "skip":
            inner = where_started(state.started, inner, state.inner)
            momentum = where_started(state.started, momentum, state.momentum)
        return state._replace(inner=inner, momentum=momentum)

    def _averaged(self, momentum: RotatedMomentum, turned: Tensor) -> RotatedMomentum:
        decay: Any = self.momentum
        return RotatedMomentum(momentum.step + 1, linalg.ema(momentum.mean, turned, decay))

    def apply(self, state: InEigenbasisState, updates: Tensor) -> Tensor:
        """Rotate the update (or take the momentum), precondition it there, rotate it back."""
        if state.momentum:
            step, mean = state.momentum[0]
            decay: Any = self.momentum
            turned = mean / linalg.bias_correction(decay, step.clamp(min=1), mean)
        else:
            turned = rotated(state.bases, updates)
        result = rotated_back(state.bases, self.inner.apply(state.inner, turned))
        result = linalg.with_layout_of(result.to(updates.dtype), updates)
        if self.before_start == "skip":
            result = where_started(state.started, result, torch.zeros_like(result))
        return result

    def block_shape(self, state: InEigenbasisState) -> tuple[int | None, ...]:
        """Return the sizes of the factors; the inner preconditioner's where it knows more."""
        inner = self.inner.block_shape(state.inner)
        return block_shape(state.step, state.factors) if inner is None else inner

    def roles(self, state: InEigenbasisState) -> InEigenbasisState:
        """Return what every leaf is."""
        named: InEigenbasisState = named_roles(
            state,
            {
                "factors": "factor",
                "bases": "basis",
                "eigenvalues": "eigenvalues",
                "momentum": "momentum",
            },
        )
        return named._replace(inner=self.inner.roles(state.inner))

    def reads(self, function: str) -> frozenset[str] | None:
        """Return what is read: a direction needs no factors, and plain factors no bases."""
        inner = [self.inner.reads(function)]
        if function == "correct":
            inner.append(self.inner.reads("accumulate"))
        if function == "accumulate":
            own = {"factor", "basis", "eigenvalues"} if self.kl else {"factor"}
            return frozenset(own)
        if any(part is None for part in inner):
            return None
        own = {"basis", "momentum"}
        if function == "refresh":
            own |= {"factor", "eigenvalues"}
            own |= {"second_moment"} if self.carry == "permute" else set()
        return frozenset(own).union(*(part for part in inner if part is not None))

    def with_tolerance(self, tolerance: float) -> InEigenbasis:
        """Return the same preconditioner, for bases that are off by more."""
        return replace(self, basis=self.basis.with_tolerance(tolerance))


def in_eigenbasis(
    inner: Preconditioner,
    *,
    beta2: Scalar = 0.95,
    basis: linalg.BasisSolver | None = None,
    kl: KlForm | None = None,
    carry: Literal["keep", "permute"] = "keep",
    momentum: Scalar | None = None,
    before_start: Literal["identity", "skip"] = "identity",
    ignore: Mapping[int, Sequence[int]] | None = None,
    sides: Sides = "all",
    max_dim: int | None = None,
    trace_scaling: float | None = None,
    bias_correction: bool = True,
    drop_weighting: bool = False,
    factor_dtype: torch.dtype | None = None,
    basis_dtype: torch.dtype | None = None,
    product_dtype: torch.dtype | None = None,
) -> InEigenbasis:
    """Run a preconditioner in the eigenbasis of Shampoo's factors.

    With F_i = Q_i diag(l_i) Q_i^T the factors of `kronecker`, gradients are rotated,
    G' = G x_1 Q_1^T ... x_k Q_k^T, `inner` takes in G' and is applied to the rotated update,
    and the result is rotated back. `second_moment` gives eigenvalue-corrected Shampoo, and
    SOAP: U = Q_1 [M' / (sqrt(V') + epsilon)] Q_2^T. `inner` sees the gradient after the refresh,
    so in the newest basis.

    Args:
        inner: What is run in the basis, `second_moment(...)` or `sign_preconditioner()` for
            instance.
        beta2: Decay of the factors; the number 1 means a sum.
        basis: Solver of the eigenbases; `eigh_basis()` if not given, `qr_basis()` for SOAP's.
        kl: Whether factors are KL-Shampoo's, with the eigenvalues of the latest refresh: "paper",
            F_1 <- beta2 F_1 + (1 - beta2) / d_2 G F_2^(-1) G^T and so for every dimension (arXiv
            2509.03378); or "reference", with F_2^(-1/2) and without 1 / d_2 for a matrix, as in
            Distributed Shampoo's `kronecker(kl=True)`.
        carry: What happens to `inner`'s second moments when the basis changes: "keep" leaves
            them, "permute" puts them in the order in which the solver sorted its columns.
        momentum: Keep an average of the gradient with this decay in the basis, carried over
            exactly when the basis changes, and precondition that in the place of the update: one
            rotation less per step than with a filter in the original basis, and the same
            numbers to rounding (but that it skips what `inner` skips). None for no such average.
        before_start: Before the first refresh the basis is the "identity"; or "skip" those
            updates: they are zero, and `inner` takes nothing in.
        ignore: Dimensions that are not rotated, by order: `{2: [1]}`.
        sides: Which dimensions are rotated, see `kronecker`.
        max_dim: Dimensions larger than this are not rotated.
        trace_scaling: See `kronecker` (it matters for damping and QR iterations only).
        bias_correction: Whether F / (1 - beta2^t) is decomposed (it matters for damping only).
        drop_weighting: See `kronecker`.
        factor_dtype: dtype of the factors.
        basis_dtype: dtype of the bases and the rotations; as the factors if not given.
        product_dtype: dtype of the products of gradients.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Source: arXiv 2409.11321, algorithm 3 (SOAP); arXiv 2506.03595, section 3.

    Example:
        >>> from shampoo_func.preconditioners import second_moment
        >>> tx = in_eigenbasis(second_moment(0.0, epsilon=0.0))
        >>> g = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
        >>> state = tx.correct(tx.refresh(tx.accumulate(tx.init(g), g)), g)
        >>> tx.apply(state, g)
        tensor([[0., 1.],
                [1., 0.]])
    """
    if not isinstance(inner, Preconditioner):
        raise HyperparameterError(
            f"inner must be a preconditioner such as second_moment(), got {inner!r}."
        )
    check_choice("kl", kl, ("paper", "reference", None))
    check_choice("carry", carry, ("keep", "permute"))
    check_choice("before_start", before_start, ("identity", "skip"))
    if momentum is not None:
        check_number("momentum", momentum, high=1.0, high_open=True)
    check_dtype("basis_dtype", basis_dtype)
    factors = factors_of(
        beta2,
        bias_correction=bias_correction,
        exponents=ignored(ignore),
        sides=sides,
        max_dim=max_dim,
        trace_scaling=trace_scaling,
        normalize=kl == "paper",
        drop_weighting=drop_weighting,
        dtype=factor_dtype,
        product_dtype=product_dtype,
    )
    return InEigenbasis(
        inner, factors, checked_basis(basis), kl, carry, momentum, before_start, basis_dtype
    )
