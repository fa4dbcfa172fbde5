"""Shampoo: one factor matrix per dimension of a block, applied by cached inverse roots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import HyperparameterError, check_dtype
from shampoo_func.preconditioners.factors import (
    Factors,
    Sides,
    block_shape,
    counted,
    factors_of,
    preconditioned,
)
from shampoo_func.types import Preconditioner, Scalar, named_roles

__all__ = ["Kronecker", "KroneckerState", "kronecker"]


class KroneckerState(NamedTuple):
    """Statistics and roots of a stack of order-k blocks.

    step: int64 `[n]`, gradients taken in. factors, roots: k tensors `[n, d, d]`; `[n, 0, 0]`
    for a dimension that is not preconditioned. failures, failures_in_a_row: int64 `[n]`,
    refreshes whose root could not be used, so that the previous one was kept.
    """

    step: Tensor
    factors: tuple[Tensor, ...]
    roots: tuple[Tensor, ...]
    failures: Tensor
    failures_in_a_row: Tensor


def _default_root() -> linalg.Guarded:
    return linalg.guarded(linalg.eigh_root())


@dataclass(frozen=True, slots=True)
class Kronecker(Preconditioner):
    """See `kronecker`."""

    factors: Factors = field(default_factory=Factors)
    root: linalg.Guarded = field(default_factory=_default_root)
    kl: bool = False
    root_dtype: torch.dtype | None = None
    apply_dtype: torch.dtype | None = None

    def init(self, block: Tensor) -> KroneckerState:
        """Return zero factors and identity roots for one block."""
        factors = self.factors.init(block)
        zero = torch.zeros((), dtype=torch.int64, device=block.device)
        roots = []
        for dim, factor in enumerate(factors):
            if factor.shape[-1]:
                self.root.check_exponent(self.factors.exponent(len(factors), dim))
            dtype = self.root_dtype or linalg.compute_dtype(factor.dtype)
            roots.append(torch.eye(factor.shape[-1], dtype=dtype, device=block.device))
        return KroneckerState(zero, factors, tuple(roots), zero.clone(), zero.clone())

    def accumulate(self, state: KroneckerState, grads: Tensor) -> KroneckerState:
        """Add the gradient's Gram matrices: F_i <- beta2 F_i + (1 - beta2) G_(i) G_(i)^T."""
        order = len(state.factors)

        def whiten(blocks: Tensor, dim: int) -> Tensor:
            return linalg.multiply(blocks, state.roots[dim].to(blocks.dtype), dim, order)

        factors = self.factors.accumulate(state.factors, grads, whiten if self.kl else None)
        return state._replace(step=state.step + 1, factors=factors)

    def refresh(self, state: KroneckerState) -> KroneckerState:
        """Recompute X_i = (F_i / bias correction)^(-p_i); keep a root that cannot be had."""
        order = len(state.factors)
        roots = list(state.roots)
        failed = torch.zeros_like(state.failures, dtype=torch.bool)
        for dim in preconditioned(state.factors):
            factor = self.factors.corrected(state.factors[dim], state.step, self.root.epsilon)
            root = self.root(factor, self.factors.exponent(order, dim), roots[dim])
            roots[dim] = root.value
            failed = failed | ~root.ok
        failures, in_a_row = counted(state.failures, state.failures_in_a_row, failed)
        return state._replace(roots=tuple(roots), failures=failures, failures_in_a_row=in_a_row)

    def apply(self, state: KroneckerState, updates: Tensor) -> Tensor:
        """Multiply every dimension by its root; in a matrix block, X_1 U X_2."""
        dims = list(preconditioned(state.factors))
        roots = {dim: self._applied(state.roots[dim]) for dim in dims}
        order = len(state.factors)
        if order == 2 and len(dims) == 2:
            result = updates.to(roots[0].dtype)
            result = linalg.multiply_both_sides(roots[0], result, roots[1])
        else:
            result = updates
            for dim, root in roots.items():
                result = linalg.multiply(result.to(root.dtype), root, dim, order)
        return linalg.with_layout_of(result.to(updates.dtype), updates)

    def _applied(self, root: Tensor) -> Tensor:
        """Return a root in the dtype in which it is multiplied."""
        return root.to(self.apply_dtype or linalg.compute_dtype(root.dtype))

    def starts_as_identity(self, dtype: torch.dtype) -> bool:
        """Roots are identities at first, and their dtype usually holds the updates'."""
        factor = self.factors.dtype or linalg.compute_dtype(dtype)
        applied = linalg.compute_dtype(self.root_dtype or factor)
        return self.apply_dtype is None and torch.promote_types(applied, dtype) == applied

    def block_shape(self, state: KroneckerState) -> tuple[int | None, ...]:
        """Return the sizes of the factors; None for a dimension that has none."""
        return block_shape(state.step, state.factors)

    def roles(self, state: KroneckerState) -> KroneckerState:
        """Return what every leaf is."""
        roles: KroneckerState = named_roles(state, {"factors": "factor", "roots": "root"})
        return roles

    def reads(self, function: str) -> frozenset[str]:
        """Return what is read: plain statistics need no roots, and the direction no statistics."""
        read = {
            "accumulate": {"factor", "root"} if self.kl else {"factor"},
            "refresh": {"factor", "root"},
            "apply": {"root"},
        }
        return frozenset(read.get(function, ()))


