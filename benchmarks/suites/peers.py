"""Step times of ours and of other libraries' optimizers, where these are installed."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cases import CASES
from benchmarks.peers import Absent, available
from benchmarks.problem import Problem, bytes_of
from benchmarks.ratios import Ratio, Steps, step_results
from benchmarks.record import Result, Settings, Suite, Unit
from benchmarks.sets import LARGE
from benchmarks.timing import interleave, timer_for

__all__ = ["SUITE"]

SHAMPOO, SOAP, THEIRS = "shampoo-compiled", "soap-compiled", "distributed-shampoo"
OURS = (SHAMPOO, SOAP, "torch-adamw-fused", "torch-muon")
OURS_OF_A_LARGE_SET = (SHAMPOO, "torch-adamw-fused")

RATIOS = (
    Ratio(ours=(SHAMPOO, "plain"), theirs=(THEIRS, "plain"), limits={None: 0.65}),
    Ratio(ours=(SHAMPOO, "plain"), theirs=(f"{THEIRS}-unpacked", "plain"), limits={None: 0.85}),
    Ratio(ours=(SHAMPOO, "plain"), theirs=("dash", "plain"), limits={None: 0.9}),
    Ratio(
        ours=(SHAMPOO, "increment"),
        theirs=(THEIRS, "increment"),
        limits={1: 0.70, 2: 0.45},
    ),
    Ratio(ours=(SHAMPOO, "mean 10"), theirs=(THEIRS, "mean 10"), limits={1: 0.65, 2: 0.55}),
    Ratio(ours=(SOAP, "mean 10"), theirs=("soap-own-code", "mean 10"), limits={None: 0.40}),
    Ratio(ours=(SOAP, "mean 10"), theirs=("heavyball-soap", "mean 10"), limits={None: 0.75}),
)
RESNET_RATIOS = (
    Ratio(
        ours=(SHAMPOO, "mean 10"),
        theirs=(THEIRS, "mean 10"),
        set="resnet18",
        limits={None: 0.8},
    ),
)


def run(settings: Settings, unit: Unit) -> Iterator[Result]:
    """Time ours and every peer that is there, interleaved; report those that are not."""
    problem = Problem.of(unit.set, settings)
    found = list(available(problem, settings.peers))
    absent = {peer.name: peer for peer in found if isinstance(peer, Absent)}
    present = [peer for peer in found if not isinstance(peer, Absent)]
    for peer in absent.values():
        if peer.failed:
            yield unit.result(peer.name, "s", None, error=peer.reason)
    ratios = RESNET_RATIOS if unit.set == "resnet18" else RATIOS
    reasons = {name: peer.reason for name, peer in absent.items()}
    if not present:
        for ratio in ratios:
            yield ratio.result(Steps({}), settings, unit, reasons)
        return
    large = problem.numbers > LARGE
    mine = [CASES[name](problem) for name in (OURS_OF_A_LARGE_SET if large else OURS)]
    jobs = [job for case in [*mine, *present] for job in case.jobs]
    clock, timer = timer_for(settings.device, unit.threads)
    measured = interleave(jobs, settings.rounds, timer, seconds=settings.seconds)
    yield from step_results(unit, clock, measured)
    for case in [*mine, *present]:
        taken = bytes_of(case.state(), problem)
        note = f"{taken / problem.bytes:.2f}x the parameters"
        yield unit.result(f"{case.jobs[0].case}: state", "bytes", taken, note=note)
    steps = Steps.of(measured)
    for ratio in ratios:
        yield ratio.result(steps, settings, unit, reasons)


SUITE = Suite(
    name="peers",
    about="the same steps interleaved with those of other libraries, where installed",
    run=run,
    sets=("gpt", "resnet18"),
    threaded=True,
)
