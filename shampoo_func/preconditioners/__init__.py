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
from shampoo_func.preconditioners.polar import Polar, PolarScale, PolarState, polar
from shampoo_func.preconditioners.scalar import (
    ScalarSecondMoment,
    ScalarSecondMomentState,
    scalar_second_moment,
)
from shampoo_func.preconditioners.sign import Sign, SignScale, SignState, sign_preconditioner

__all__ = [
    "Graft",
    "GraftState",
    "IdentityPreconditioner",
    "Kronecker",
    "KroneckerState",
    "Polar",
    "PolarScale",
    "PolarState",
    "ScalarSecondMoment",
    "ScalarSecondMomentState",
    "SecondMoment",
    "SecondMomentState",
    "Sign",
    "SignScale",
    "SignState",
    "graft",
    "identity_preconditioner",
    "kronecker",
    "polar",
    "scalar_second_moment",
    "second_moment",
    "sign_preconditioner",
]