def kronecker(
    beta2: Scalar = 1.0,
    *,
    root: linalg.RootSolver | linalg.Guarded | Literal["auto"] | None = None,
    kl: bool = False,
    normalize: bool = False,
    bias_correction: bool = True,
    exponents: Mapping[int, float | Mapping[int, float]] | None = None,
    sides: Sides = "all",
    max_dim: int | None = None,
    trace_scaling: float | None = None,
    drop_weighting: bool = False,
    factor_dtype: torch.dtype | None = None,
    root_dtype: torch.dtype | None = None,
    product_dtype: torch.dtype | None = None,
    apply_dtype: torch.dtype | None = None,
) -> Kronecker:
    """Shampoo's preconditioner: the Kronecker product of one factor per dimension.

    For a block G with k dimensions, F_i is a moving average (or sum) of the Gram matrix of G
    unfolded along dimension i, and the direction is G x_1 F_1^(-p) x_2 ... x_k F_k^(-p) with
    p = 1/(2k): for a matrix L^(-1/4) G R^(-1/4).

    With `kl`, the Gram matrix of dimension i is that of G multiplied by the cached roots of all
    other dimensions: for a matrix L <- beta2 L + (1 - beta2) G R^(-2p) G^T. With `normalize`
    and exponents 1/2 that is KL-Shampoo as in its paper (`kl_shampoo`); without either it is
    what Distributed Shampoo calls so.

    Args:
        beta2: Decay of the factors, a number in [0, 1] or a 0-d tensor; the number 1 means the
            plain sum of AdaGrad, without bias correction.
        root: Inverse root solver; `eigh_root()` if not given, "auto" for `auto_root()`, which
            chooses by device and size. `guarded(...)` asks it for a small residual.
        kl: Whether gradients are whitened along the other dimensions before their product.
        normalize: Whether a Gram matrix is divided by the number of elements summed in each of
            its entries, the product of the other dimensions.
        bias_correction: Whether a root is taken of F / (1 - beta2^t).
        exponents: p by order, `{2: 0.5}`, or by order and dimension, `{3: {0: 0.0, 1: 0.25}}`;
            0.0 leaves a dimension unpreconditioned, without a factor.
        sides: Which dimensions are preconditioned: "all"; or one, with p = 1/2: the first
            ("left"), the last ("right"), or the "smaller" (arXiv 2503.20762).
        max_dim: Dimensions larger than this are left unpreconditioned.
        trace_scaling: Scale the matrix by its trace to minus this power before the root; None
            for no scaling (arXiv 2506.03595).
        drop_weighting: Whether a new Gram matrix enters with weight 1 and not 1 - beta2; then
            there is no bias correction.
        factor_dtype: dtype of the factors; at least float32 and the block's own if not given.
        root_dtype: dtype of the roots, and (at least float32) of the products with them; as the
            factors if not given.
        product_dtype: dtype of the products of gradients, float32 or float64; as the factors,
            and at least float32, if not given.
        apply_dtype: dtype of the products with the roots; the roots' own, and at least float32,
            if not given. bfloat16 halves their time or better, at a relative error of about
            0.4 % of the direction; statistics and roots are not touched by it.

    Raises:
        HyperparameterError: If a number is out of range.

    Source: arXiv 1802.09568, algorithm 2; arXiv 2309.06497, algorithm 1; arXiv 2509.03378
    (KL-Shampoo).

    Example:
        >>> tx = kronecker(beta2=1.0)
        >>> state = tx.init(torch.zeros(2, 3))
        >>> state = tx.refresh(tx.accumulate(state, torch.tensor([[4.0, 0, 0], [0, 9.0, 0]])))
        >>> tx.apply(state, torch.tensor([[4.0, 0, 0], [0, 9.0, 0]]))
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    check_dtype("root_dtype", root_dtype)
    check_dtype("apply_dtype", apply_dtype)
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
    return Kronecker(factors, _guarded(root), kl, root_dtype, apply_dtype)


def _guarded(root: linalg.RootSolver | linalg.Guarded | str | None) -> linalg.Guarded:
    """Return the solver with a guard around it."""
    if root is None:
        return _default_root()
    if root == "auto":
        return linalg.guarded(linalg.auto_root())
    if isinstance(root, linalg.Guarded):
        return root
    if not isinstance(root, linalg.RootSolver):
        raise HyperparameterError(f"root must be a root solver such as eigh_root(), got {root!r}.")
    return linalg.guarded(root)
