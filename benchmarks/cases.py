"""What is timed of ours and of torch.optim, and the floor; `benchmarks.peers` has the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import shampoo_func as sf
from benchmarks.problem import Case, Problem, optimizer_case
from benchmarks.timing import Job
from shampoo_func.blocks import gather

__all__ = [
    "CASES",
    "LARGE_CASES",
    "PERIOD",
    "SMALL_LEAVES_CASES",
    "Run",
    "adamw",
    "ours",
    "shampoo",
    "soap",
]

PERIOD = 10


def shampoo(block_size: int, policy: Any = None) -> sf.Transformation:
    """Return the Shampoo that is timed: Adam grafting, decay, the default root solver."""
    return sf.shampoo(
        1e-3,
        beta1=0.9,
        beta2=0.99,
        epsilon=1e-8,
        weight_decay=0.01,
        block_size=block_size,
        refresh_every=PERIOD,
        policy=policy,
    )


def soap(block_size: int) -> sf.Transformation:
    """Return the SOAP that is timed: the defaults, that is those of SOAP's own code, in blocks."""
    return sf.soap(3e-3, block_size=block_size, refresh_every=PERIOD)


def adamw(block_size: int) -> sf.Transformation:
    """Return the AdamW that is timed; it has no blocks."""
    return sf.adamw(1e-3, weight_decay=0.01)


def adamw_stacked(block_size: int) -> sf.Transformation:
    """Return the same AdamW on stacks of equal shapes, as many small parameters want it."""
    return sf.blocked(adamw(block_size), block_size=None)


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
        chosen: Callable[..., tuple[Any, Any]] = step
        if compiled:
            chosen = sf.donate(step)
        if compiled and problem.backend is not None:
            chosen = torch.compile(chosen, fullgraph=True, backend=problem.backend)
        return cls(problem, chosen, own, tx.init(own))

    def advance(self, **extra: Any) -> None:
        """Take one step."""
        self.params, self.state = self.step(self.params, self.state, self.problem.grads, **extra)


def ours(name: str, problem: Problem, tx: sf.Transformation, *, compiled: bool) -> Case:
    """Return the case of a transformation of ours."""
    run = Run.of(problem, tx, compiled=compiled)

    def job(step: str, **static: Any) -> Job:
        return Job(name, step, lambda number: run.advance(**static), problem.refill)

    if not tx.refresh_policies:
        # nothing in AdamW is refreshed, so no branch on it need be compiled either
        static = {"refresh": False} if "refresh" in tx.extras else {}
        return Case([job("plain", **static)], lambda: run.state)
    # the refresh is the first to run, so that plain steps have roots to apply
    jobs = [job("refresh", refresh=True), job("plain", refresh=False)]
    return Case(jobs, lambda: run.state)


def _ours(
    name: str, recipe: Callable[[int], sf.Transformation], compiled: bool
) -> Callable[[Problem], Case]:
    return lambda problem: ours(name, problem, recipe(problem.block_size), compiled=compiled)


def _torch_adamw(name: str, fused: bool) -> Callable[[Problem], Case]:
    return lambda problem: optimizer_case(
        name,
        problem,
        lambda params: torch.optim.AdamW(
            params, lr=1e-3, weight_decay=0.01, fused=fused, foreach=not fused
        ),
    )


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for the matrices and its fused AdamW for everything else, as it is used."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        super().__init__(params, {})
        matrices = [leaf for leaf in params if leaf.ndim == 2]
        rest = [leaf for leaf in params if leaf.ndim != 2]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.01))
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.01, fused=True))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step of both."""
        for part in self.parts:
            part.step()


def torch_muon(problem: Problem) -> Case:
    """Time torch.optim.Muon with fused AdamW for what is no matrix."""
    return optimizer_case("torch-muon", problem, MuonAndAdamW)


def floor(problem: Problem) -> Case:
    """Time the four products per matrix block that no plain Shampoo step can do without.

    They are G G^T and G^T G for the factors, and L G R for the direction, all batched and into
    memory that is there already.
    """
    plan = sf.blocked(sf.identity(), block_size=problem.block_size).plan(
        list(problem.params.values())
    )
    stacks = [
        stack for stack in gather(plan, list(problem.pool[0].values())).values() if stack.ndim == 3
    ]
    buffers = [
        (torch.empty_like(g @ g.mT), torch.empty_like(g.mT @ g), g.clone(), g.clone())
        for g in stacks
    ]

    def run(number: int) -> None:
        for g, (left, right, half, whole) in zip(stacks, buffers, strict=True):
            torch.bmm(g, g.mT, out=left)
            torch.bmm(g.mT, g, out=right)
            torch.bmm(left, g, out=half)
            torch.bmm(half, right, out=whole)

    return Case([Job("floor-4-bmm", "plain", run)], lambda: buffers)


CASES: dict[str, Callable[[Problem], Case]] = {
    "floor-4-bmm": floor,
    "shampoo-compiled": _ours("shampoo-compiled", shampoo, True),
    "shampoo-eager": _ours("shampoo-eager", shampoo, False),
    "soap-compiled": _ours("soap-compiled", soap, True),
    "adamw-compiled": _ours("adamw-compiled", adamw, True),
    "adamw-eager": _ours("adamw-eager", adamw, False),
    "adamw-stacked-eager": _ours("adamw-stacked-eager", adamw_stacked, False),
    "torch-adamw-fused": _torch_adamw("torch-adamw-fused", True),
    "torch-adamw-foreach": _torch_adamw("torch-adamw-foreach", False),
    "torch-muon": torch_muon,
}

LARGE_CASES = tuple(
    name
    for name in CASES
    if name not in ("shampoo-eager", "soap-compiled", "adamw-eager", "adamw-stacked-eager")
)
"""What is timed on large sets."""

SMALL_LEAVES_CASES = (
    "adamw-stacked-eager",
    "adamw-eager",
    "torch-adamw-fused",
    "torch-adamw-foreach",
)
"""What is timed on a tree of thousands of leaves, which compiles for many minutes."""
