"""Timing several things fairly: interleaved in one process, by medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Job", "Measurement", "Timer", "by_clock", "device_timer", "interleave", "timer_for"]

Timer = Callable[[Callable[[], object]], float]
"""Runs what it is given and returns the seconds that it took."""

FEWEST_ROUNDS = 3
"""So many rounds are timed even if the time for them is up."""


@dataclass(frozen=True, slots=True)
class Job:
    """One call to be timed.

    case, step: what it is, e.g. "shampoo-compiled" and "refresh". run: gets the number of the
    call, from 0, to choose its gradients by. prepare: is called before it, untimed.
    """

    case: str
    step: str
    run: Callable[[int], object]
    prepare: Callable[[int], object] | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured of a job: seconds of the first call (wall clock) and of every round."""

    job: Job
    first: float
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median round, in seconds."""
        return statistics.median(self.samples)


def by_clock(clock: Callable[[], float]) -> Timer:
    """Return a timer by a clock, e.g. `time.perf_counter`."""

    def timer(run: Callable[[], object]) -> float:
        begin = clock()
        run()
        return clock() - begin

    return timer


def device_timer(run: Callable[[], object]) -> float:
    """Return the seconds between two events on the current CUDA stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def timer_for(device: str, threads: int) -> tuple[str, Timer]:
    """Return what is timed, and how.

    On a CPU with one thread that is CPU time, which neighbours disturb less, and of the whole
    process, so that no helper thread works unseen; with more threads it is wall time.
    """
    if device == "cuda":
        return "device events", device_timer
    if threads == 1:
        return "CPU time of the process", by_clock(time.process_time)
    return "wall time", by_clock(time.perf_counter)


def interleave(
    jobs: Sequence[Job],
    rounds: int,
    timer: Timer,
    warmup: int = 2,
    seconds: float | None = None,
) -> list[Measurement]:
    """Run every job once per round, so that all of them meet the same disturbances.

    Each round begins with another job, so that no job always follows the same one.

    Args:
        jobs: What is timed.
        rounds: How often each job is timed.
        timer: Runs a call and returns its seconds, e.g. `by_clock(time.thread_time)`.
        warmup: Rounds that are run before, without being timed; the first of them compiles.
        seconds: No new round begins after so many seconds, but for the first three.
    """
    first = [by_clock(time.perf_counter)(_call(job, 0)) for job in jobs]
    samples: list[list[float]] = [[] for _ in jobs]
    start = time.perf_counter()
    for number in range(1, warmup + rounds):
        late = seconds is not None and time.perf_counter() - start > seconds
        if late and number >= warmup + FEWEST_ROUNDS:
            break
        for place in range(len(jobs)):
            index = (place + number) % len(jobs)
            taken = timer(_call(jobs[index], number))
            if number >= warmup:
                samples[index].append(taken)
    return [
        Measurement(job, once, tuple(times))
        for job, once, times in zip(jobs, first, samples, strict=True)
    ]


def _call(job: Job, number: int) -> Callable[[], object]:
    """Prepare a job and return the call that is timed."""
    if job.prepare is not None:
        job.prepare(number)
    return lambda: job.run(number)
