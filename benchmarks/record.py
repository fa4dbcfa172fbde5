"""One measured number, what it should be, and what a suite is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Result", "Settings", "Suite", "Unit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One number.

    suite, set, threads: what was run; set is "" where there is none. name: what was measured.
    value: in `unit`: "s", "bytes", "x" (a ratio), "exponent" or "graphs"; None if it was not
    measured, and then `error` says why. target: the most that it may be. samples: all rounds.
    """

    suite: str
    name: str
    unit: str
    value: float | None = None
    set: str = ""
    threads: int = 1
    target: float | None = None
    samples: tuple[float, ...] = ()
    note: str = ""
    error: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is none or nothing was measured."""
        if self.target is None or self.value is None:
            return None
        return self.value <= self.target


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run of the suites is told.

    seconds: after so long a unit begins no new round. quick: only see that everything runs;
    nothing that is measured then means anything. long: also what takes very long to compile.
    peers: which to run, None for all.
    """

    rounds: int = 15
    seconds: float = 60.0
    block_size: int = 256
    device: str = "cpu"
    quick: bool = False
    long: bool = False
    peers: tuple[str, ...] | None = None

    @property
    def backend(self) -> str | None:
        """What compiles: Inductor, or for a quick look nothing."""
        return None if self.quick else "inductor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A part of a suite that is run by itself: one set, one number of threads."""

    suite: str
    set: str = ""
    threads: int = 1

    def result(
        self,
        name: str,
        unit: str,
        value: float | None,
        *,
        target: float | None = None,
        samples: tuple[float, ...] = (),
        note: str = "",
        error: str = "",
    ) -> Result:
        """Return a result of this part."""
        return Result(
            suite=self.suite,
            name=name,
            unit=unit,
            value=value,
            set=self.set,
            threads=self.threads,
            target=target,
            samples=samples,
            note=note,
            error=error,
        )


Measure = Callable[[Settings, Unit], Iterator[Result]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A suite: what it is about, its sets if it has any, and whether threads matter to it."""

    name: str
    about: str
    run: Measure
    sets: tuple[str, ...] = ()
    threaded: bool = False

    def units(self, sets: Sequence[str] | None, threads: Sequence[int]) -> list[Unit]:
        """Return its parts; `sets` replaces its own sets, where it has any."""
        chosen = (sets or self.sets) if self.sets else ("",)
        counts = threads if self.threaded else threads[:1]
        return [Unit(suite=self.name, set=s, threads=t) for s in chosen for t in counts]
