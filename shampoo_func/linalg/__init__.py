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
from shampoo_func.linalg.constant import constant_result
from shampoo_func.linalg.control import choose, compute_where, is_transformed
from shampoo_func.linalg.decompose import Eigh, eigh
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
from shampoo_func.linalg.roots import (
    AutoRoot,
    ChebyshevRoot,
    CholeskyRoot,
    EighRoot,
    HigherOrderNewtonRoot,
    NewtonDbRoot,
    NewtonRoot,
    NewtonSchulzRoot,
    PseudoInverse,
    auto_root,
    chebyshev_root,
    cholesky_root,
    eigh_root,
    higher_order_newton_root,
    newton_db_root,
    newton_root,
    newton_schulz_root,
)
from shampoo_func.linalg.scaling import (
    align,
    bias_correction,
    compute_dtype,
    computed_once,
    ema,
    scalar_dtype,
    scaled,
)
from shampoo_func.linalg.sides import multiply_both_sides
from shampoo_func.linalg.solver import Guarded, Root, RootSolver, all_finite, guarded
from shampoo_func.linalg.statistics import add_gram

__all__ = [
    "AutoRoot",
    "Basis",
    "BasisSolver",
    "ChebyshevRoot",
    "CholeskyRoot",
    "Eigh",
    "EighBasis",
    "EighRoot",
    "Guarded",
    "HigherOrderNewtonRoot",
    "NewtonDbRoot",
    "NewtonRoot",
    "NewtonSchulzPolar",
    "NewtonSchulzRoot",
    "PolarMethod",
    "PseudoInverse",
    "QrBasis",
    "Root",
    "RootSolver",
    "SvdPolar",
    "add_gram",
    "align",
    "all_finite",
    "auto_root",
    "bias_correction",
    "chebyshev_root",
    "cholesky_root",
    "choose",
    "compute_dtype",
    "compute_where",
    "computed_once",
    "constant_result",
    "diagonal",
    "eigenpairs",
    "eigh",
    "eigh_basis",
    "eigh_root",
    "ema",
    "gram",
    "guarded",
    "higher_order_newton_root",
    "is_transformed",
    "mode_norms",
    "multiply",
    "multiply_both_sides",
    "newton_db_root",
    "newton_root",
    "newton_schulz_polar",
    "newton_schulz_root",
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
