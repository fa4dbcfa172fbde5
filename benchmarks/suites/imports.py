"""What `import shampoo_func` takes beyond `import torch`, and the first use of it."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.record import Result, Settings, Suite, Unit

__all__ = ["SUITE"]

TIMES, QUICK_TIMES = 9, 1
LIMIT = 0.15
ROOT = Path(__file__).parents[2]

PROGRAM = """
import time
begin = time.perf_counter()
import torch
middle = time.perf_counter()
import shampoo_func
end = time.perf_counter()
shampoo_func.shampoo  # rooms are imported when a name in them is first used
print(middle - begin, end - middle, time.perf_counter() - end)
"""


def run(settings: Settings, unit: Unit) -> Iterator[Result]:
    """Time both imports in processes of their own."""
    times = QUICK_TIMES if settings.quick else TIMES
    samples: list[tuple[float, ...]] = []
    for number in range(times + 1):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
        )
        # the first one fills the disk's cache
        if number:
            samples.append(tuple(map(float, done.stdout.split())))
    torch, ours, first = zip(*samples, strict=True)
    note = f"wall time, {times} processes"
    yield unit.result("import torch", "s", statistics.median(torch), samples=torch, note=note)
    yield unit.result(
        "import shampoo_func, beyond torch",
        "s",
        statistics.median(ours),
        target=None if settings.quick else LIMIT,
        samples=ours,
        note=note,
    )
    yield unit.result(
        "first use of a name", "s", statistics.median(first), samples=first, note=note
    )


SUITE = Suite(name="imports", about="import time beyond that of torch", run=run)
