"""The language-model example: an interrupted run continues bit for bit."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_lm.py"
SETTINGS = ["--size", "tiny", "--batch", "4", "--evaluate-every", "10"]


def command(out: Path, *more: str) -> list[str]:
    """Return the command line of a tiny run."""
    return [sys.executable, str(SCRIPT), *SETTINGS, "--out", str(out), *more]


def environment() -> dict[str, str]:
    """Return an environment in which the library is found."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def finish(arguments: list[str]) -> None:
    """Run to the end."""
    subprocess.run(arguments, check=True, env=environment(), timeout=600, capture_output=True)


def interrupted(arguments: list[str], checkpoint: Path) -> str:
    """Start a run, press Ctrl-C once its first checkpoint exists, return what it printed."""
    process = subprocess.Popen(
        arguments, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 130, printed
    return printed


def checksums(out: Path) -> dict[str, str]:
    """Return the checksum of every optimizer's final weights."""
    results = json.loads((out / "results.json").read_text())["results"]
    return {result["name"]: result["checksum"] for result in results}


def losses(out: Path) -> list[list[float]]:
    """Return every optimizer's validation losses."""
    results = json.loads((out / "results.json").read_text())["results"]
    return [[note["validation_loss"] for note in result["history"]] for result in results]


@pytest.mark.slow
@pytest.mark.parametrize(("interrupted_run", "mode"), [("adamw", "on"), ("shampoo", "off")])
def test_resume_continues_bit_for_bit(tmp_path: Path, interrupted_run: str, mode: str) -> None:
    """A run stopped by Ctrl-C and resumed ends with the weights and losses of a whole one."""
    if mode == "on" and not (shutil.which("g++") or shutil.which("clang++")):
        mode = "off"  # a machine without a C++ compiler cannot compile
    steps = "60"
    more: tuple[str, ...] = (
        "--compile",
        mode,
        "--steps",
        steps,
        "--threads",
        "1",
        "--save-every",
        "7",
    )
    if mode == "on":  # compiling is most of the time: one optimizer will do
        more = (*more, "--optimizers", interrupted_run)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(command(whole, *more))
    printed = interrupted(command(broken, *more), broken / f"{interrupted_run}.pt")
    stopped = re.search(r"saved after step (\d+) of", printed)
    assert stopped, printed
    assert 0 < int(stopped[1]) < int(steps)
    again = shlex.split(printed.strip().splitlines()[-1])
    assert again[-1] == "--resume"
    finish(again)
    assert checksums(broken) == checksums(whole)
    assert losses(broken) == losses(whole)


@pytest.mark.slow
def test_resume_refuses_other_settings(tmp_path: Path) -> None:
    """Resuming with another number of steps is refused, and the message says what differs."""
    finish(command(tmp_path, "--steps", "3", "--compile", "off"))
    refused = subprocess.run(
        command(tmp_path, "--steps", "4", "--compile", "off", "--resume"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert refused.returncode == 1
    assert "steps was 3, now 4" in refused.stderr


@pytest.mark.slow
def test_distributed_run_is_resumed_in_another_mode(tmp_path: Path) -> None:
    """Two ranks of DDP save; two of FSDP2 go on, with the loss of an unbroken run."""
    script = ROOT / "examples" / "train_distributed.py"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]

    def run(*more: str) -> float:
        done = subprocess.run(
            [*launch, str(script), *more],
            env=environment(),
            timeout=300,
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout.split("validation loss")[1])

    folder = str(tmp_path / "saved")
    run("--mode", "ddp", "--steps", "6", "--checkpoint", folder)
    resumed = run("--mode", "fsdp2", "--steps", "12", "--checkpoint", folder, "--resume")
    assert resumed == pytest.approx(run("--mode", "ddp", "--steps", "12"), abs=2e-3)
