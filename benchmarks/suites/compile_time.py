"""First calls of the compiled Shampoo step with a cold and with a warm cache, and its graphs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch
from torch._dynamo.utils import counters

from benchmarks.cases import Run, shampoo
from benchmarks.problem import Problem
from benchmarks.record import Result, Settings, Suite, Unit

__all__ = ["SUITE", "first_calls"]

LIMITS = {"cold": 60.0, "warm": 15.0}
GRAPHS = 2
ROUNDS = 3
ROOT = Path(__file__).parents[2]


def first_calls(name: str, settings: Settings) -> dict[str, float]:
    """Return the seconds of the first calls with and without a refresh, and the graphs."""
    # a quick look traces the graphs, and compiles none of them
    problem = replace(Problem.of(name, settings), backend="eager" if settings.quick else "inductor")
    run = Run.of(problem, shampoo(settings.block_size), compiled=True)
    taken: dict[str, float] = {}
    for what, refresh in (("plain", False), ("refresh", True)):
        begin = time.perf_counter()
        run.advance(refresh=refresh)
        if settings.device == "cuda":
            torch.cuda.synchronize()
        taken[what] = time.perf_counter() - begin
    return taken | {"graphs": float(counters["stats"]["unique_graphs"])}


def run(settings: Settings, unit: Unit) -> Iterator[Result]:
    """Run the first calls in pairs of processes, each pair on one new cache; give medians."""
    limited = unit.set == "gpt" and not settings.quick
    rounds = 1 if settings.quick else ROUNDS
    taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in LIMITS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind in LIMITS:
                taken[kind].append(_in_process(cache, unit, settings))
    note = f"wall time, {rounds} runs"
    for kind, limit in LIMITS.items():
        for what in ("plain", "refresh"):
            name = f"shampoo-compiled: first call, {what}, {kind} cache"
            yield unit.result(name, "s", median(run[what] for run in taken[kind]), note=note)
        both = [run["plain"] + run["refresh"] for run in taken[kind]]
        yield unit.result(
            f"shampoo-compiled: first calls, both graphs, {kind} cache",
            "s",
            median(both),
            target=limit if limited else None,
            note=f"{note}: {min(both):.1f} to {max(both):.1f}",
        )
    name = "shampoo-compiled: graphs of a step, with and without refresh"
    graphs = max(run["graphs"] for runs in taken.values() for run in runs)
    yield unit.result(name, "graphs", graphs, target=GRAPHS if limited else None)


def _in_process(cache: str, unit: Unit, settings: Settings) -> dict[str, float]:
    arguments = [unit.set, str(unit.threads), json.dumps(asdict(settings))]
    # Inductor's caches, and what else compiled code is kept in
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
        "TRITON_CACHE_DIR": f"{cache}/triton",
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(arguments: Sequence[str]) -> None:
    """Print the first calls as JSON."""
    name, threads, settings = arguments
    torch.set_num_threads(int(threads))
    print(json.dumps(first_calls(name, Settings(**json.loads(settings)))))


SUITE = Suite(
    name="compile",
    about="first calls with cold and warm cache, and the number of graphs",
    run=run,
    sets=("gpt",),
)

if __name__ == "__main__":
    main(sys.argv[1:])
