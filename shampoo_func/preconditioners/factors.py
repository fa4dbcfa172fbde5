"""The statistics of every Kronecker-factored preconditioner: one matrix per dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import (
    HyperparameterError,
    check_choice,
    check_count,
    check_dtype,
    check_number,
)
from shampoo_func.types import Scalar

__all__ = [
    "Exponents",
    "Factors",
    "Sides",
    "block_shape",
    "counted",
    "factors_of",
    "ignored",
    "preconditioned",
]

Exponents = tuple[tuple[int, float | tuple[tuple[int, float], ...]], ...]
Sides = Literal["all", "left", "right", "smaller"]

Whiten = Callable[[Tensor, int], Tensor]
"""From gradients and a dimension that has a factor: that dimension whitened."""


@dataclass(frozen=True, slots=True)
class Factors:
    """Which dimensions have a factor, and how gradients are taken into it."""

    beta2: Scalar = 1.0
    bias_correction: bool = True
    exponents: Exponents = ()
    sides: Sides = "all"
    max_dim: int | None = None
    trace_scaling: float | None = None
    normalize: bool = False
    drop_weighting: bool = False
    dtype: torch.dtype | None = None
    product_dtype: torch.dtype | None = None

    def init(self, block: Tensor) -> tuple[Tensor, ...]:
        """Return zero factors for one block; `[0, 0]` for a dimension that has none."""
        dtype = self.dtype or linalg.compute_dtype(block.dtype)
        shape = tuple(block.shape)
        sizes = [size if self.has(shape, dim) else 0 for dim, size in enumerate(shape)]
        return tuple(block.new_zeros((size, size), dtype=dtype) for size in sizes)

    def has(self, shape: tuple[int, ...], dim: int) -> bool:
        """Whether one dimension of a block has a factor."""
        if self.max_dim is not None and shape[dim] > self.max_dim:
            return False
        smallest = min(range(len(shape)), key=lambda other: shape[other])
        chosen = {
            "all": dim,
            "left": 0,
            "right": len(shape) - 1,
            "smaller": smallest,
        }[self.sides]
        return dim == chosen and self.exponent(len(shape), dim) != 0

    def exponent(self, order: int, dim: int) -> float:
        """Return p for one dimension of an order-k block."""
        override = dict(self.exponents).get(order)
        if isinstance(override, tuple):
            override = dict(override).get(dim)
        if override is not None:
            return override
        return 1 / (2 * max(order, 1)) if self.sides == "all" else 0.5

    def accumulate(
        self, factors: tuple[Tensor, ...], grads: Tensor, whiten: Whiten | None = None
    ) -> tuple[Tensor, ...]:
        """Take in the Gram matrices of gradients, each whitened along the other dimensions."""
        order = len(factors)
        after = list(factors)
        for dim in preconditioned(factors):
            own = grads.to(self.product_dtype or linalg.compute_dtype(factors[dim].dtype))
            if whiten is not None:
                for other in preconditioned(factors):
                    own = own if other == dim else whiten(own, other)
            share = factors[dim].shape[-1] / self.size(factors, grads) if self.normalize else 1.0
            after[dim] = self._added(factors[dim], own, dim, order, share)
        return tuple(after)

    def corrected(self, factor: Tensor, step: Tensor, epsilon: Scalar) -> Tensor:
        """Return the matrix that is decomposed, or whose root is taken."""
        factor = factor.to(linalg.compute_dtype(factor.dtype))
        if self.bias_correction and self.averages:
            # a block that has seen no gradient would divide 0 by 0
            factor = factor / linalg.bias_correction(self.beta2, step.clamp(min=1), factor)
        if self.trace_scaling is not None:
            trace = linalg.diagonal(factor).sum(-1).clamp(min=epsilon)
            factor = factor * trace.pow(-self.trace_scaling)[..., None, None]
        return factor

    def _added(self, factor: Tensor, grads: Tensor, dim: int, order: int, share: float) -> Tensor:
        """Return the factor with the Gram matrices of gradients, times `share`, taken in."""
        if not isinstance(self.beta2, Tensor) and factor.dtype == grads.dtype:
            weight = 1.0 if self._sums or self.drop_weighting else 1 - self.beta2
            return linalg.add_gram(
                factor, grads, dim, order, decay=self.beta2, weight=weight * share
            )
        new = linalg.gram(grads, dim, order) * share
        if self._sums or self.drop_weighting:
            return (linalg.scaled(factor, self.beta2) + new).to(factor.dtype)
        return linalg.ema(factor, new, self.beta2)

    def size(self, factors: tuple[Tensor, ...], grads: Tensor) -> int:
        """Return the number of elements of a block."""
        size = 1
        for length in grads.shape[grads.ndim - len(factors) :]:
            size *= length
        return size

    @property
    def averages(self) -> bool:
        """Whether factors are moving averages, not sums."""
        return not self.drop_weighting and not self._sums

    @property
    def _sums(self) -> bool:
        return not isinstance(self.beta2, Tensor) and self.beta2 == 1.0


def preconditioned(factors: tuple[Tensor, ...]) -> Iterator[int]:
    """Yield the dimensions that have a factor."""
    return (dim for dim, factor in enumerate(factors) if factor.shape[-1] > 0)


def block_shape(step: Tensor, factors: tuple[Tensor, ...]) -> tuple[int | None, ...]:
    """Return the shape of the gradients that factors are for; None where there is no factor."""
    return (*step.shape, *(factor.shape[-1] or None for factor in factors))


def counted(failures: Tensor, in_a_row: Tensor, failed: Tensor) -> tuple[Tensor, Tensor]:
    """Return both counts of failed refreshes, per block, after one more refresh."""
    return failures + failed, (in_a_row + 1) * failed


def factors_of(
    beta2: Scalar,
    *,
    bias_correction: bool,
    exponents: Mapping[int, float | Mapping[int, float]] | None,
    sides: Sides,
    max_dim: int | None,
    trace_scaling: float | None,
    normalize: bool,
    drop_weighting: bool,
    dtype: torch.dtype | None,
    product_dtype: torch.dtype | None,
) -> Factors:
    """Check the settings, and return them as a frozen value.

    Raises:
        HyperparameterError: If one is out of range.
    """
    check_number("beta2", beta2, high=1.0)
    check_choice("sides", sides, ("all", "left", "right", "smaller"))
    if max_dim is not None:
        check_count("max_dim", max_dim)
    if trace_scaling is not None:
        check_number("trace_scaling", trace_scaling, high=1.0, low_open=True)
    check_dtype("factor_dtype", dtype)
    check_dtype("product_dtype", product_dtype)
    if product_dtype is not None and linalg.compute_dtype(product_dtype) != product_dtype:
        raise HyperparameterError(
            f"product_dtype must be float32 or float64, got {product_dtype}: sums of products "
            "lose small terms in anything less."
        )
    overrides: Any = {} if exponents is None else exponents
    return Factors(
        beta2,
        bias_correction,
        _frozen_exponents(overrides),
        sides,
        max_dim,
        trace_scaling,
        normalize,
        drop_weighting,
        dtype,
        product_dtype,
    )


def ignored(ignore: Mapping[int, Sequence[int]] | None) -> dict[int, dict[int, float]]:
    """Return the dimensions that have no factor as exponents of 0."""
    given = {} if ignore is None else ignore
    for order in given:
        check_count("ignore: an order", order)
    return {order: dict.fromkeys(dims, 0.0) for order, dims in given.items()}


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
