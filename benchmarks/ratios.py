"""Medians of interleaved steps as results, and ratios between them with their targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.record import Result, Settings, Unit
from benchmarks.timing import Measurement

__all__ = ["AMORTISED", "Ratio", "Steps", "step_results"]

AMORTISED = (1, 10, 50)
"""Updates per refresh for which a mean step is given."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Medians in seconds, by case and step."""

    medians: Mapping[tuple[str, str], float]

    @classmethod
    def of(cls, measured: Sequence[Measurement]) -> Steps:
        """Return the medians of what was measured."""
        return cls({(m.job.case, m.job.step): m.median for m in measured})

    def quantity(self, case: str, what: str) -> float:
        """Return the seconds of a "plain" or "refresh" step, their difference, or a mean.

        Args:
            case: Of which optimizer.
            what: A step, "increment" for refresh - plain, or "mean N" for a mean step with one
                refresh in N.
        """
        plain = self.medians[case, "plain"]
        if what == "plain":
            return plain
        # an optimizer whose steps are all alike has no increment
        more = self.medians.get((case, "refresh"), plain) - plain
        every = {"increment": None, "refresh": 1}.get(what, 0)
        if every is None:
            return more
        return plain + more / (every or int(what.removeprefix("mean ")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A ratio of two quantities and the most that it may be.

    ours, theirs: case and quantity. set: where the limits hold. limits: by number of threads,
    None for any.
    """

    ours: tuple[str, str]
    theirs: tuple[str, str]
    set: str = "gpt"
    limits: Mapping[int | None, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What is divided by what."""
        (our, what), (their, other) = self.ours, self.theirs
        kind = what.replace("mean ", "mean, every ")
        return f"{our} / {their}: {kind}" if what == other else f"{our}, {kind} / {their}"

    def result(
        self, steps: Steps, settings: Settings, unit: Unit, reasons: Mapping[str, str]
    ) -> Result:
        """Return the ratio, or why there is none."""
        value, error = None, ""
        try:
            value = steps.quantity(*self.ours) / steps.quantity(*self.theirs)
        except KeyError:
            missing = next(
                c for c in (self.theirs[0], self.ours[0]) if (c, "plain") not in steps.medians
            )
            error = f"not measured: {reasons.get(missing, f'{missing} was not run')}"
        target = None
        if unit.set == self.set and not settings.quick:
            target = self.limits.get(unit.threads, self.limits.get(None))
        return unit.result(
            name=self.name,
            unit="x",
            value=value,
            target=target,
            error=error,
        )


def step_results(unit: Unit, clock: str, measured: Sequence[Measurement]) -> Iterator[Result]:
    """Yield medians with their samples, first calls, and mean steps."""
    steps = Steps.of(measured)

    def row(name: str, seconds: float, samples: tuple[float, ...] = (), note: str = "") -> Result:
        return unit.result(
            name=name,
            unit="s",
            value=seconds,
            samples=samples,
            note=note,
        )

    for m in measured:
        note = f"{clock}, {len(m.samples)} rounds; first call {m.first:.2f} s"
        yield row(f"{m.job.case}: {m.job.step}", m.median, m.samples, note)
    for m in measured:
        if m.job.step == "refresh":
            for every in AMORTISED:
                mean = steps.quantity(m.job.case, f"mean {every}")
                yield row(f"{m.job.case}: mean, every {every}", mean)
