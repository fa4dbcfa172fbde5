"""Leaves in bfloat16: half the bytes of float32, all of its range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_func.codecs.codec import ROLES, Codec
from shampoo_func.linalg._shapes import Float

__all__ = ["Bfloat16Code", "Bfloat16Codec", "bfloat16_codec"]


class Bfloat16Code(NamedTuple):
    """rounded: the value in bfloat16. dtype: `[*shape, 0]`, empty, in the value's own dtype."""

    rounded: Tensor
    dtype: Tensor


@dataclass(frozen=True, slots=True)
class Bfloat16Codec(Codec):
    """See `bfloat16_codec`."""

    @property
    def roles(self) -> frozenset[str]:
        """All."""
        return ROLES

    def encode(
        self, value: Float[Tensor, "*shape"], previous: Bfloat16Code | None = None
    ) -> Bfloat16Code:
        """Round."""
        return Bfloat16Code(value.to(torch.bfloat16), value.new_empty((*value.shape, 0)))

    def decode(self, code: Bfloat16Code) -> Float[Tensor, "*shape"]:
        """Return the rounded value in its own dtype."""
        return code.rounded.to(code.dtype.dtype)

    def like(self, code: Bfloat16Code) -> Tensor:
        """Return a tensor without data in the shape and strides of the value."""
        return torch.empty_like(code.rounded, dtype=code.dtype.dtype, device="meta")


def bfloat16_codec() -> Bfloat16Codec:
    """Round to bfloat16 between steps: 2 bytes per number, relative error at most 2^-8.

    The arithmetic stays in the dtype of the state; only what is kept is rounded. For symmetric
    matrices `symmetric_packing(torch.bfloat16)` needs half as much again. An average whose
    1 - beta2 is below 2^-8 hardly moves once it is rounded at every step.

    Source: arXiv 2605.26327 (bfloat16 storage of Shampoo's and SOAP's matrices).

    Example:
        >>> codec = bfloat16_codec()
        >>> codec.decode(codec.encode(torch.tensor([1.0, 1.001])))
        tensor([1., 1.])
    """
    return Bfloat16Codec()
