"""What is timed: steps of ours, eager and compiled, steps of torch.optim, and the floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import shampoo_func as sf
from benchmarks.sets import SETS, random_like
from benchmarks.timing import Job
from shampoo_func.blocks import gather

__all__ = ["CASES", "Problem", "shampoo"]

DIFFERENT_GRADIENTS = 4


@dataclass(frozen=True, slots=True)
class Problem:
    """A parameter set, its gradients in turn, and the block size of Shampoo."""

    params: dict[str, Tensor]
    gradients: tuple[dict[str, Tensor], ...]
    block_size: int

    @classmethod
    def of(cls, name: str, block_size: int) -> Problem:
        """Return the problem of the set of that name."""
        params = SETS[name]()
        gradients = tuple(random_like(params, seed) for seed in range(DIFFERENT_GRADIENTS))
        return cls(params, gradients, block_size)

    def gradient(self, number: int) -> dict[str, Tensor]:
        """Return the gradients of one step."""
        return self.gradients[number % len(self.gradients)]

    def copy(self) -> dict[str, Tensor]:
        """Return parameters of one's own."""
        return {name: leaf.clone() for name, leaf in self.params.items()}


def shampoo(problem: Problem) -> sf.Transformation:
    """Return the Shampoo that is timed: Adam grafting, decay, eigendecomposition in float32."""
    return sf.shampoo(
        1e-3,
        beta1=0.9,
        beta2=0.99,
        epsilon=1e-8,
        weight_decay=0.01,
        block_size=problem.block_size,
        refresh_every=10,
    )


def adamw(problem: Problem) -> sf.Transformation:
    """Return the AdamW that is timed."""
    return sf.adamw(1e-3, weight_decay=0.01)


@dataclass(slots=True)
class Run:
    """Parameters and state on their way through the steps of one transformation."""

    problem: Problem
    step: Callable[..., tuple[Any, Any]]
    params: Any
    state: Any

    @classmethod
    def of(cls, problem: Problem, tx: sf.Transformation, *, compiled: bool) -> Run:
        """Return a run of the transformation; compiled steps are donated."""

        def step(params: Any, state: Any, grads: Any, **extra: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params, **extra)
            return sf.apply_updates(params, updates), state

        own = problem.copy()
        chosen = torch.compile(sf.donate(step), fullgraph=True) if compiled else step
        return cls(problem, chosen, own, tx.init(own))

    def advance(self, number: int, **extra: Any) -> None:
        """Take one step."""
        grads = self.problem.gradient(number)
        self.params, self.state = self.step(self.params, self.state, grads, **extra)


def _shampoo_jobs(case: str, problem: Problem, *, compiled: bool) -> list[Job]:
    run = Run.of(problem, shampoo(problem), compiled=compiled)
    # the refresh is the first to run, so that plain steps have roots to apply
    return [
        Job(case, "refresh", lambda number: run.advance(number, refresh=True)),
        Job(case, "plain", lambda number: run.advance(number, refresh=False)),
    ]


def shampoo_compiled(problem: Problem) -> list[Job]:
    """Time our Shampoo, compiled and donated."""
    return _shampoo_jobs("shampoo-compiled", problem, compiled=True)


def shampoo_eager(problem: Problem) -> list[Job]:
    """Time our Shampoo, eager and out of place."""
    return _shampoo_jobs("shampoo-eager", problem, compiled=False)


def adamw_compiled(problem: Problem) -> list[Job]:
    """Time our AdamW, compiled and donated."""
    tx = adamw(problem)
    run = Run.of(problem, tx, compiled=True)
    # nothing in AdamW is refreshed, so no branch on it need be compiled either
    static = {"refresh": False} if "refresh" in tx.extras else {}
    return [Job("adamw-compiled", "plain", lambda number: run.advance(number, **static))]


def _torch_adamw(case: str, problem: Problem, *, fused: bool) -> list[Job]:
    params = {name: leaf.requires_grad_() for name, leaf in problem.copy().items()}
    optimizer = torch.optim.AdamW(
        params.values(), lr=1e-3, weight_decay=0.01, fused=fused, foreach=not fused
    )

    def run(number: int) -> None:
        for name, grad in problem.gradient(number).items():
            params[name].grad = grad
        optimizer.step()

    return [Job(case, "plain", run)]


def torch_fused(problem: Problem) -> list[Job]:
    """Time torch.optim.AdamW, fused."""
    return _torch_adamw("torch-adamw-fused", problem, fused=True)


def torch_foreach(problem: Problem) -> list[Job]:
    """Time torch.optim.AdamW, foreach."""
    return _torch_adamw("torch-adamw-foreach", problem, fused=False)


def floor(problem: Problem) -> list[Job]:
    """Time the four products per matrix block that no plain Shampoo step can do without.

    They are G G^T and G^T G for the factors, and L G R for the direction, all batched and into
    memory that is there already.
    """
    plan = sf.blocked(sf.identity(), block_size=problem.block_size).plan(
        list(problem.params.values())
    )
    matrices = [
        [stack for stack in gather(plan, list(grads.values())).values() if stack.ndim == 3]
        for grads in problem.gradients
    ]
    buffers = [
        (torch.empty_like(g @ g.mT), torch.empty_like(g.mT @ g), g.clone(), g.clone())
        for g in matrices[0]
    ]

    def run(number: int) -> None:
        stacks = matrices[number % len(matrices)]
        for g, (left, right, half, whole) in zip(stacks, buffers, strict=True):
            torch.bmm(g, g.mT, out=left)
            torch.bmm(g.mT, g, out=right)
            torch.bmm(left, g, out=half)
            torch.bmm(half, right, out=whole)

    return [Job("floor-4-bmm", "plain", run)]


CASES: dict[str, Callable[[Problem], list[Job]]] = {
    "floor-4-bmm": floor,
    "shampoo-compiled": shampoo_compiled,
    "shampoo-eager": shampoo_eager,
    "adamw-compiled": adamw_compiled,
    "torch-adamw-fused": torch_fused,
    "torch-adamw-foreach": torch_foreach,
}
