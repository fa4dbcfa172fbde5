"""Shampoo: one factor matrix per dimension of a block, applied by inverse roots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import HyperparameterError, check_count, check_dtype, check_number
from shampoo_func.types import Preconditioner, Scalar, named_roles

__all__ = ["Kronecker", "KroneckerState", "kronecker"]

Exponents = tuple[tuple[int, float | tuple[tuple[int, float], ...]], ...]


class KroneckerState(NamedTuple):
    """Statistics and roots of a stack of order-k blocks.

    step: int64 `[n]`, gradients taken in. factors, roots: k tensors `[n, d, d]`; `[n, 0, 0]`
    for a dimension that is not preconditioned. failures: int64 `[n]`, refreshes whose root
    could not be used, so that the previous one was kept.
    """

    step: Tensor
    factors: tuple[Tensor, ...]
    roots: tuple[Tensor, ...]
    failures: Tensor


@dataclass(frozen=True, slots=True)
class Kronecker(Preconditioner):
    """See `kronecker`."""

    beta2: Scalar = 1.0
    root: linalg.EighRoot = field(default_factory=linalg.eigh_root)
    bias_correction: bool = True
    exponents: Exponents = ()
    max_dim: int | None = None
    trace_scaling: float | None = None
    factor_dtype: torch.dtype | None = None
    root_dtype: torch.dtype | None = None

    def init(self, block: Tensor) -> KroneckerState:
        """Return zero factors and identity roots for one block."""
        factor_dtype = self.factor_dtype or linalg.compute_dtype(block.dtype)
        root_dtype = self.root_dtype or factor_dtype
        sizes = [
            size if self._exponent(block.ndim, dim, size) else 0
            for dim, size in enumerate(block.shape)
        ]
        zero = torch.zeros((), dtype=torch.int64, device=block.device)
        return KroneckerState(
            step=zero,
            factors=tuple(block.new_zeros((size, size), dtype=factor_dtype) for size in sizes),
            roots=tuple(torch.eye(size, dtype=root_dtype, device=block.device) for size in sizes),
            failures=zero.clone(),
        )

    def accumulate(self, state: KroneckerState, grads: Tensor) -> KroneckerState:
        """Add the gradient's Gram matrices: F_i <- beta2 F_i + (1 - beta2) G_(i) G_(i)^T."""
        order = len(state.factors)
        factors = list(state.factors)
        for dim in self._preconditioned(state):
            new = linalg.gram(grads.to(factors[dim].dtype), dim, order)
            if self._sums:
                factors[dim] = factors[dim] + new
            else:
                factors[dim] = linalg.ema(factors[dim], new, self.beta2)
        return state._replace(step=state.step + 1, factors=tuple(factors))

    def refresh(self, state: KroneckerState) -> KroneckerState:
        """Recompute X_i = (F_i / bias correction)^(-p_i); keep a root that cannot be had."""
        order = len(state.factors)
        roots = list(state.roots)
        failed = torch.zeros_like(state.failures, dtype=torch.bool)
        for dim in self._preconditioned(state):
            factor = self._corrected(state.factors[dim], state.step)
            size = factor.shape[-1]
            solver = linalg.guarded(self.root)
            root = solver(factor, self._exponent(order, dim, size), roots[dim])
            roots[dim] = root.value
            failed = failed | ~root.ok
        return state._replace(roots=tuple(roots), failures=state.failures + failed)

    def apply(self, state: KroneckerState, updates: Tensor) -> Tensor:
        """Multiply every dimension by its root; in a matrix block, X_1 U X_2."""
        order = len(state.factors)
        result = updates
        for dim in self._preconditioned(state):
            root = state.roots[dim]
            result = linalg.multiply(result.to(root.dtype), root, dim, order)
        return linalg.with_layout_of(result.to(updates.dtype), updates)

    def block_shape(self, state: KroneckerState) -> tuple[int | None, ...]:
        """Return the sizes of the factors; None for a dimension that has none."""
        sizes = (factor.shape[-1] or None for factor in state.factors)
        return (*state.step.shape, *sizes)

    def roles(self, state: KroneckerState) -> KroneckerState:
        """Name the factors and the roots."""
        return named_roles(state, {"factors": "factor", "roots": "root"})

    def reads(self, function: str) -> frozenset[str]:
        """Statistics need no roots, and the direction no statistics."""
        read = {"accumulate": {"factor"}, "refresh": {"factor", "root"}, "apply": {"root"}}
        return frozenset(read.get(function, ()))

    @property
    def _sums(self) -> bool:
        return not isinstance(self.beta2, Tensor) and self.beta2 == 1.0

    def _preconditioned(self, state: KroneckerState) -> Iterator[int]:
        """Yield the dimensions that have a factor."""
        return (dim for dim, root in enumerate(state.roots) if root.shape[-1] > 0)

    def _exponent(self, order: int, dim: int, size: int) -> float:
        """Return p for one dimension of an order-k block; 0 where it is left alone."""
        if self.max_dim is not None and size > self.max_dim:
            return 0.0
        override = dict(self.exponents).get(order)
        if isinstance(override, tuple):
            override = dict(override).get(dim)
        return 1 / (2 * max(order, 1)) if override is None else override

    def _corrected(self, factor: Tensor, step: Tensor) -> Tensor:
        """Return the matrix whose root is taken."""
        if self.bias_correction and not self._sums:
            # a block that has seen no gradient would divide 0 by 0
            factor = factor / linalg.bias_correction(self.beta2, step.clamp(min=1), factor)
        if self.trace_scaling is not None:
            eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
            trace = (factor * eye).sum((-2, -1)).clamp(min=self.root.epsilon)
            factor = factor * trace.pow(-self.trace_scaling)[..., None, None]
        return factor


