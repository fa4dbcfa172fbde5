"""The four-function protocol's members and combinators. Stacks and linalg, nothing else."""

from shampoo_func.preconditioners.elementwise import (
    IdentityPreconditioner,
    SecondMoment,
    SecondMomentState,
    identity_preconditioner,
    second_moment,
)
from shampoo_func.preconditioners.graft import Graft, GraftState, graft
from shampoo_func.preconditioners.kronecker import Kronecker, KroneckerState, kronecker
from shampoo_func.preconditioners.quantized import Encoded, Quantized, quantized

__all__ = [
    "Encoded",
    "Graft",
    "GraftState",
    "IdentityPreconditioner",
    "Kronecker",
    "KroneckerState",
    "Quantized",
    "SecondMoment",
    "SecondMomentState",
    "graft",
    "identity_preconditioner",
    "kronecker",
    "quantized",
    "second_moment",
]
