"""The suites, in the order in which they are run."""

from __future__ import annotations

from benchmarks.record import Suite
from benchmarks.suites import (
    compile_time,
    growth,
    imports,
    memory,
    peers,
    roots,
    staggered,
    steps,
    train_step,
)

__all__ = ["SUITES"]

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        imports.SUITE,
        compile_time.SUITE,
        memory.SUITE,
        steps.SUITE,
        peers.SUITE,
        staggered.SUITE,
        train_step.SUITE,
        growth.SUITE,
        roots.SUITE,
    )
}
