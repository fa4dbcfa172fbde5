"""Running a coupled iteration: each matrix stops by itself, and never at a worse iterate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_func.errors import check_count, check_number
from shampoo_func.linalg.constant import constant_result
from shampoo_func.linalg.roots.scaled import check_constant

__all__ = ["Iterate", "Stopping", "begin", "check_stopping", "run"]

# An error may grow by so much while the largest eigenvalues pass 1; more is divergence.
_GROWTH = 1.2
# Below this error the iteration converges quadratically, so a standstill is its rounding floor.
_NEAR = 0.1


class Iterate(NamedTuple):
    """Where an iteration stands.

    matrices: what is iterated, each `[*batch, n, n]`. error: `[*batch]`. active: `[*batch]`,
    whether the next step counts. diverged: `[*batch]`, stopped because the error grew.
    """

    matrices: tuple[Tensor, ...]
    error: Tensor
    active: Tensor
    diverged: Tensor


class Stopping(NamedTuple):
    """When an iteration stops: after `iterations`, or at a tolerance."""

    iterations: int | None
    tolerance: float
    max_iterations: int

    def ok(self, end: Iterate) -> Tensor:
        """Whether the result can be used.

        A fixed number of iterations may end before the small eigenvalues have converged: that
        is its damping. Only growth is failure. With a tolerance, the error must be small.
        """
        near = end.error <= max(self.tolerance, _NEAR)
        return near if self.iterations is None else near | ~end.diverged


Step = Callable[[tuple[Tensor, ...]], tuple[tuple[Tensor, ...], Tensor]]


def begin(matrices: tuple[Tensor, ...], error: Tensor, tolerance: float) -> Iterate:
    """Return the iterate to start from."""
    return Iterate(
        matrices, error, ~(error <= tolerance), torch.zeros_like(error, dtype=torch.bool)
    )


def run(step: Step, start: Iterate, stopping: Stopping) -> Iterate:
    """Iterate.

    With `iterations`, a plain loop without any look at a value. With a tolerance, eager code
    looks after every step whether a matrix is still active; compiled code has a
    `torch.while_loop`, or, inside torch.func transforms, which that cannot be mapped or
    differentiated by, `max_iterations` masked steps.

    Args:
        step: Takes the matrices and returns the next ones, and their error.
        start: From `begin`.
        stopping: When to stop.
    """
    tolerance = 0.0 if stopping.iterations is not None else stopping.tolerance

    def advance(old: Iterate) -> Iterate:
        return _advance(step, old, tolerance)

    iterate = start
    if stopping.iterations is not None:
        for _ in range(stopping.iterations):
            iterate = advance(iterate)
        return iterate
    if not torch.compiler.is_compiling():
        for _ in range(stopping.max_iterations):
            if not _any(iterate.active):
                break
            iterate = advance(iterate)
        return iterate
    if _inside_transform():
        for _ in range(stopping.max_iterations):
            iterate = advance(iterate)
        return iterate
    return _while(advance, iterate, stopping.max_iterations)


def _advance(step: Step, old: Iterate, tolerance: float) -> Iterate:
    """Take one step where it is wanted and does no harm."""
    matrices, error = step(old.matrices)
    grew = old.active & ~(error <= _GROWTH * old.error)  # NaN grows
    stalled = (error >= old.error) & (old.error <= _NEAR)
    taken = old.active & ~grew & ~stalled
    chosen = tuple(
        torch.where(taken[..., None, None], new, before)
        for new, before in zip(matrices, old.matrices, strict=True)
    )
    error = torch.where(taken, error, old.error)
    # near convergence a growing error is the rounding floor as well
    diverged = old.diverged | (grew & (old.error > _NEAR))
    return Iterate(chosen, error, taken & ~(error <= tolerance), diverged)


def _while(advance: Callable[[Iterate], Iterate], start: Iterate, limit: int) -> Iterate:
    """Iterate in one node of a compiled graph."""
    count = torch.zeros((), dtype=torch.int64, device=start.error.device)

    def condition(count: Tensor, *leaves: Tensor) -> Tensor:
        return (count < limit) & leaves[-2].any()

    def body(count: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        error, active, diverged = leaves[-3:]
        found = advance(Iterate(leaves[:-3], error, active, diverged))
        matrices = tuple(matrix.contiguous() for matrix in found.matrices)
        # no output may be an input itself
        return (count + 1, *matrices, found.error, found.active, found.diverged.clone())

    # nor may two inputs be one tensor
    matrices = (matrix.clone(memory_format=torch.contiguous_format) for matrix in start.matrices)
    leaves = (count, *matrices, start.error.clone(), start.active, start.diverged)
    loop: Any = torch._higher_order_ops.while_loop
    result = loop(condition, body, leaves)
    return Iterate(tuple(result[1:-3]), result[-3], result[-2], result[-1])


def _any(active: Tensor) -> bool:
    """Look whether any matrix, in every layer of torch.func, is still active."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(active):
        active = functorch.get_unwrapped(active)
    return bool(active.any())


@constant_result
def _inside_transform() -> bool:
    """Whether vmap, grad or jvp is being traced; asked once, while tracing."""
    return torch._C._functorch.maybe_current_level() is not None


def check_stopping(iterations: int | None, tolerance: float, max_iterations: int) -> Stopping:
    """Check when an iteration stops.

    Raises:
        HyperparameterError: If a number is out of range, or the tolerance is a tensor.
    """
    if iterations is not None:
        check_count("iterations", iterations)
    check_constant("tolerance", tolerance)
    check_number("tolerance", tolerance)
    check_count("max_iterations", max_iterations)
    return Stopping(iterations, tolerance, max_iterations)
