"""Scalars that may be numbers, 0-d tensors, or one value per block, applied to tensors."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shampoo_func.linalg.control import is_transformed
from shampoo_func.types import Scalar

__all__ = [
    "align",
    "bias_correction",
    "compute_dtype",
    "computed_once",
    "ema",
    "scalar_dtype",
    "scaled",
]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that arithmetic on `dtype` is done in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def scalar_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of 0-d hyper-parameters: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def align(value: Scalar, like: torch.Tensor) -> Scalar:
    """Reshape a value per block, `[n]`, so that it broadcasts over `like`, `[n, d1, ..., dk]`.

    Numbers and 0-d tensors broadcast as they are. The dtype becomes the one in which `like`
    is computed, so that a float64 scalar does not turn a float32 tensor into float64.
    """
    return _aligned(value, like) if isinstance(value, torch.Tensor) else value


def _aligned(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    wanted = compute_dtype(like.dtype)
    if value.ndim == 0 and like.dtype == wanted:
        return value.to(wanted)  # DTensor warns of a shape of ones, and needs none
    shape = value.shape + (1,) * (like.ndim - value.ndim)
    return value.reshape(shape).to(wanted)


def scaled(x: torch.Tensor, factor: Scalar) -> torch.Tensor:
    """Return `x * factor` in the dtype of `x`."""
    if not isinstance(factor, torch.Tensor):
        return x * factor
    return (x * _aligned(factor, x)).to(x.dtype)


def ema(average: torch.Tensor, new: torch.Tensor, decay: Scalar) -> torch.Tensor:
    """Return `decay * average + (1 - decay) * new` in the dtype and strides of `average`."""
    weight = align(decay, average)
    return (average * weight + new * (1 - weight)).to(average.dtype)


def bias_correction(decay: Scalar, step: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return `1 - decay**step`, shaped to broadcast over `like`.

    Args:
        decay: The decay of an exponential moving average that started at zero.
        step: int64 counter, 0-d or one per block; the updates done, at least 1.
        like: The average that is to be corrected.
    """
    correction = 1 - decay ** step.to(scalar_dtype(step.device))
    return computed_once(_aligned(correction, like))


def computed_once(value: torch.Tensor) -> torch.Tensor:
    """Return the value as it is, in a compiled graph from memory.

    Inductor computes a value again wherever it is used: a correction per block for every
    element that it is combined with, a power in double precision among them, which tripled the
    time of AdamW on a CPU; a moving average once for the update and once more, at the end of
    the step, for the state. A strided view has to be of something that is in memory.

    Args:
        value: A tensor that is used more than once.
    """
    if not torch.compiler.is_compiling() or is_transformed():
        return value
    wrapper: bool = is_traceable_wrapper_subclass(value)
    if wrapper:  # a DTensor has no strided views
        return value
    return value.as_strided(value.shape, value.stride())
