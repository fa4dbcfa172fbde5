"""First calls of the compiled Shampoo step with a cold and with a warm cache, and its graphs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from benchmarks.cases import Run, shampoo
from benchmarks.problem import Problem
from benchmarks.record import Result, Settings, Suite, Unit

__all__ = ["SUITE", "first_calls"]

LIMITS = {"cold": 60.0, "warm": 15.0}
GRAPHS = 2
ROOT = Path(__file__).parents[2]


def first_calls(name: str, block_size: int, device: str) -> dict[str, float]:
    """Return the seconds of the first calls with and without a refresh, and the graphs."""
    problem = Problem.of(name, block_size, device)
    run = Run.of(problem, shampoo(block_size), compiled=True)
    taken: dict[str, float] = {}
    for what, refresh in (("plain", False), ("refresh", True)):
        begin = time.perf_counter()
        run.advance(refresh=refresh)
        if device == "cuda":
            torch.cuda.synchronize()
        taken[what] = time.perf_counter() - begin
    return taken | {"graphs": float(counters["stats"]["unique_graphs"])}


def run(settings: Settings, unit: Unit) -> Iterator[Result]:
    """Run the first calls in two processes, one after the other, on one new cache."""
    with tempfile.TemporaryDirectory() as cache:
        for kind, limit in LIMITS.items():
            if settings.quick and kind == "warm":
                return
            taken = _in_process(cache, unit, settings)
            rows = [
                (f"first call, {what}, {kind} cache", taken[what], "s", None)
                for what in ("plain", "refresh")
            ]
            both = taken["plain"] + taken["refresh"]
            rows.append((f"first calls, both graphs, {kind} cache", both, "s", limit))
            if kind == "cold":
                rows.append(("graphs of a step, with and without refresh", taken["graphs"], "graphs", GRAPHS))
            limited = unit.set == "gpt" and not settings.quick
            for name, value, of, target in rows:
                yield Result(
                    suite=unit.suite,
                    name=f"shampoo-compiled: {name}",
                    unit=of,
                    value=value,
                    set=unit.set,
                    threads=unit.threads,
                    target=target if limited else None,
                    note="wall time" if of == "s" else "",
                )


def _in_process(cache: str, unit: Unit, settings: Settings) -> dict[str, float]:
    arguments = [unit.set, str(settings.block_size), settings.device, str(unit.threads)]
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
    name, block_size, device, threads = arguments
    torch.set_num_threads(int(threads))
    print(json.dumps(first_calls(name, int(block_size), device)))


SUITE = Suite(
    name="compile",
    about="first calls with cold and warm cache, and the number of graphs",
    run=run,
    sets=("gpt",),
)

if __name__ == "__main__":
    main(sys.argv[1:])
