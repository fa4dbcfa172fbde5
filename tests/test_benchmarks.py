"""The benchmark's command line, on a set too small to time and without the compiler."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

import shampoo_func as sf
from benchmarks import solvers, state_bytes
from benchmarks.__main__ import main
from benchmarks.cases import CASES, Problem, shampoo
from benchmarks.sets import SETS
from benchmarks.timing import Job, interleave
from shampoo_func import tree

EAGER = [name for name in CASES if not name.endswith("-compiled")]


def test_tiny_set_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table and the JSON have every case that was asked for."""
    path = tmp_path / "result.json"
    options = ["--set", "tiny", "--rounds", "2", "--block-size", "16", "--json", str(path)]
    assert main([*options, "--cases", *EAGER]) == 0
    table, report = capsys.readouterr().out, json.loads(path.read_text())
    found = {(entry["case"], entry["step"]) for entry in report["steps"]}
    assert found == {(name, "plain") for name in EAGER} | {("shampoo-eager", "refresh")}
    assert all(len(entry["samples_ms"]) == 2 for entry in report["steps"])
    assert all(sample > 0 for entry in report["steps"] for sample in entry["samples_ms"])
    assert set(report["amortised_ms"]) == {"shampoo-eager"}
    assert all(name in table for name in EAGER)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """The help names the sets."""
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "gpt" in capsys.readouterr().out


def test_gpt_set_is_the_one_that_was_measured() -> None:
    """The set has 3.41 M numbers in 52 square blocks and 9 vectors."""
    problem = Problem.of("gpt", 256)
    assert sum(leaf.numel() for leaf in SETS["gpt"]().values()) == 3_410_176
    state = shampoo(problem).init(problem.params)["precondition"]
    assert {name: stack.step.shape[0] for name, stack in state.items()} == {"256": 9, "256x256": 52}


def test_solver_table(tmp_path: Path) -> None:
    """Every solver is timed and tried on every matrix, and what is accurate is shown to be."""
    options = ["--sizes", "8", "--rounds", "1", "--output", str(tmp_path)]
    assert solvers.main(options) == 0
    result = json.loads((tmp_path / "solvers.json").read_text())
    table = (tmp_path / "solvers.md").read_text()
    assert {row["solver"] for row in result["times"]} == set(solvers.SOLVERS)
    assert {row["case"] for row in result["errors"]} == set(solvers.CASES)
    assert all(f"| {name} |" in table for name in solvers.SOLVERS)
    eigh = [row for row in result["errors"] if row["solver"] == "eigh"]
    assert len(eigh) == 2 * 2 * len(solvers.CASES)
    for row in eigh:
        # in float32 the ridge of 1e-6 leaves one digit
        assert row["error"] < (0.2 if row["dtype"] == "float32" else 1e-3), row


def test_state_keeps_to_its_targets() -> None:
    """Of the GPT set: packed at most 4.2 times the parameters, momentum included; 8-bit 2.2."""
    result = state_bytes.measured("gpt", 256)
    unit = result["parameters"]

    def counted(storage: str) -> float:
        return sum(result["states"][storage][kind] for kind in state_bytes.COUNTED) / unit

    assert unit == 4 * 3_410_176
    assert counted("no codec") > 5
    assert counted("packing") < 3.2
    assert sum(result["states"]["packing"].values()) / unit <= 4.2
    assert counted("8-bit") <= 2.2
    assert counted("bf16") < 1.7
    assert counted("4-bit, eigenvectors") < 1.2
    assert counted("4-bit, Cholesky") < 1.2


def test_bytes_and_losses_are_of_the_same_storage() -> None:
    """What the example trains with is what is counted."""
    path = Path(__file__).parent.parent / "examples" / "lm" / "recipes.py"
    trained = runpy.run_path(str(path))["STORAGES"]
    names = {
        "full": "no codec",
        "packed": "packing",
        "8bit": "8-bit",
        "4bit": "4-bit, eigenvectors",
    }
    assert trained == {ours: state_bytes.STORAGES[name] for ours, name in names.items()}


def test_state_table(tmp_path: Path) -> None:
    """The table and the JSON have every storage; bytes on "meta" are those of real states."""
    options = ["--set", "tiny", "--block-size", "16", "--output", str(tmp_path)]
    assert state_bytes.main(options) == 0
    result = json.loads((tmp_path / "state_bytes.json").read_text())
    table = (tmp_path / "state_bytes.md").read_text()
    assert all(f"| {name} |" in table for name in state_bytes.STORAGES)
    for name, storage in state_bytes.STORAGES.items():
        tx = sf.shampoo(1e-3, weight_decay=0.01, block_size=16, storage=storage)
        leaves = tree.leaves(tx.init(SETS["tiny"]()))
        real = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        assert sum(result["states"][name].values()) == real


def test_interleaving_times_every_job_in_every_round() -> None:
    """No job runs twice in a row, and each is timed once per round after the warm-up."""
    seen: list[str] = []

    def job(name: str) -> Job:
        return Job(name, "plain", lambda number: seen.append(name))

    jobs = [job(name) for name in "abc"]
    ticks = iter(range(1000))
    measured = interleave(jobs, rounds=4, clock=lambda: float(next(ticks)), warmup=2)
    assert [m.samples for m in measured] == [(1.0,) * 4] * 3
    assert [seen.count(name) for name in "abc"] == [6, 6, 6]
    assert all(sorted(seen[k : k + 3]) == ["a", "b", "c"] for k in range(0, 18, 3))
