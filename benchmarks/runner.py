"""Runs the units of the suites, each in a process of its own, so that none can end the others."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.record import Result, Settings, Unit
from benchmarks.suites import SUITES

__all__ = ["results_apart", "results_here"]

ROOT = Path(__file__).parents[1]
TIMEOUT = 1800.0
"""Seconds after which a unit is given up."""

RECOMPILES = 64
"""So many graphs of one step function are allowed: every case has its own."""


def results_here(settings: Settings, unit: Unit) -> Iterator[Result]:
    """Run a unit in this process; what it raises becomes a result with an error."""
    before = torch.get_num_threads()
    torch.set_num_threads(unit.threads)
    try:
        # every case has a step of its own, but all share one code object
        with torch._dynamo.config.patch(recompile_limit=RECOMPILES):
            yield from SUITES[unit.suite].run(settings, unit)
    except Exception as error:
        yield _failure(unit, f"{type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(before)
        torch.compiler.reset()


def results_apart(settings: Settings, unit: Unit, timeout: float = TIMEOUT) -> list[Result]:
    """Run a unit in a process of its own; if that dies, keep what it has measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.jsonl"
        out.touch()
        command = [sys.executable, "-m", "benchmarks.runner", str(out)]
        command += [json.dumps(asdict(settings)), json.dumps(asdict(unit))]
        error = _ended(command, timeout)
        results = [_read(line) for line in out.read_text().splitlines()]
    return [*results, _failure(unit, error)] if error else results


def _ended(command: Sequence[str], timeout: float) -> str:
    """Run a command to its end; return what went wrong, or an empty string."""
    # a session of its own, so that what it started can be ended with it
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return f"given up after {timeout:.0f} s"
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with status {code}" if code else ""


def _failure(unit: Unit, error: str) -> Result:
    return unit.result("the suite", "", None, error=" ".join(error.split())[:300])


def _read(line: str) -> Result:
    fields = json.loads(line)
    return Result(**{**fields, "samples": tuple(fields["samples"])})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one unit for `results_apart`, and write its results as they come."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runner", description=__doc__)
    parser.add_argument("out", type=Path)
    for name in ("settings", "unit"):
        parser.add_argument(name, type=json.loads)
    options = parser.parse_args(arguments)
    peers = options.settings["peers"]
    settings = Settings(**{**options.settings, "peers": None if peers is None else tuple(peers)})
    with options.out.open("a") as file:
        for result in results_here(settings, Unit(**options.unit)):
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
