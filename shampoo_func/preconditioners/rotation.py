"""Blocks in the eigenbases of their factors, and those bases' refresh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import HyperparameterError
from shampoo_func.preconditioners.factors import Factors, preconditioned

__all__ = [
    "check_permutable",
    "checked_basis",
    "eye_bases",
    "permuted",
    "refreshed_bases",
    "rotated",
    "rotated_back",
    "scaled_along",
    "transposed",
    "where_started",
]

Bases = tuple[Tensor, ...]


def checked_basis(basis: linalg.BasisSolver | None) -> linalg.BasisSolver:
    """Return the solver, or the default one.

    Raises:
        HyperparameterError: If it is none.
    """
    if basis is None:
        return linalg.eigh_basis()
    if not isinstance(basis, linalg.BasisSolver):
        raise HyperparameterError(
            f"basis must be a solver such as eigh_basis() or qr_basis(), got {basis!r}."
        )
    return basis


def eye_bases(factors: tuple[Tensor, ...], dtype: torch.dtype | None) -> Bases:
    """Return the identity for every factor of one block."""
    return tuple(
        torch.eye(
            factor.shape[-1],
            dtype=dtype or linalg.compute_dtype(factor.dtype),
            device=factor.device,
        )
        for factor in factors
    )


def refreshed_bases(
    solver: linalg.BasisSolver, factors: Factors, state: Any
) -> tuple[Bases, dict[int, linalg.Basis], Tensor]:
    """Return new bases, what the solver found for every factor, and where a block failed."""
    bases = list(state.bases)
    found = {}
    failed = torch.zeros_like(state.failures, dtype=torch.bool)
    for dim in preconditioned(state.factors):
        factor = factors.corrected(state.factors[dim], state.step, solver.epsilon)
        found[dim] = solver(factor, bases[dim].to(factor.dtype))
        vectors = found[dim].vectors.to(bases[dim].dtype)
        bases[dim] = linalg.choose(found[dim].ok, vectors, bases[dim])
        failed = failed | ~found[dim].ok
    return tuple(bases), found, failed


def rotated(bases: Bases, blocks: Tensor) -> Tensor:
    """Return blocks in the eigenbases: G x_1 Q_1^T ... x_k Q_k^T."""
    return _turned(tuple(transposed(basis) for basis in bases), blocks)


def rotated_back(bases: Bases, blocks: Tensor) -> Tensor:
    """Undo `rotated`: G x_1 Q_1 ... x_k Q_k."""
    return _turned(bases, blocks)


def _turned(matrices: Bases, blocks: Tensor) -> Tensor:
    result = blocks
    for dim in preconditioned(matrices):
        matrix = matrices[dim]
        result = linalg.multiply(result.to(matrix.dtype), matrix, dim, len(matrices))
    return result.contiguous()


def transposed(basis: Tensor) -> Tensor:
    """Return Q^T; by .mT, Dynamo would hand the view into a later torch.cond, which refuses it."""
    return basis.transpose(-1, -2)


def scaled_along(blocks: Tensor, factors: Tensor, dim: int, order: int) -> Tensor:
    """Multiply every block by one number per index of a dimension, `[*batch, d]`."""
    around = ((1,) * dim, (1,) * (order - 1 - dim))
    spread = factors.reshape(*factors.shape[:-1], *around[0], factors.shape[-1], *around[1])
    return blocks * spread.to(blocks.dtype)


def where_started(started: Tensor, new: Any, old: Any) -> Any:
    """Return `new` for the blocks that have been refreshed, else `old`, leaf by leaf."""
    if isinstance(new, Tensor):
        return linalg.choose(started, new, old)
    parts = (where_started(started, *pair) for pair in zip(new, old, strict=True))
    return type(new)(*parts) if hasattr(new, "_fields") else tuple(parts)


def check_permutable(roles: Any) -> None:
    """Check that no second moment is a code, whose numbers have no order to change.

    Raises:
        HyperparameterError: If one is.
    """
    if roles == "second_moment code":
        raise HyperparameterError(
            'carry="permute" cannot reorder second moments that are stored as codes; put '
            "quantized(...) around in_eigenbasis(...), not inside it."
        )
    for child in () if isinstance(roles, str) else roles:
        check_permutable(child)


def permuted(state: Any, roles: Any, orders: dict[int, Tensor], failed: Tensor) -> Any:
    """Return a state with its second moments in the order of the bases' new columns.

    Args:
        state: Of a preconditioner in the bases.
        roles: What its leaves are.
        orders: Per dimension, the order of the old columns, `[*batch, d]`.
        failed: `[*batch]`, the blocks whose bases stay, and so their moments.
    """
    if isinstance(state, Tensor):
        if roles != "second_moment" or state.ndim == failed.ndim:
            return state
        result = state
        for dim, order in orders.items():
            result = _taken_along(result, order, failed.ndim + dim)
        return linalg.choose(failed, state, result)
    parts = (permuted(*pair, orders, failed) for pair in zip(state, roles, strict=True))
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def _taken_along(blocks: Tensor, order: Tensor, axis: int) -> Tensor:
    """Return the slices of every block along an axis in the block's own order."""
    shape = [1] * blocks.ndim
    shape[: order.ndim - 1], shape[axis] = list(order.shape[:-1]), order.shape[-1]
    return blocks.gather(axis, order.reshape(shape).expand(blocks.shape))
