"""Inverse root solvers: batched functions of symmetric positive semi-definite matrices."""

from shampoo_func.linalg.roots.auto import AutoRoot, auto_root
from shampoo_func.linalg.roots.chebyshev import ChebyshevRoot, chebyshev_root
from shampoo_func.linalg.roots.cholesky import CholeskyRoot, cholesky_root
from shampoo_func.linalg.roots.eigh_root import EighRoot, PseudoInverse, eigh_root
from shampoo_func.linalg.roots.higher_order import HigherOrderNewtonRoot, higher_order_newton_root
from shampoo_func.linalg.roots.newton import NewtonRoot, newton_root
from shampoo_func.linalg.roots.newton_db import NewtonDbRoot, newton_db_root
from shampoo_func.linalg.roots.newton_schulz import NewtonSchulzRoot, newton_schulz_root

__all__ = [
    "AutoRoot",
    "ChebyshevRoot",
    "CholeskyRoot",
    "EighRoot",
    "HigherOrderNewtonRoot",
    "NewtonDbRoot",
    "NewtonRoot",
    "NewtonSchulzRoot",
    "PseudoInverse",
    "auto_root",
    "chebyshev_root",
    "cholesky_root",
    "eigh_root",
    "higher_order_newton_root",
    "newton_db_root",
    "newton_root",
    "newton_schulz_root",
]
