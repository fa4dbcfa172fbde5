"""Half of a symmetric matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_func.codecs.codec import SYMMETRIC, Codec
from shampoo_func.codecs.triangle import matrix_size, pack, unpack
from shampoo_func.errors import check_dtype
from shampoo_func.linalg._shapes import Float

__all__ = ["PackedCode", "SymmetricPacking", "symmetric_packing"]


class PackedCode(NamedTuple):
    """triangle: `[*batch, n (n + 1) / 2]`. dtype: `[*batch, 0]`, empty, in the value's dtype."""

    triangle: Tensor
    dtype: Tensor


@dataclass(frozen=True, slots=True)
class SymmetricPacking(Codec):
    """See `symmetric_packing`."""

    dtype: torch.dtype | None = None

    @property
    def roles(self) -> frozenset[str]:
        """Symmetric matrices."""
        return SYMMETRIC

    def encode(
        self, value: Float[Tensor, "*batch n n"], previous: PackedCode | None = None
    ) -> PackedCode:
        """Return the lower triangle."""
        triangle = pack(value if self.dtype is None else value.to(self.dtype))
        return PackedCode(triangle, value.new_empty((*value.shape[:-2], 0)))

    def decode(self, code: PackedCode) -> Float[Tensor, "*batch n n"]:
        """Return the whole matrix."""
        return unpack(code.triangle).to(code.dtype.dtype)

    def like(self, code: PackedCode) -> Tensor:
        """Return a tensor without data in the shape of the matrix."""
        size = matrix_size(code.triangle.shape[-1])
        shape = (*code.triangle.shape[:-1], size, size)
        return torch.empty(shape, dtype=code.dtype.dtype, device="meta")


def symmetric_packing(dtype: torch.dtype | None = None) -> SymmetricPacking:
    """Keep one triangle of a symmetric matrix: n (n + 1) / 2 numbers instead of n^2.

    The triangle is the lower one, which is the one that `torch.linalg.eigh` reads; so Shampoo
    with packed factors and roots has the bits of Shampoo without. (What reads both triangles,
    `qr_basis` and `eigenvalues="every_step"`, has them to rounding: the two triangles of a
    product G G^T may differ in the last bit.) It is the one codec that rounds nothing, and so
    the one that can be differentiated.

    Args:
        dtype: What the triangle is stored in; the value's own dtype, exactly, if not given.
            With `torch.bfloat16` a number has 8 bits of precision: an average with
            1 - beta2 < 1/256 hardly moves in it.

    Raises:
        HyperparameterError: If `dtype` is no floating-point dtype.

    Source: the symmetric packing of the reference implementation of arXiv 2309.06497, which
        keeps the upper triangle.

    Example:
        >>> codec, matrix = symmetric_packing(), torch.tensor([[1.0, 2.0], [2.0, 5.0]])
        >>> codec.encode(matrix).triangle
        tensor([1., 2., 5.])
        >>> torch.equal(codec.decode(codec.encode(matrix)), matrix)
        True
    """
    check_dtype("dtype", dtype)
    return SymmetricPacking(dtype)
