"""A symmetric matrix by its eigenvectors in four bits, and its eigenvalues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.codecs.blockwise import scale_of, spread
from shampoo_func.codecs.codec import SYMMETRIC, Codec
from shampoo_func.codecs.nibbles import from_levels, halves, join, to_levels
from shampoo_func.errors import check_choice, check_count
from shampoo_func.linalg._shapes import Float

__all__ = ["EigenCode", "FourBitEigen", "four_bit_eigen"]

BLOCK = 64
"""Entries of an eigenvector that share a scale."""


class EigenCode(NamedTuple):
    """Eigenvectors as rows.

    byte: `[*batch, n, ceil(n / 2)]`, two entries of an eigenvector in each. scale:
    `[*batch, n, blocks]`. eigenvalues: `[*batch, n]`, exact.
    """

    byte: Tensor
    scale: Tensor
    eigenvalues: Tensor


@dataclass(frozen=True, slots=True)
class FourBitEigen(Codec):
    """See `four_bit_eigen`."""

    iterations: int = 2
    basis: Literal["qr", "eigh"] = "qr"

    @property
    def roles(self) -> frozenset[str]:
        """Symmetric matrices."""
        return SYMMETRIC

    def encode(
        self, value: Float[Tensor, "*batch n n"], previous: EigenCode | None = None
    ) -> EigenCode:
        """Return eigenvectors in four bits and eigenvalues."""
        finite = linalg.all_finite(value)[..., None, None]
        wide = value.to(linalg.compute_dtype(value.dtype))
        matrix = torch.where(finite, wide, 0.0)  # LAPACK refuses what is not finite
        if previous is None or self.basis == "eigh":
            # in float32 LAPACK fails on some matrices with many zeros
            exact = torch.promote_types(matrix.dtype, linalg.scalar_dtype(matrix.device))
            vectors = torch.linalg.eigh(matrix.to(exact)).eigenvectors.to(matrix.dtype)
        else:
            vectors = torch.linalg.qr(matrix @ self._vectors(previous)).Q
        values = (vectors * (matrix @ vectors)).sum(-2)
        values = torch.where(finite[..., 0], values, torch.nan)
        byte, scale = _quantized(vectors.mT)
        return EigenCode(byte, scale.to(value.dtype), values.to(value.dtype))

    def decode(self, code: EigenCode) -> Float[Tensor, "*batch n n"]:
        """Return V diag(l) V^T with orthogonalised eigenvectors."""
        vectors = self._vectors(code)
        value = (vectors * code.eigenvalues.to(vectors.dtype).unsqueeze(-2)) @ vectors.mT
        return ((value + value.mT) / 2).to(code.eigenvalues.dtype)

    def like(self, code: EigenCode) -> Tensor:
        """Return a tensor without data in the shape of the matrix."""
        shape = (*code.eigenvalues.shape, code.eigenvalues.shape[-1])
        return torch.empty(shape, dtype=code.eigenvalues.dtype, device="meta")

    def _vectors(self, code: EigenCode) -> Tensor:
        """Return the eigenvectors as columns, orthogonalised by Bjorck's iteration."""
        size = code.eigenvalues.shape[-1]
        numbers = torch.stack(halves(code.byte), -1).flatten(-2)[..., :size]
        scale = spread(code.scale, size, BLOCK)
        vectors = (from_levels(numbers, scale.dtype) * scale).mT
        # the iteration converges from singular values below sqrt(3): lengths to 1 first
        length = torch.linalg.vector_norm(vectors, dim=-2, keepdim=True)
        vectors = vectors / torch.where(length > 0, length, 1.0)
        for _ in range(self.iterations):
            vectors = 1.5 * vectors - 0.5 * vectors @ (vectors.mT @ vectors)
        return vectors


def _quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return two entries per byte, and the scales."""
    size = rows.shape[-1]
    scale = scale_of(rows, BLOCK)
    levels = to_levels(rows / spread(torch.where(scale > 0, scale, 1.0), size, BLOCK))
    even = torch.nn.functional.pad(levels, (0, size % 2))
    byte = join(even[..., ::2], even[..., 1::2])
    return byte, scale


def four_bit_eigen(iterations: int = 2, *, basis: Literal["qr", "eigh"] = "qr") -> FourBitEigen:
    """Store the eigenvectors of a symmetric matrix in 4 bits, its eigenvalues exactly.

    A = V diag(l) V^T. The entries of V are kept relative to the largest of every 64 of a
    column, two to a byte. Decoding makes V orthogonal again by V <- 1.5 V - 0.5 V V^T V
    (Bjorck). Encoding does one step of orthogonal iteration from the basis that is stored,
    V = qr(A V_old), l = diag(V^T A V): cheap, and exact only once the basis has settled, so a
    matrix that changes at once is followed over some steps. The first code is exact up to the
    four bits. Rounding eigenvectors costs an inverse root far less than rounding the matrix,
    whose small eigenvalues drown in the error.

    A matrix with anything that is not finite decodes to NaN throughout.

    Args:
        iterations: Steps of the orthogonalisation on decoding.
        basis: "qr" for one step from the stored basis, "eigh" for a whole eigendecomposition
            at every encoding, about twice the time on a CPU and better where A changes fast.

    Raises:
        HyperparameterError: If an argument is out of range.

    Source: arXiv 2405.18144 (4-bit Shampoo).

    Example:
        >>> codec = four_bit_eigen()
        >>> codec.decode(codec.encode(torch.diag(torch.tensor([4.0, 1.0, 0.0]))))
        tensor([[4., 0., 0.],
                [0., 1., 0.],
                [0., 0., 0.]])
    """
    check_count("iterations", iterations, low=0)
    check_choice("basis", basis, ("qr", "eigh"))
    return FourBitEigen(iterations, basis)
