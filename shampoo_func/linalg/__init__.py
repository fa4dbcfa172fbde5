"""Batched matrix functions on plain tensors. No state, no trees."""

from shampoo_func.linalg.decompose import Eigh, eigh
from shampoo_func.linalg.layout import with_layout_of
from shampoo_func.linalg.modes import gram, multiply
from shampoo_func.linalg.roots import EighRoot, PseudoInverse, eigh_root
from shampoo_func.linalg.scaling import (
    align,
    bias_correction,
    compute_dtype,
    ema,
    scalar_dtype,
    scaled,
)
from shampoo_func.linalg.solver import Guarded, Root, RootSolver, all_finite, guarded

__all__ = [
    "EighRoot",
    "Guarded",
    "PseudoInverse",
    "Root",
    "RootSolver",
    "align",
    "all_finite",
    "bias_correction",
    "compute_dtype",
    "eigh_root",
    "ema",
    "gram",
    "guarded",
    "multiply",
    "scalar_dtype",
    "scaled",
    "with_layout_of",
]
