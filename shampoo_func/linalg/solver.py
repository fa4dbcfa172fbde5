"""What every inverse root solver is: the protocol, its result, and the guard around it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_func.errors import HyperparameterError, check_number
from shampoo_func.linalg._shapes import Bool, Float
from shampoo_func.linalg.control import choose
from shampoo_func.types import Scalar

__all__ = ["Guarded", "Root", "RootSolver", "all_finite", "guarded", "identity_root"]


class Root(NamedTuple):
    """An inverse root, how well it fits, and whether it can be used.

    value: `[*batch, n, n]`, symmetric (but for `cholesky_root`). residual: `[*batch]`, the
    solver's own relative measure of how far it is from a root; 0 where there is none. ok:
    `[*batch]`, False where a matrix or its root is not finite, or where the solver did not
    converge; `value` must then not be used.
    """

    value: Tensor
    residual: Tensor
    ok: Tensor


class RootSolver(ABC):
    """A function from symmetric positive semi-definite matrices to their inverse roots.

    Subclasses are frozen slotted dataclasses: they print, compare, hash and pickle. They never
    raise over a value and never return a NaN with `ok` set.
    """

    __slots__ = ()

    epsilon: Scalar

    @abstractmethod
    def __call__(self, matrix: Float[Tensor, "*batch n n"], exponent: float) -> Root:
        """Return `matrix ** -exponent`, `[*batch, n, n]`, with residual and ok, `[*batch]`."""

    def check_exponent(self, exponent: float) -> None:
        """Check that this solver can take this exponent; most can take any.

        Raises:
            HyperparameterError: If it cannot; the message says which it can, and what to use.
        """
        check_number("exponent", exponent)


@dataclass(frozen=True, slots=True)
class Guarded:
    """See `guarded`."""

    solver: RootSolver
    max_residual: float | None = None

    def __call__(
        self,
        matrix: Float[Tensor, "*batch n n"],
        exponent: float,
        previous: Float[Tensor, "*batch n n"],
    ) -> Root:
        """Return the new root where it can be used, else `previous`; `ok` says which."""
        root = self.solver(matrix, exponent)
        ok = root.ok
        if self.max_residual is not None:
            ok = ok & (root.residual <= self.max_residual)
        kept = choose(ok, root.value.to(previous.dtype), previous)
        return Root(kept, root.residual, ok)

    @property
    def epsilon(self) -> Scalar:
        """The damping of the solver inside."""
        return self.solver.epsilon

    def check_exponent(self, exponent: float) -> None:
        """Check that the solver inside can take this exponent."""
        self.solver.check_exponent(exponent)


def guarded(solver: RootSolver, *, max_residual: float | None = None) -> Guarded:
    """Keep the previous root where a new one cannot be used.

    A Kronecker preconditioner guards its solver with this, and counts in its state how often
    each block had to keep its root; wrap the solver yourself to ask for a small residual.

    Args:
        solver: An inverse root solver.
        max_residual: Largest residual that is still good, relative; None for what the solver
            itself calls good.

    Raises:
        HyperparameterError: If `solver` is no root solver, or the number is out of range.

    Example:
        >>> from shampoo_func.linalg import eigh_root
        >>> root = guarded(eigh_root(epsilon=0.0))
        >>> poisoned = torch.full((2, 2), float("nan"))
        >>> value, _, ok = root(poisoned, 0.5, previous=torch.eye(2))
        >>> value, ok
        (tensor([[1., 0.],
                [0., 1.]]), tensor(False))
    """
    if not isinstance(solver, RootSolver):
        raise HyperparameterError(
            f"solver must be a root solver such as eigh_root(), got {solver!r}."
        )
    if max_residual is not None:
        check_number("max_residual", max_residual)
    return Guarded(solver, max_residual)


def all_finite(matrix: Float[Tensor, "*batch n n"]) -> Bool[Tensor, "*batch"]:
    """Return, per matrix, whether every element is finite."""
    return torch.isfinite(matrix).all(-1).all(-1)


def identity_root(matrix: Float[Tensor, "*batch n n"]) -> Root:
    """Return the root for exponent 0, and that of matrices without elements: the identity."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    finite = all_finite(matrix)
    residual = torch.where(finite, 0.0, torch.inf).to(matrix.dtype)
    return Root(eye.expand(matrix.shape).clone(), residual, finite)
