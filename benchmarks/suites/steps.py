"""Step times of ours and of torch.optim, with the products that Shampoo cannot avoid."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cases import CASES, LARGE_CASES, SMALL_LEAVES_CASES
from benchmarks.problem import Problem
from benchmarks.ratios import Ratio, Steps, step_results
from benchmarks.record import Result, Settings, Suite, Unit
from benchmarks.sets import LARGE
from benchmarks.timing import interleave, timer_for

__all__ = ["SUITE"]

RATIOS = (
    Ratio(
        ours=("shampoo-compiled", "plain"),
        theirs=("floor-4-bmm", "plain"),
        limits={None: 1.15},
    ),
    Ratio(
        ours=("adamw-compiled", "plain"),
        theirs=("torch-adamw-fused", "plain"),
        limits={None: 1.25},
    ),
)
MANY_RATIOS = tuple(
    Ratio(
        ours=(case, "plain"),
        theirs=("torch-adamw-foreach", "plain"),
        set="many",
        limits={None: 1.5} if case == "adamw-stacked-eager" else {},
    )
    for case in ("adamw-stacked-eager", "adamw-eager", "adamw-compiled")
)


def cases_of(problem: Problem, settings: Settings) -> list[str]:
    """Return the names of what is timed: on large sets and on many leaves less than all."""
    names = list(CASES)
    if problem.numbers > LARGE:
        names = list(LARGE_CASES)
    if len(problem.params) > 1000:
        names = [*SMALL_LEAVES_CASES, *(["adamw-compiled"] if settings.long else [])]
    return names


def run(settings: Settings, unit: Unit) -> Iterator[Result]:
    """Time every case, interleaved."""
    problem = Problem.of(unit.set, settings)
    names = cases_of(problem, settings)
    jobs = [job for name in names for job in CASES[name](problem).jobs]
    clock, timer = timer_for(settings.device, unit.threads)
    measured = interleave(jobs, settings.rounds, timer, seconds=settings.seconds)
    yield from step_results(unit, clock, measured)
    steps = Steps.of(measured)
    reasons = {"adamw-compiled": "it takes many minutes to compile; --long does it"}
    for ratio in MANY_RATIOS if unit.set == "many" else RATIOS:
        yield ratio.result(steps, settings, unit, reasons)


SUITE = Suite(
    name="steps",
    about="plain, refresh and mean steps of ours, torch.optim's, and the matmul floor",
    run=run,
    sets=("gpt", "resnet18", "gpt2", "many"),
    threaded=True,
)
