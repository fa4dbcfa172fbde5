"""Bytes of state, and the most bytes that a step has at hand beyond what stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import CASES
from benchmarks.peers import Absent, available
from benchmarks.problem import Case, Problem, bytes_of
from benchmarks.record import Result, Settings, Suite, Unit

__all__ = ["SUITE", "peak_bytes"]

LIMITED, LIMIT = "shampoo-compiled", 2.5
OURS = ("shampoo-compiled", "shampoo-eager", "soap-compiled", "adamw-compiled", "torch-adamw-fused")


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Return the peak of what a call allocates and has not yet freed.

    On a CPU from the profiler's record of the allocator, which compiled code uses too.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    events = record.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        now += change
        peak = max(peak, now)
    return peak


def run(settings: Settings, unit: Unit) -> Iterator[Result]:
    """Count for ours, then for every peer that is there."""
    problem = Problem.of(unit.set, settings)
    for name in OURS:
        yield from _rows(unit, settings, problem, CASES[name](problem))
    for peer in available(problem, settings.peers):
        if not isinstance(peer, Absent):
            yield from _rows(unit, settings, problem, peer)


def _rows(unit: Unit, settings: Settings, problem: Problem, case: Case) -> Iterator[Result]:
    for number in range(2):
        for job in case.jobs:
            if job.prepare is not None:
                job.prepare(number)
            job.run(number)
    name, state = case.jobs[0].case, bytes_of(case.state(), problem)
    times = f"{state / problem.bytes:.2f}x the parameters"
    yield unit.result(f"{name}: state", "bytes", state, note=times)
    for job in case.jobs:
        if job.prepare is not None:
            job.prepare(0)
        peak = peak_bytes(lambda job=job: job.run(0), settings.device)  # type: ignore[misc]
        limited = (name, job.step, unit.set) == (LIMITED, "plain", "gpt") and not settings.quick
        yield unit.result(
            f"{name}: peak temporary of a {job.step} step / parameters",
            "x",
            peak / problem.bytes,
            target=LIMIT if limited else None,
            note=f"{peak / 2**20:.1f} MiB",
        )


SUITE = Suite(
    name="memory",
    about="bytes of state, peak temporary bytes of plain and refresh steps",
    run=run,
    sets=("gpt", "resnet18"),
)
