"""The four-function protocol's members and combinators. Stacks and linalg, nothing else."""

from shampoo_func.preconditioners.eigenbasis import (
    InEigenbasis,
    InEigenbasisState,
    in_eigenbasis,
)
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

__all__ = [
    "Eigendecomposed",
    "EigendecomposedState",
    "Graft",
    "GraftState",
    "IdentityPreconditioner",
    "InEigenbasis",
    "InEigenbasisState",
    "Kronecker",
    "KroneckerState",
    "SecondMoment",
    "SecondMomentState",
    "eigendecomposed",
    "graft",
    "identity_preconditioner",
    "in_eigenbasis",
    "kronecker",
    "second_moment",
]
