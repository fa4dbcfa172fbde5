"""Batched matrix functions on plain tensors. No state, no trees."""

from shampoo_func.linalg.layout import with_layout_of
from shampoo_func.linalg.modes import gram, multiply
from shampoo_func.linalg.roots import EighRoot, PseudoInverse, Root, eigh_root
from shampoo_func.linalg.scaling import (
    align,
    bias_correction,
    compute_dtype,
    ema,
    scalar_dtype,
    scaled,
)

__all__ = [
    "EighRoot",
    "PseudoInverse",
    "Root",
    "align",
    "bias_correction",
    "compute_dtype",
    "eigh_root",
    "ema",
    "gram",
    "multiply",
    "scalar_dtype",
    "scaled",
    "with_layout_of",
]
