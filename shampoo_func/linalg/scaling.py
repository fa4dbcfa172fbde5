"""Scalars that may be numbers, 0-d tensors, or one value per block, applied to tensors."""

from __future__ import annotations

import torch

from shampoo_func.types import Scalar

__all__ = ["align", "bias_correction", "compute_dtype", "ema", "scalar_dtype", "scaled"]


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
    if not isinstance(value, torch.Tensor):
        return value
    wanted = compute_dtype(like.dtype)
    if value.ndim == 0 and like.dtype == wanted:
        return value.to(wanted)  # DTensor warns of a shape of ones, and needs none
    shape = value.shape + (1,) * (like.ndim - value.ndim)
    return value.reshape(shape).to(wanted)


def scaled(x: torch.Tensor, factor: Scalar) -> torch.Tensor:
    """Return `x * factor` in the dtype of `x`."""
    return (x * align(factor, x)).to(x.dtype)


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
    return align(correction, like)  # type: ignore[return-value]
