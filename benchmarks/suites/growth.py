"""How step time grows with the number of blocks and with their size: fitted exponents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.cases import ours, shampoo
from benchmarks.problem import Problem
from benchmarks.record import Result, Settings, Suite, Unit
from benchmarks.sets import blocks
from benchmarks.timing import interleave, timer_for

__all__ = ["SUITE", "exponent"]

COUNTS, SIZE = (1, 2, 4, 8, 16, 32, 64), 128
SIZES, COUNT = (32, 64, 128, 256, 512), 4
QUICK_COUNTS, QUICK_SIZES, QUICK_SIZE = (1, 2), (4, 8), 8

# Both must not grow faster than the work does: with the count, and with the cube of the size.
LIMITS = {"number of blocks": 1.1, "block size": 3.1}


def exponent(points: Mapping[int, float]) -> float:
    """Return the slope of log(seconds) over log(n), by least squares.

    Example:
        >>> round(exponent({1: 2.0, 2: 8.0, 4: 32.0}), 6)
        2.0
    """
    logs = [(math.log(n), math.log(seconds)) for n, seconds in points.items()]
    across = sum(x for x, _ in logs) / len(logs)
    up = sum(y for _, y in logs) / len(logs)
    return sum((x - across) * (y - up) for x, y in logs) / sum((x - across) ** 2 for x, _ in logs)


def run(settings: Settings, unit: Unit) -> Iterator[Result]:
    """Time eager steps over matrices of more and of larger blocks."""
    quick = settings.quick
    yield from _grow(
        settings,
        unit,
        "number of blocks",
        {n: (n, QUICK_SIZE if quick else SIZE) for n in (QUICK_COUNTS if quick else COUNTS)},
    )
    yield from _grow(
        settings,
        unit,
        "block size",
        {n: (COUNT, n) for n in (QUICK_SIZES if quick else SIZES)},
    )


def _grow(
    settings: Settings, unit: Unit, what: str, matrices: Mapping[int, Sequence[int]]
) -> Iterator[Result]:
    clock, timer = timer_for(settings.device, unit.threads)
    jobs = []
    for n, (count, size) in matrices.items():
        problem = Problem.of_shapes(blocks(count, size), size, settings.device)
        jobs += ours(str(n), problem, shampoo(size), compiled=False).jobs
    measured = interleave(jobs, settings.rounds, timer, seconds=settings.seconds)
    for step in ("plain", "refresh"):
        points = {int(m.job.case): m.median for m in measured if m.job.step == step}
        for n, seconds in points.items():
            name = f"shampoo-eager, {step}: {what} {n}"
            yield unit.result(
                name=name,
                unit="s",
                value=seconds,
                note=f"{clock}; {matrices[n][0]} blocks of {matrices[n][1]}",
            )
        yield unit.result(
            name=f"shampoo-eager, {step}: exponent of the {what}",
            unit="exponent",
            value=exponent(points),
            target=None if settings.quick else LIMITS[what],
            note=f"fitted over {min(points)} to {max(points)}",
        )


SUITE = Suite(
    name="growth",
    about="step time by number of blocks (x64) and block size (x16), with fitted exponents",
    run=run,
)
