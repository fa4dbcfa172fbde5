"""Time optimizer steps on a CPU: a table on the screen, and JSON if asked for."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import shampoo_func as sf
from benchmarks.cases import CASES, Problem
from benchmarks.sets import SETS
from benchmarks.timing import Measurement, interleave

__all__ = ["main"]

AMORTISED = (1, 10, 50)
"""Updates per refresh for which a mean step is given."""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time optimizer steps: ours, torch.optim's, and the matmul floor. All cases "
        "run interleaved in one process; read ratios of medians, not milliseconds.",
    )
    parser.add_argument("--set", choices=SETS, default="gpt", help="parameters (default: gpt)")
    parser.add_argument("--threads", type=_positive, default=1, help="torch threads (default: 1)")
    parser.add_argument("--rounds", type=_positive, default=15, help="timed rounds (default: 15)")
    parser.add_argument(
        "--block-size", type=_positive, default=256, help="Shampoo's blocks (default: 256)"
    )
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), help="which cases (default: all)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all samples to this file")
    return parser.parse_args(argv)


def _clock(threads: int) -> tuple[str, Callable[[], float]]:
    """Return CPU time for one thread, which neighbours disturb less, else wall time."""
    if threads == 1:
        return "CPU time of the thread", time.thread_time
    return "wall time", time.perf_counter


def _amortised(measured: Sequence[Measurement]) -> dict[str, dict[int, float]]:
    """Return, per case that refreshes, the mean step in seconds by updates per refresh."""
    medians = {(m.job.case, m.job.step): m.median for m in measured}
    means: dict[str, dict[int, float]] = {}
    for (case, step), refresh in medians.items():
        if step == "refresh":
            plain = medians[case, "plain"]
            means[case] = {every: plain + (refresh - plain) / every for every in AMORTISED}
    return means


def _report(arguments: argparse.Namespace, measured: Sequence[Measurement]) -> dict[str, Any]:
    """Return everything that was measured, for JSON."""
    return {
        "set": arguments.set,
        "block_size": arguments.block_size,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "clock": _clock(arguments.threads)[0],
        "versions": {
            "shampoo_func": sf.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{platform.system()} {platform.machine()}",
        "steps": [
            {
                "case": m.job.case,
                "step": m.job.step,
                "median_ms": 1e3 * m.median,
                "first_call_s": m.first,
                "samples_ms": [1e3 * sample for sample in m.samples],
            }
            for m in measured
        ],
        "amortised_ms": {
            case: {str(every): 1e3 * mean for every, mean in means.items()}
            for case, means in _amortised(measured).items()
        },
    }


def _table(measured: Sequence[Measurement]) -> str:
    """Return the table: medians, and their ratios to fused AdamW and to the floor."""
    medians = {(m.job.case, m.job.step): m.median for m in measured}
    references = [
        medians.get(("torch-adamw-fused", "plain")),
        medians.get(("floor-4-bmm", "plain")),
    ]

    def row(case: str, step: str, seconds: float, first: str) -> str:
        ratios = "".join(f"{seconds / r:>10.2f}" if r else f"{'-':>10}" for r in references)
        return f"{case:<20} {step:<14}{1e3 * seconds:>10.2f}{ratios}{first:>12}"

    lines = [f"{'case':<20} {'step':<14}{'ms':>10}{'x fused':>10}{'x floor':>10}{'first, s':>12}"]
    lines.append("-" * len(lines[0]))
    lines += [row(m.job.case, m.job.step, m.median, f"{m.first:.2f}") for m in measured]
    for case, means in _amortised(measured).items():
        lines += [row(case, f"mean, every {k}", mean, "") for k, mean in means.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _arguments(argv)
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        problem = Problem.of(arguments.set, arguments.block_size)
        jobs = [job for name in arguments.cases for job in CASES[name](problem)]
        measured = interleave(jobs, arguments.rounds, _clock(arguments.threads)[1])
    finally:
        torch.set_num_threads(before)
    report = _report(arguments, measured)
    numbers = sum(leaf.numel() for leaf in problem.params.values())
    print(
        f"set {arguments.set}: {numbers:,} numbers in {len(problem.params)} parameters; blocks of "
        f"{arguments.block_size}\n{report['clock']}, {arguments.threads} thread(s), medians of "
        f"{arguments.rounds} interleaved rounds; torch {torch.__version__}\n"
    )
    print(_table(measured))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
