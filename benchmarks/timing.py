"""Timing several things fairly: interleaved in one process, by medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Job", "Measurement", "interleave"]


@dataclass(frozen=True, slots=True)
class Job:
    """One call to be timed.

    case, step: what it is, e.g. "shampoo-compiled" and "refresh". run: gets the number of the
    call, from 0, to choose its gradients by.
    """

    case: str
    step: str
    run: Callable[[int], object]


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


def interleave(
    jobs: Sequence[Job], rounds: int, clock: Callable[[], float], warmup: int = 2
) -> list[Measurement]:
    """Run every job once per round, so that all of them meet the same disturbances.

    Each round begins with another job, so that no job always follows the same one.

    Args:
        jobs: What is timed.
        rounds: How often each job is timed.
        clock: Returns seconds, e.g. `time.thread_time`.
        warmup: Rounds that are run before, without being timed; the first of them compiles.
    """
    first = []
    for job in jobs:
        begin = time.perf_counter()
        job.run(0)
        first.append(time.perf_counter() - begin)
    samples: list[list[float]] = [[] for _ in jobs]
    for number in range(1, warmup + rounds):
        for place in range(len(jobs)):
            index = (place + number) % len(jobs)
            begin = clock()
            jobs[index].run(number)
            seconds = clock() - begin
            if number >= warmup:
                samples[index].append(seconds)
    return [
        Measurement(job, once, tuple(times))
        for job, once, times in zip(jobs, first, samples, strict=True)
    ]
