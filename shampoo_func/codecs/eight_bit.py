"""One byte per number, with a scale for every run of numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.codecs.blockwise import scale_of, spread
from shampoo_func.codecs.codec import SYMMETRIC, Codec
from shampoo_func.codecs.triangle import pack, unpack
from shampoo_func.errors import HyperparameterError, check_choice, check_count
from shampoo_func.linalg._shapes import Float

__all__ = ["BytesCode", "EightBit", "TriangleCode", "eight_bit"]

Form = Literal["signed", "unsigned", "symmetric"]


class BytesCode(NamedTuple):
    """byte: one per number, in the value's shape and strides. scale: `[*batch, blocks]`."""

    byte: Tensor
    scale: Tensor


class TriangleCode(NamedTuple):
    """A symmetric matrix.

    byte: `[*batch, n (n + 1) / 2]`, the lower triangle of the matrix scaled to a unit diagonal,
    the diagonal itself left out (0). scale: `[*batch, blocks]`. diagonal: `[*batch, n]`, exact.
    """

    byte: Tensor
    scale: Tensor
    diagonal: Tensor


@dataclass(frozen=True, slots=True)
class EightBit(Codec):
    """See `eight_bit`."""

    block: int = 256
    form: Form | None = None

    @property
    def roles(self) -> frozenset[str]:
        """Which roles the form is for; all but eigenvalues if there is none."""
        signed, unsigned = frozenset({"basis", "momentum"}), frozenset({"second_moment"})
        forms = {"signed": signed, "unsigned": unsigned, "symmetric": SYMMETRIC}
        return signed | unsigned | SYMMETRIC if self.form is None else forms[self.form]

    def for_role(self, role: str) -> Codec:
        """Return this codec in the form that suits a role."""
        Codec.for_role(self, role)
        if role in SYMMETRIC:
            return replace(self, form="symmetric")
        return replace(self, form="unsigned" if role == "second_moment" else "signed")

    def encode(self, value: Float[Tensor, "*shape"], previous: Any = None) -> Any:
        """Return one byte per number, and the scales."""
        wide = value.to(linalg.compute_dtype(value.dtype))
        if self.form == "symmetric":
            return self._encode_symmetric(wide, value.dtype)
        batch = 0 if previous is None else previous.scale.ndim - 1
        numbers = wide.reshape(*value.shape[:batch], -1)
        scale = scale_of(numbers, self.block).to(value.dtype)
        relative = numbers / self._divisor(scale, numbers.shape[-1])
        byte = _unsigned(relative) if self.form == "unsigned" else _signed(relative)
        return BytesCode(linalg.with_layout_of(byte.reshape(value.shape), value), scale)

    def decode(self, code: Any) -> Float[Tensor, "*shape"]:
        """Return the numbers that the bytes stand for."""
        if self.form == "symmetric":
            return self._decode_symmetric(code)
        batch = code.scale.ndim - 1
        byte = code.byte.reshape(*code.byte.shape[:batch], -1)
        scale = spread(code.scale, byte.shape[-1], self.block)
        relative = _from_unsigned if self.form == "unsigned" else _from_signed
        value = (relative(byte, scale.dtype) * scale).to(code.scale.dtype)
        return linalg.with_layout_of(value.reshape(code.byte.shape), code.byte)

    def like(self, code: Any) -> Tensor:
        """Return a tensor without data in the shape and strides of the value."""
        if self.form == "symmetric":
            size = code.diagonal.shape[-1]
            shape = (*code.diagonal.shape, size)
            return torch.empty(shape, dtype=code.diagonal.dtype, device="meta")
        return torch.empty_like(code.byte, dtype=code.scale.dtype, device="meta")

    def _encode_symmetric(self, value: Tensor, dtype: torch.dtype) -> TriangleCode:
        diagonal = value.diagonal(dim1=-2, dim2=-1)
        unit = _unit(diagonal)
        eye = torch.eye(value.shape[-1], dtype=torch.bool, device=value.device)
        off = torch.where(eye, 0.0, value / unit.unsqueeze(-1) / unit.unsqueeze(-2))
        numbers = pack(off)
        scale = scale_of(numbers, self.block).to(dtype)
        byte = _linear(numbers / self._divisor(scale, numbers.shape[-1]))
        return TriangleCode(
            byte, scale, diagonal.to(dtype).clone(memory_format=torch.contiguous_format)
        )

    def _decode_symmetric(self, code: TriangleCode) -> Tensor:
        scale = spread(code.scale, code.byte.shape[-1], self.block)
        diagonal = code.diagonal.to(scale.dtype)
        row, column = torch.tril_indices(*[diagonal.shape[-1]] * 2, device=diagonal.device)
        unit = _unit(diagonal)
        units = unit.index_select(-1, row) * unit.index_select(-1, column)
        off = code.byte.to(scale.dtype) / 127 * scale * units
        packed = torch.where(row == column, diagonal.index_select(-1, row), off)
        return unpack(packed).to(code.diagonal.dtype)

    def _divisor(self, scale: Tensor, size: int) -> Tensor:
        """Return what to divide by: the scale, or 1 where all is 0 or something not finite."""
        return spread(torch.where(scale > 0, scale, 1.0), size, self.block)


