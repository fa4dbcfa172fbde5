"""Batched matrix functions on plain tensors. No state, no trees."""

from shampoo_func.linalg.decompose import Eigh, eigh
from shampoo_func.linalg.layout import with_layout_of
from shampoo_func.linalg.modes import gram, multiply
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
    ema,
    scalar_dtype,
    scaled,
)
from shampoo_func.linalg.solver import Guarded, Root, RootSolver, all_finite, guarded

__all__ = [
    "AutoRoot",
    "ChebyshevRoot",
    "CholeskyRoot",
    "Eigh",
    "EighRoot",
    "Guarded",
    "HigherOrderNewtonRoot",
    "NewtonDbRoot",
    "NewtonRoot",
    "NewtonSchulzRoot",
    "PseudoInverse",
    "Root",
    "RootSolver",
    "align",
    "all_finite",
    "auto_root",
    "bias_correction",
    "chebyshev_root",
    "cholesky_root",
    "compute_dtype",
    "eigh",
    "eigh_root",
    "ema",
    "gram",
    "guarded",
    "higher_order_newton_root",
    "multiply",
    "newton_db_root",
    "newton_root",
    "newton_schulz_root",
    "scalar_dtype",
    "scaled",
    "with_layout_of",
]
