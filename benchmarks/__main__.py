"""Run the benchmarks: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.machine import describe, slug
from benchmarks.output import read, read_versions, shown, tables, write
from benchmarks.peers import PEERS
from benchmarks.record import Result, Settings, Unit
from benchmarks.runner import results_apart, results_here
from benchmarks.sets import SETS
from benchmarks.suites import SUITES

__all__ = ["main"]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    about = "\n".join(f"  {suite.name:<12} {suite.about}" for suite in SUITES.values())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time our optimizers next to torch.optim's, the matmul floor, and other "
        "libraries' where they are installed. Everything of a suite runs interleaved in one "
        "process; read ratios of medians, not milliseconds.",
        epilog=f"suites:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("suites", nargs="*", metavar="SUITE", help="which suites (default: all)")
    add("--threads", type=_positive, nargs="+", default=[1, 2], help="default: 1 2; CPU only")
    add("--sets", nargs="+", choices=SETS, help="parameter sets (default: those of the suite)")
    add("--rounds", type=_positive, default=15, help="most timed rounds (default: 15)")
    add("--seconds", type=float, default=60.0, help="no new round after so long (default: 60)")
    add("--block-size", type=_positive, default=256, help="Shampoo's blocks (default: 256)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    add("--peers", nargs="*", choices=PEERS, help="which peers; none if empty (default: all)")
    add("--output", type=Path, default=Path(__file__).parent / "results", help="a folder")
    add("--add", action="store_true", help="keep what other units have written there before")
    add("--long", action="store_true", help="also compile AdamW on 2,000 leaves: many minutes")
    add("--quick", action="store_true", help="a tiny set, no compiler: only to see that it runs")
    add("--here", action="store_true", help="run in this process: for a debugger")
    options = parser.parse_args(argv)
    unknown = [name for name in options.suites if name not in SUITES]
    if unknown:
        parser.error(f"no suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none")
    return options


def _settings(options: argparse.Namespace) -> Settings:
    quick = options.quick
    return Settings(
        rounds=2 if quick else options.rounds,
        seconds=options.seconds,
        block_size=16 if quick else options.block_size,
        device=options.device,
        quick=quick,
        long=options.long,
        peers=None if options.peers is None else tuple(options.peers),
    )


def _units(options: argparse.Namespace) -> list[Unit]:
    """Return what is run, in order. On a GPU threads do not matter."""
    names = options.suites or list(SUITES)
    threads = options.threads[:1] if options.device == "cuda" or options.quick else options.threads
    sets = ["tiny"] if options.quick else options.sets
    return [unit for name in names for unit in SUITES[name].units(sets, threads)]


def _progress(unit: Unit, results: Sequence[Result], seconds: float) -> None:
    """Print the targets and failures of a unit as soon as it is over."""
    where = f"{unit.suite} {unit.set}".strip()
    print(f"{where}, {unit.threads} thread(s): {len(results)} results in {seconds:.0f} s")
    for result in results:
        if result.error:
            print(f"  {result.name}: {result.error}")
        elif result.target is not None:
            verdict = "met" if result.met else "NOT met"
            print(f"  {result.name}: {shown(result)}, at most {result.target:g}: {verdict}")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _arguments(argv)
    if not options.here:
        # as an exception, so that the process of the running unit is ended too
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    settings, units = _settings(options), _units(options)
    machine = {**describe(options.device), "block_size": settings.block_size}
    stem = options.output / ("quick" if options.quick else slug(machine["machine"]))
    results: list[Result] = []
    if options.add and stem.with_suffix(".json").exists():
        again = {(unit.suite, unit.set, unit.threads) for unit in units}
        path = stem.with_suffix(".json")
        results = [r for r in read(path) if (r.suite, r.set, r.threads) not in again]
        # peers that are not there now, but whose figures stay
        machine["versions"] = read_versions(path) | machine["versions"]
    written: list[str] = []
    for unit in units:
        begin = time.perf_counter()
        run = results_here if options.here else results_apart
        new = list(run(settings, unit))
        _progress(unit, new, time.perf_counter() - begin)
        results += new
        written = write(results, machine, stem)
    print(f"\n{tables(results, machine)}")
    print("\n".join(written))
    return int(any(result.name == "the suite" for result in results))


if __name__ == "__main__":
    sys.exit(main())