def _unit(diagonal: Tensor) -> Tensor:
    """Return the roots of a diagonal, 1 where it is 0: a matrix divided by them is even."""
    return torch.where(diagonal == 0, 1.0, diagonal.abs().sqrt())


def _linear(relative: Tensor) -> Tensor:
    """Return codes of numbers in [-1, 1], evenly spaced: best for a matrix's correlations."""
    return (relative.clamp(-1.0, 1.0) * 127).round().nan_to_num().to(torch.int8)


def _signed(relative: Tensor) -> Tensor:
    """Return codes of numbers in [-1, 1]: sign and root, so that small ones get more codes."""
    root = relative.abs().sqrt().clamp(max=1.0) * relative.sign()
    return (root * 127).round().nan_to_num().to(torch.int8)


def _from_signed(byte: Tensor, dtype: torch.dtype) -> Tensor:
    root = byte.to(dtype)
    return root * root.abs() / 127**2


def _unsigned(relative: Tensor) -> Tensor:
    """Return codes of numbers in [0, 1]: the fourth root; only 0 itself is given the code 0."""
    code = (relative.clamp(0.0, 1.0).sqrt().sqrt() * 255).round()
    return torch.where(relative > 0, code.clamp(min=1), 0.0).nan_to_num().to(torch.uint8)


def _from_unsigned(byte: Tensor, dtype: torch.dtype) -> Tensor:
    square = (byte.to(dtype) / 255).square()
    return square.square()


def eight_bit(block: int = 256, *, form: Form | None = None) -> EightBit:
    """Store one byte per number, relative to the largest magnitude s of its run of `block`.

    In the three forms a code c stands for

        signed      s sign(c) (c / 127)^2
        unsigned    s (c / 255)^4
        symmetric   A_ij = sqrt(A_ii A_jj) s c / 127,  A_ii exact

    Powers give small numbers more codes. An error of `signed` is at most s / 127; one of
    `unsigned` at most 2 % for numbers above s / 16 and 8 % above s / 4000, and no number but 0
    becomes 0, so that a second moment is never divided by where nothing is left of it.
    `symmetric` keeps the lower triangle, n (n + 1) / 2 bytes, and the diagonal; as it rounds
    correlations, badly scaled rows lose no more than others.

    The resolution is some 1 %: an average with 1 - beta2 much below that moves only by the
    noise in what is averaged.

    Args:
        block: Numbers that share a scale: 64 to 2048, smaller is better and larger.
        form: Which of the three; None chooses by the role ("unsigned" for second moments,
            "symmetric" for factors and roots), "signed" where there is no role.

    Raises:
        HyperparameterError: If an argument is out of range.

    Source: arXiv 2110.02861 (block-wise 8-bit states); the powers, and rounding correlations
        instead of the matrix, are this library's.

    Example:
        >>> codec = eight_bit(64)
        >>> codec.decode(codec.encode(torch.tensor([1.0, 0.25, 0.0, -0.01])))
        tensor([ 1.0000,  0.2540,  0.0000, -0.0105])
    """
    check_count("block", block)
    if not 64 <= block <= 2048:
        raise HyperparameterError(f"block must lie in [64, 2048], got {block}.")
    if form is not None:
        check_choice("form", form, ("signed", "unsigned", "symmetric"))
    return EightBit(block, form)
