"""The four-function protocol's members and combinators. Stacks and linalg, nothing else."""

from shampoo_func.preconditioners.eigenbasis import InEigenbasis, in_eigenbasis
from shampoo_func.preconditioners.eigenbasis_state import InEigenbasisState
from shampoo_func.preconditioners.eigendecomposed import (
    Eigendecomposed,
    EigendecomposedState,
    eigendecomposed,
)
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
from shampoo_func.preconditioners.quantized import Encoded, Quantized, quantized
from shampoo_func.preconditioners.scalar import (
    ScalarSecondMoment,
    ScalarSecondMomentState,
    scalar_second_moment,
)
from shampoo_func.preconditioners.sign import Sign, SignScale, SignState, sign_preconditioner
from shampoo_func.preconditioners.subsampled import Subsampled, SubsampledState, subsampled

__all__ = [
    "Eigendecomposed",
    "EigendecomposedState",
    "Encoded",
    "Graft",
    "GraftState",
    "IdentityPreconditioner",
    "InEigenbasis",
    "InEigenbasisState",
    "Kronecker",
    "KroneckerState",
    "Polar",
    "PolarScale",
    "PolarState",
    "Quantized",
    "ScalarSecondMoment",
    "ScalarSecondMomentState",
    "SecondMoment",
    "SecondMomentState",
    "Sign",
    "SignScale",
    "SignState",
    "Subsampled",
    "SubsampledState",
    "eigendecomposed",
    "graft",
    "identity_preconditioner",
    "in_eigenbasis",
    "kronecker",
    "polar",
    "quantized",
    "scalar_second_moment",
    "second_moment",
    "sign_preconditioner",
    "subsampled",
]
