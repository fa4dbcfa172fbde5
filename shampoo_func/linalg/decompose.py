"""Eigendecomposition that never raises over a value, and that uses every core of a CPU."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from shampoo_func.linalg._shapes import Float

__all__ = ["Eigh", "eigh", "probe"]


class Eigh(NamedTuple):
    """A symmetric eigendecomposition A = Q diag(l) Q^T, and how well it fits.

    values: l, `[*batch, n]`, ascending. vectors: Q, `[*batch, n, n]`, column-major.
    residual: `[*batch]`, |A v - Q diag(l) Q^T v| / (max|l| |v|) for a fixed vector v; inf where
    the decomposition failed, and values and vectors are then NaN.
    """

    values: Tensor
    vectors: Tensor
    residual: Tensor


def eigh(matrix: Float[Tensor, "*batch n n"], *, retry_double: bool = False) -> Eigh:
    """Decompose a stack of symmetric matrices; a matrix that cannot be gets NaN, alone.

    `torch.linalg.eigh` raises for the whole stack when one matrix fails. On a CPU the matrices
    of a stack are spread over `torch.get_num_threads()` workers of one thread each, since LAPACK
    gains little from threads below n = 1024; what a worker returns has the bits that
    `torch.linalg.eigh` has on one thread. Elsewhere it is `torch.linalg.eigh`.

    It can be compiled and mapped, but has no derivative; `eigenpairs` has.

    Args:
        matrix: `[*batch, n, n]`, symmetric; only the lower triangle is decomposed.
        retry_double: Decompose a matrix again in float64 where the first decomposition failed
            or its residual is above the square root of the machine precision.

    Example:
        >>> stack = torch.stack([torch.eye(2), torch.full((2, 2), float("nan"))])
        >>> found = eigh(stack)
        >>> found.values, found.residual
        (tensor([[1., 1.],
                [nan, nan]]), tensor([0., inf]))
    """
    if _is_plain(matrix):
        return Eigh(*_decompose(matrix, retry_double))
    return Eigh(*_eigh(matrix, retry_double))


def probe(like: Tensor) -> Float[Tensor, " n"]:
    """Return the fixed unit vector on which residuals are measured.

    Args:
        like: `[*batch, n, n]`; gives the size, dtype and device.
    """
    places = torch.arange(like.shape[-1], dtype=like.dtype, device=like.device)
    vector = torch.cos(1.0 + places * places)
    return vector / torch.linalg.vector_norm(vector)


def _is_plain(matrix: Tensor) -> bool:
    """Whether nothing traces, maps or differentiates, so that the dispatcher can be spared."""
    if torch.compiler.is_compiling() or type(matrix) is not Tensor:
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(matrix)
    return not (wrapped or (matrix.requires_grad and torch.is_grad_enabled()))


# the schema is written out: it cannot be inferred where jaxtyping wraps the annotations
@torch.library.custom_op(
    "shampoo_func::eigh",
    mutates_args=(),
    schema="(Tensor matrix, bool retry_double) -> (Tensor, Tensor, Tensor)",
)
def _eigh(matrix: Tensor, retry_double: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _decompose(matrix.detach(), retry_double)


@_eigh.register_fake
def _fake(matrix: Tensor, retry_double: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        matrix.new_empty(matrix.shape[:-1]),
        matrix.new_empty(matrix.shape).mT,
        matrix.new_empty(matrix.shape[:-2]),
    )


@_eigh.register_vmap
def _vmap(
    info: Any, in_dims: tuple[int | None, ...], matrix: Tensor, retry_double: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
    return _eigh(matrix.movedim(in_dims[0] or 0, 0), retry_double), (0, 0, 0)


def _decompose(matrix: Tensor, retry_double: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, vectors and residual of real tensors, whose values may be looked at."""
    size = matrix.shape[-1]
    values = matrix.new_empty(matrix.shape[:-1])
    transposed = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
    residual = matrix.new_empty(matrix.shape[:-2])
    if matrix.numel() == 0:
        return values, transposed.mT, residual.zero_()
    stack = matrix.reshape(-1, size, size)
    # views: what is written into them stands in the results
    found = (values.view(-1, size), transposed.view(-1, size, size), residual.view(-1))
    _spread(stack, *found)
    if retry_double and matrix.dtype != torch.float64 and matrix.device.type != "mps":
        # a look at the values; eigh itself has taken one already
        bad = ~(found[2] <= torch.finfo(matrix.dtype).eps ** 0.5)
        if bool(bad.any()):
            again = _decompose(stack[bad].double(), False)
            found[0][bad] = again[0].to(matrix.dtype)
            found[1][bad] = again[1].mT.to(matrix.dtype)
            found[2][bad] = again[2].to(matrix.dtype)
    return values, transposed.mT, residual


