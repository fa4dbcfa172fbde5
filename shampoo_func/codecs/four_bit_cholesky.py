"""A symmetric matrix by its Cholesky factor in four bits, with error feedback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.codecs.blockwise import scale_of, spread
from shampoo_func.codecs.codec import SYMMETRIC, Codec
from shampoo_func.codecs.nibbles import from_levels, halves, join, to_levels
from shampoo_func.errors import check_number
from shampoo_func.linalg._shapes import Float

__all__ = ["CholeskyCode", "FourBitCholesky", "four_bit_cholesky"]

BLOCK = 64
"""Entries of the factor that share a scale."""


class CholeskyCode(NamedTuple):
    """The strict triangle, column by column, and the diagonal of the Cholesky factor.

    byte: `[*batch, n (n - 1) / 2]`, an entry of the factor in the low half and the error that
    is carried on in the high half. scale, error_scale: `[*batch, blocks]`. diagonal:
    `[*batch, n]`, exact.
    """

    byte: Tensor
    scale: Tensor
    error_scale: Tensor
    diagonal: Tensor


@dataclass(frozen=True, slots=True)
class FourBitCholesky(Codec):
    """See `four_bit_cholesky`."""

    beta_error: float = 0.0
    epsilon: float = 1e-8

    @property
    def roles(self) -> frozenset[str]:
        """Symmetric matrices."""
        return SYMMETRIC

    def encode(
        self, value: Float[Tensor, "*batch n n"], previous: CholeskyCode | None = None
    ) -> CholeskyCode:
        """Factorise, add the error that was carried on, round, and carry on what is lost."""
        factor = self._factor(value)
        numbers = factor.mT.flatten(-2).index_select(-1, _places(value)[1])
        error = torch.zeros_like(numbers) if previous is None else self._error(previous)
        wanted = numbers + error
        levels, scale = _quantized(wanted, value.dtype)
        lost = wanted - _numbers(levels, scale, numbers.dtype)
        error_levels, error_scale = _quantized(
            self.beta_error * error + (1 - self.beta_error) * lost, value.dtype
        )
        diagonal = factor.diagonal(dim1=-2, dim2=-1).to(value.dtype)
        return CholeskyCode(
            join(levels, error_levels),
            scale,
            error_scale,
            diagonal.clone(memory_format=torch.contiguous_format),
        )

    def decode(self, code: CholeskyCode) -> Float[Tensor, "*batch n n"]:
        """Return C C^T of the rounded factor C."""
        levels, _ = halves(code.byte)
        dtype = linalg.compute_dtype(code.diagonal.dtype)
        numbers = _numbers(levels, code.scale, dtype)
        factor = torch.diag_embed(code.diagonal.to(dtype))
        place = _places(factor)[0].expand(numbers.shape)
        factor = factor.flatten(-2).scatter(-1, place, numbers).reshape(factor.shape)
        # a matrix product is not symmetric to the last bit
        value = factor @ factor.mT
        return ((value + value.mT) / 2).to(code.diagonal.dtype)

    def like(self, code: CholeskyCode) -> Tensor:
        """Return a tensor without data in the shape of the matrix."""
        shape = (*code.diagonal.shape, code.diagonal.shape[-1])
        return torch.empty(shape, dtype=code.diagonal.dtype, device="meta")

    def _factor(self, value: Tensor) -> Tensor:
        """Return the Cholesky factor; NaN where there is none, 0 of 0."""
        # float64: an average of few gradients is singular, and float32 would find it indefinite
        exact = value.to(torch.promote_types(value.dtype, linalg.scalar_dtype(value.device)))
        trace = exact.diagonal(dim1=-2, dim2=-1).abs().sum(-1)[..., None, None]
        eye = torch.eye(value.shape[-1], dtype=exact.dtype, device=value.device)
        unit = exact / torch.where(trace == 0, 1.0, trace)
        # a few roundings of the value itself, each at most eps / 2 of the trace, are forgiven too
        damping = max(self.epsilon, 4 * torch.finfo(value.dtype).eps)
        factor, failed = torch.linalg.cholesky_ex(unit + damping * eye)
        factor = factor * self._shrinking(unit, damping) * trace.sqrt()
        factor = torch.where((failed > 0)[..., None, None], torch.nan, factor)
        return factor.to(linalg.compute_dtype(value.dtype))

    def _shrinking(self, unit: Tensor, damping: float) -> Tensor:
        """Return what to multiply the rows by to have the diagonal as it was without damping.

        A damping that stayed would add up, as a matrix is stored again at every step.
        """
        diagonal = unit.diagonal(dim1=-2, dim2=-1)
        return (diagonal.clamp(min=0.0) / (diagonal + damping)).sqrt().unsqueeze(-1)

    def _error(self, code: CholeskyCode) -> Tensor:
        """Return the error that was carried on; 0 where it is lost in a NaN."""
        _, levels = halves(code.byte)
        dtype = linalg.compute_dtype(code.diagonal.dtype)
        return _numbers(levels, code.error_scale, dtype).nan_to_num()


def _places(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the strict lower triangle lies in a flattened matrix, and in its transpose.

    The order is column by column.
    """
    size = matrix.shape[-1]
    column, row = torch.triu_indices(size, size, 1, device=matrix.device)
    return row * size + column, column * size + row


def _quantized(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = scale_of(numbers, BLOCK).to(dtype)
    divisor = spread(torch.where(scale > 0, scale, 1.0), numbers.shape[-1], BLOCK)
    return to_levels(numbers / divisor), scale


def _numbers(levels: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return from_levels(levels, dtype) * spread(scale, levels.shape[-1], BLOCK)


def four_bit_cholesky(beta_error: float = 0.0, *, epsilon: float = 1e-8) -> FourBitCholesky:
    """Store the Cholesky factor of a symmetric matrix in 4 bits, with error feedback.

    A + epsilon tr(A) I = C C^T, with the rows of C scaled so that C C^T has the diagonal of A.
    Off the diagonal, with Q rounding to 16 levels relative to the largest of every 64 entries,
    the code is Q(C + E), and what rounding loses is carried on:

        E <- beta_error E + (1 - beta_error) (C + E - Q(C + E))

    E takes the four bits of the empty upper triangle, so a pair of entries costs one byte; the
    diagonal of C is exact. What is decoded is positive semi-definite whatever is rounded.

    A matrix that is not finite, or so indefinite that epsilon does not help, decodes to NaN.

    Args:
        beta_error: Decay of the error that is carried on, in [0, 1). At 0 all that is lost now
            is added at the next step, and nothing twice. A large one keeps adding what has been
            added already: where A is an average that is read from its own code, as factors
            are, it grows without bound (0.95 does so within some hundred steps at
            beta2 = 0.99); it is for matrices that are computed anew.
        epsilon: Damping before the factorisation, relative to the trace, and at least four
            roundings in the dtype of A. The factorisation is in float64.

    Raises:
        HyperparameterError: If a number is out of range.

    Source: arXiv 2412.10663 (Cholesky quantisation with error feedback; there beta_error is
        0.95, and there is no scaling of rows).

    Example:
        >>> codec = four_bit_cholesky()
        >>> codec.decode(codec.encode(torch.tensor([[4.0, 2.0], [2.0, 5.0]]))).round(decimals=3)
        tensor([[4., 2.],
                [2., 5.]])
    """
    check_number("beta_error", beta_error, high=1.0, high_open=True)
    check_number("epsilon", epsilon, low_open=True)
    return FourBitCholesky(beta_error, epsilon)
