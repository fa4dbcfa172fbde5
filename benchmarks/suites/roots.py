"""Time of every inverse root solver at one size; `make bench-solvers` has sizes and errors."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import solvers
from benchmarks.record import Result, Settings, Suite, Unit

__all__ = ["SUITE"]

SIZE, QUICK_SIZE = 256, 8


def run(settings: Settings, unit: Unit) -> Iterator[Result]:
    """Time the solvers on a small stack, against one product of it."""
    size = QUICK_SIZE if settings.quick else SIZE
    for row in solvers.times([size], min(settings.rounds, 5)):
        yield unit.result(
            name=f"{row['solver']}, {row['dtype']}, n = {size}: one matrix",
            unit="s",
            value=1e-3 * row["ms_per_matrix"],
            note=f"{row['products']:.3g} batched products, on a CPU",
        )


SUITE = Suite(
    name="solvers",
    about="inverse root solvers at n = 256; `make bench-solvers` for sizes and errors",
    run=run,
)