# Below this many multiplications (batch * n^3) a thread costs more than it saves.
_WORTH_A_THREAD = 2**21
# Matrices are decomposed so many elements at a time, so that the residual finds them in cache.
_PIECE = 2**19
_pools: dict[int, ThreadPoolExecutor] = {}
# A forked process has the pool's memory but none of its threads.
os.register_at_fork(after_in_child=_pools.clear)


def _pool(workers: int) -> ThreadPoolExecutor:
    """Return the workers, each with one thread for LAPACK; the caller's setting stays."""
    if workers not in _pools:
        _pools[workers] = ThreadPoolExecutor(
            workers, "shampoo-func-eigh", initializer=torch.set_num_threads, initargs=(1,)
        )
    return _pools[workers]


def _spread(stack: Tensor, values: Tensor, transposed: Tensor, residual: Tensor) -> None:
    """Decompose `[batch, n, n]` piece by piece, on several cores where that pays."""
    batch, size = stack.shape[:2]
    threads = torch.get_num_threads()
    spread = min(threads, batch) > 1 and batch * size**3 >= _WORTH_A_THREAD
    workers = threads if spread else 1
    # so many rounds that a piece fits in cache, in each of which every worker has a piece
    pieces = min(batch, workers * -(-batch * size**2 // (workers * _PIECE)))
    if stack.device.type != "cpu" or pieces == 1:
        _write(stack, values, transposed, residual)
        return
    parts = zip(
        *(torch.tensor_split(t, pieces) for t in (stack, values, transposed, residual)),
        strict=True,
    )
    if spread:
        list(_pool(threads).map(lambda tensors: _write(*tensors), parts))
        return
    for tensors in parts:
        _write(*tensors)


def _write(stack: Tensor, values: Tensor, transposed: Tensor, residual: Tensor) -> None:
    """Decompose `[batch, n, n]` together, or one by one where one of them fails."""
    try:
        torch.linalg.eigh(stack, out=(values, transposed.mT))
    except LinAlgError:
        if len(stack) > 1:
            alone = (torch.split(t, 1) for t in (stack, values, transposed, residual))
            for tensors in zip(*alone, strict=True):
                _write(*tensors)
            return
        values.fill_(torch.nan)
        transposed.fill_(torch.nan)
    residual.copy_(_residual(stack, values, transposed))


def _residual(stack: Tensor, values: Tensor, transposed: Tensor) -> Tensor:
    """Return |A v - Q diag(l) Q^T v| / max|l|, `[batch]`, inf where it is not a number."""
    vector = _kept_probe(stack.shape[-1], stack.dtype, stack.device)
    weights = values * (transposed @ vector)
    error = stack @ vector - (weights.unsqueeze(-2) @ transposed).squeeze(-2)
    largest = values.abs().amax(-1, keepdim=True)
    error = error / torch.where(largest > 0, largest, 1.0)
    return torch.linalg.vector_norm(error, dim=-1).nan_to_num(nan=torch.inf, posinf=torch.inf)


@functools.lru_cache(maxsize=64)
def _kept_probe(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return probe(torch.empty((0, size, size), dtype=dtype, device=device))
