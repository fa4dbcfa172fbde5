"""Choosing a solver by device, size and exponent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_func.errors import HyperparameterError, check_count
from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg.roots.eigh_root import EighRoot, eigh_root
from shampoo_func.linalg.roots.newton import NewtonRoot, newton_root
from shampoo_func.linalg.roots.scaled import check_damping
from shampoo_func.linalg.solver import Root, RootSolver
from shampoo_func.types import Scalar

__all__ = ["AutoRoot", "auto_root"]


@dataclass(frozen=True, slots=True)
class AutoRoot(RootSolver):
    """See `auto_root`."""

    epsilon: Scalar = 1e-12
    relative_epsilon: Scalar | None = None
    min_size: int = 64
    iterations: int = 20

    def __call__(self, matrix: Float[Tensor, "*batch n n"], exponent: float) -> Root:
        """Return `matrix ** -exponent`, `[*batch, n, n]`, with residual and ok, `[*batch]`."""
        return self.choose(matrix.device, matrix.shape[-1], exponent)(matrix, exponent)

    def choose(self, device: torch.device, size: int, exponent: float) -> EighRoot | NewtonRoot:
        """Return the solver for matrices of this size on this device."""
        newton = newton_root(
            self.epsilon, relative_epsilon=self.relative_epsilon, iterations=self.iterations
        )
        if device.type == "cuda" and size >= self.min_size:
            try:
                newton.check_exponent(exponent)
            except HyperparameterError:
                pass
            else:
                return newton
        relative = 0.0 if self.relative_epsilon is None else self.relative_epsilon
        return eigh_root(self.epsilon, relative_epsilon=relative)


def auto_root(
    epsilon: Scalar = 1e-12,
    *,
    relative_epsilon: Scalar | None = None,
    min_size: int = 64,
    iterations: int = 20,
) -> AutoRoot:
    """Choose a solver by device, size and exponent; no value is looked at.

    On a CPU `eigh_root`: it is several times as fast there as anything made of products. On a
    CUDA device `newton_root` with a fixed number of steps from `min_size` on, since eigh works
    through a stack one matrix after the other there and waits for the host; `eigh_root` below
    that size, and for exponents that are not 1/p. The choice on CUDA follows published timings
    (arXiv 2602.02016) and was not measured by this project.

    Args:
        epsilon: Absolute damping, in the units of the eigenvalues.
        relative_epsilon: Damping relative to the largest eigenvalue (eigh) or |A|_F (Newton).
            None means none for eigh, and 8 machine precisions for Newton.
        min_size: The smallest n for which Newton is used on CUDA.
        iterations: Newton's steps; 20 are exact down to 1e-8 |A|.

    Raises:
        HyperparameterError: If a number is out of range.

    Example:
        >>> type(auto_root().choose(torch.device("cpu"), 256, 0.25)).__name__
        'EighRoot'
    """
    check_damping(epsilon, relative_epsilon)
    check_count("min_size", min_size)
    check_count("iterations", iterations)
    return AutoRoot(epsilon, relative_epsilon, min_size, iterations)
