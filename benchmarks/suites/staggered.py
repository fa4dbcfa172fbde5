"""Worst step over mean step of a staggered refresh, and of one that comes all at once."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import shampoo_func as sf
from benchmarks.cases import PERIOD, Run, shampoo
from benchmarks.problem import Problem
from benchmarks.record import Result, Settings, Suite, Unit
from benchmarks.timing import Timer, timer_for

__all__ = ["SUITE"]

CYCLES, QUICK_CYCLES = 7, 1
LIMIT = 1.6


def _positions(problem: Problem, policy: Any, timer: Timer, cycles: int) -> list[float]:
    """Return the median seconds of every step of a cycle, in the order of the steps."""
    tx = shampoo(problem.block_size, policy=policy)
    run = Run.of(problem, tx, compiled=True)
    samples: list[list[float]] = [[] for _ in range(PERIOD)]
    # one cycle compiles and gives every block its roots
    for number in range(1, (cycles + 1) * PERIOD + 1):
        problem.refill(number)
        due = sf.refresh_due(tx, number)
        seconds = timer(lambda due=due: run.advance(refresh=due))  # type: ignore[misc]
        if number > PERIOD:
            samples[number % PERIOD].append(seconds)
    return [statistics.median(times) for times in samples]


def run(settings: Settings, unit: Unit) -> Iterator[Result]:
    """Time whole cycles of ten steps."""
    problem = Problem.of(unit.set, settings)
    clock, timer = timer_for(settings.device, unit.threads)
    cycles = QUICK_CYCLES if settings.quick else CYCLES
    policies = {"staggered": sf.staggered(PERIOD), "all at once": sf.every(PERIOD)}
    for name, policy in policies.items():
        steps = _positions(problem, policy, timer, cycles)
        mean, worst = statistics.fmean(steps), max(steps)
        limited = name == "staggered" and unit.set == "gpt" and not settings.quick
        note = f"{clock}; medians of every step of the cycle over {cycles} cycles"
        rows = (("mean step", "s", mean), ("worst step", "s", worst))
        for what, of, value in (*rows, ("worst / mean step", "x", worst / mean)):
            yield unit.result(
                name=f"shampoo, period {PERIOD}, {name}: {what}",
                unit=of,
                value=value,
                target=LIMIT if limited and of == "x" else None,
                note=note,
            )


SUITE = Suite(
    name="staggered",
    about="worst step over mean step at period 10, staggered and all at once",
    run=run,
    sets=("gpt",),
    threaded=True,
)