def kronecker(
    beta2: Scalar = 1.0,
    *,
    root: linalg.EighRoot | None = None,
    bias_correction: bool = True,
    exponents: Mapping[int, float | Mapping[int, float]] | None = None,
    max_dim: int | None = None,
    trace_scaling: float | None = None,
    factor_dtype: torch.dtype | None = None,
    root_dtype: torch.dtype | None = None,
) -> Kronecker:
    """Shampoo's preconditioner: the Kronecker product of one factor per dimension.

    For a block G with k dimensions, F_i is a moving average (or sum) of the Gram matrix of G
    unfolded along dimension i, and the direction is G x_1 F_1^(-p) x_2 ... x_k F_k^(-p) with
    p = 1/(2k): for a matrix L^(-1/4) G R^(-1/4).

    Args:
        beta2: Decay of the factors, a number in [0, 1] or a 0-d tensor; the number 1 means the
            plain sum of AdaGrad, without bias correction.
        root: Inverse root solver; `eigh_root()` if not given.
        bias_correction: Whether a root is taken of F / (1 - beta2^t).
        exponents: p by order, `{2: 0.5}`, or by order and dimension, `{3: {0: 0.0, 1: 0.25}}`;
            0.0 leaves a dimension unpreconditioned, without a factor.
        max_dim: Dimensions larger than this are left unpreconditioned.
        trace_scaling: Scale the matrix by its trace to minus this power before the root; None
            for no scaling (arXiv 2506.03595).
        factor_dtype: dtype of the factors; at least float32 and the block's own if not given.
        root_dtype: dtype of the roots and of the products with them; as the factors if not given.

    Raises:
        HyperparameterError: If a number is out of range.

    Source: arXiv 1802.09568, algorithm 2; arXiv 2309.06497, algorithm 1.

    Example:
        >>> tx = kronecker(beta2=1.0)
        >>> state = tx.init(torch.zeros(2, 3))
        >>> state = tx.refresh(tx.accumulate(state, torch.tensor([[4.0, 0, 0], [0, 9.0, 0]])))
        >>> tx.apply(state, torch.tensor([[4.0, 0, 0], [0, 9.0, 0]]))
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    check_number("beta2", beta2, high=1.0)
    if max_dim is not None:
        check_count("max_dim", max_dim)
    if trace_scaling is not None:
        check_number("trace_scaling", trace_scaling, high=1.0, low_open=True)
    check_dtype("factor_dtype", factor_dtype)
    check_dtype("root_dtype", root_dtype)
    if root is not None and not isinstance(root, linalg.EighRoot):
        raise HyperparameterError(f"root must be a root solver such as eigh_root(), got {root!r}.")
    overrides: Any = {} if exponents is None else exponents
    return Kronecker(
        beta2,
        linalg.eigh_root() if root is None else root,
        bias_correction,
        _frozen_exponents(overrides),
        max_dim,
        trace_scaling,
        factor_dtype,
        root_dtype,
    )


def _frozen_exponents(exponents: Mapping[int, float | Mapping[int, float]]) -> Exponents:
    """Check the exponents and turn the mapping into sorted tuples, which hash."""
    if not isinstance(exponents, Mapping):
        raise HyperparameterError(
            f"exponents must map orders to exponents, as in {{2: 0.5}}, got {exponents!r}."
        )
    frozen: list[tuple[int, float | tuple[tuple[int, float], ...]]] = []
    for order, value in sorted(exponents.items()):
        check_count("exponents: an order", order)
        if isinstance(value, Mapping):
            for dim, power in value.items():
                check_count(f"exponents[{order}]: a dimension", dim, low=0)
                if dim >= order:
                    raise HyperparameterError(
                        f"exponents[{order}] names dimension {dim}, but a block of order {order} "
                        f"has only 0 to {order - 1}; name one of those."
                    )
                check_number(f"exponents[{order}][{dim}]", power)
            frozen.append((order, tuple(sorted(value.items()))))
        else:
            check_number(f"exponents[{order}]", value)
            frozen.append((order, value))
    return tuple(frozen)
