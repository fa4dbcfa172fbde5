"""Batched matrix functions on plain tensors. No state, no trees."""

from shampoo_func.linalg.layout import with_layout_of
from shampoo_func.linalg.modes import gram, multiply
from shampoo_func.linalg.polar import (
    NewtonSchulzPolar,
    PolarMethod,
    SvdPolar,
    newton_schulz_polar,
    normalized,
    polar_express,
    svd_polar,
)
from shampoo_func.linalg.polar_coefficients import polar_express_coefficients
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
    "NewtonSchulzPolar",
    "PolarMethod",
    "PseudoInverse",
    "Root",
    "RootSolver",
    "SvdPolar",
    "align",
    "all_finite",
    "bias_correction",
    "compute_dtype",
    "eigh_root",
    "ema",
    "gram",
    "guarded",
    "multiply",
    "newton_schulz_polar",
    "normalized",
    "polar_express",
    "polar_express_coefficients",
    "scalar_dtype",
    "scaled",
    "svd_polar",
    "with_layout_of",
]
