"""Batched matrix functions on plain tensors. No state, no trees."""

from shampoo_func.linalg.bases import (
    Basis,
    BasisSolver,
    EighBasis,
    QrBasis,
    eigh_basis,
    off_diagonal,
    qr_basis,
)
from shampoo_func.linalg.control import choose, compute_where
from shampoo_func.linalg.diagonal import diagonal, with_diagonal
from shampoo_func.linalg.eigenpairs import eigenpairs
from shampoo_func.linalg.layout import with_layout_of
from shampoo_func.linalg.modes import gram, mode_norms, multiply
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
    "Basis",
    "BasisSolver",
    "EighBasis",
    "EighRoot",
    "Guarded",
    "NewtonSchulzPolar",
    "PolarMethod",
    "PseudoInverse",
    "QrBasis",
    "Root",
    "RootSolver",
    "SvdPolar",
    "align",
    "all_finite",
    "bias_correction",
    "choose",
    "compute_dtype",
    "compute_where",
    "diagonal",
    "eigenpairs",
    "eigh_basis",
    "eigh_root",
    "ema",
    "gram",
    "guarded",
    "mode_norms",
    "multiply",
    "newton_schulz_polar",
    "normalized",
    "off_diagonal",
    "polar_express",
    "polar_express_coefficients",
    "qr_basis",
    "scalar_dtype",
    "scaled",
    "svd_polar",
    "with_diagonal",
    "with_layout_of",
]
