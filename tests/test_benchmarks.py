"""The benchmark's command line, on a set too small to time and without the compiler."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import shampoo_func as sf
from benchmarks import output, ratios, solvers, state_bytes
from benchmarks.__main__ import main
from benchmarks.cases import CASES, shampoo
from benchmarks.machine import describe
from benchmarks.peers import PEERS, available
from benchmarks.problem import Problem, bytes_of
from benchmarks.record import Result, Settings, Suite, Unit
from benchmarks.runner import results_apart, results_here
from benchmarks.sets import SETS, blocks, fill
from benchmarks.suites import SUITES
from benchmarks.suites.growth import exponent
from benchmarks.suites.memory import peak_bytes
from benchmarks.timing import Job, by_clock, interleave
from shampoo_func import tree

QUICK = Settings(rounds=2, block_size=16, quick=True)
# these start Python anew
SLOW = {"compile", "imports"}

WHAT: dict[str, set[str]] = {
    "imports": {"import torch", "import shampoo_func, beyond torch"},
    "compile": {
        "shampoo-compiled: first calls, both graphs, cold cache",
        "shampoo-compiled: first calls, both graphs, warm cache",
        "shampoo-compiled: graphs of a step, with and without refresh",
    },
    "memory": {
        "shampoo-compiled: state",
        "shampoo-compiled: peak temporary of a plain step / parameters",
    },
    "steps": {
        "shampoo-compiled: refresh",
        "shampoo-compiled: mean, every 50",
        "shampoo-compiled / floor-4-bmm: plain",
        "adamw-compiled / torch-adamw-fused: plain",
    },
    "peers": {"shampoo-compiled / dash: plain"},
    "staggered": {"shampoo, period 10, staggered: worst / mean step"},
    "train_step": {"train-shampoo, mean, every 50 / train-adamw"},
    "growth": {
        "shampoo-eager, plain: exponent of the number of blocks",
        "shampoo-eager, refresh: exponent of the block size",
    },
    "solvers": {"eigh, float32, n = 8: one matrix"},
}
"""A few results of every suite."""

# A peer that takes steps as SOAP's own code does, and counts its refreshes.
FAKE_SOAP = """
import torch


class SOAP(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})
        self.refreshed = []

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for leaf in group["params"]:
                state = self.state[leaf]
                state.setdefault("exp_avg", torch.zeros_like(leaf)).lerp_(leaf.grad, 0.1)
                leaf.sub_(state["exp_avg"])
        self.refreshed.append(state.get("precondition_frequency") == 1)
"""


@pytest.mark.parametrize(
    "suite", [pytest.param(s, marks=pytest.mark.slow if s in SLOW else []) for s in SUITES]
)
def test_quick_run_of_a_suite(
    suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every suite measures what it is there for, and writes it as JSON, Markdown and PNG."""
    assert main([suite, "--quick", "--here", "--peers", "--output", str(tmp_path)]) == 0
    found = {result.name: result for result in output.read(tmp_path / "quick.json")}
    assert WHAT[suite] <= found.keys()
    for result in found.values():
        assert result.suite == suite
        assert result.target is None, "nothing that is measured quickly means anything"
        if suite != "peers":
            assert not result.error
            assert result.value is not None
            assert result.unit == "exponent" or result.value >= 0
    for text in (capsys.readouterr().out, (tmp_path / "quick.md").read_text()):
        assert all(name in text for name in WHAT[suite])


def test_peers_are_interleaved_or_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is there is timed and compared, one that fails or is absent says why."""
    (tmp_path / "soap.py").write_text(FAKE_SOAP)
    broken = "raise ValueError('not for this torch')"
    (tmp_path / "distributed_shampoo.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    names = ("soap-own-code", "distributed-shampoo", "dash")
    settings = Settings(rounds=2, block_size=16, quick=True, peers=names)
    results = {r.name: r for r in results_here(settings, Unit(suite="peers", set="tiny"))}
    assert results["soap-own-code: refresh"].value
    assert results["soap-own-code: state"].note == "1.00x the parameters"
    assert results["soap-compiled / soap-own-code: mean, every 10"].value
    assert "not for this torch" in results["distributed-shampoo"].error
    assert "dash" not in results or results["dash"].error
    assert "was not run" in results["soap-compiled / heavyball-soap: mean, every 10"].error


def test_a_peer_is_aimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refreshes happen in the job that is called so, and gradients are those of the pool."""
    (tmp_path / "soap.py").write_text(FAKE_SOAP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "soap", raising=False)
    problem = Problem.of("tiny", QUICK)
    (case,) = available(problem, ["soap-own-code"])
    assert not hasattr(case, "reason")
    interleave(case.jobs, 1, by_clock(lambda: 0.0), warmup=1)
    # first both as they come, then again, in the order of the round
    assert case.state().refreshed[2:] == [True, False, False, True]
    assert all(torch.equal(problem.grads[k], problem.pool[1][k]) for k in problem.grads)


def test_what_dies_is_reported() -> None:
    """A unit that ends its process, or raises, leaves an error in its place."""
    unit = Unit(suite="growth")
    (timed_out,) = results_apart(QUICK, unit, timeout=0.05)
    assert timed_out.error == "given up after 0 s"
    (failed,) = results_here(QUICK, Unit(suite="steps", set="no such set"))
    assert failed.error == "KeyError: 'no such set'"


@pytest.mark.slow
def test_results_come_back_from_another_process() -> None:
    """A unit in a process of its own has the results of one in this."""
    apart = results_apart(QUICK, Unit(suite="growth"))
    here = list(results_here(QUICK, Unit(suite="growth")))
    assert [r.name for r in apart] == [r.name for r in here]
    assert not any(r.error for r in apart)


def test_earlier_results_are_kept(tmp_path: Path) -> None:
    """With --add, suites that are not run again keep their rows; others are replaced."""
    common = ["--quick", "--here", "--output", str(tmp_path)]
    assert main(["growth", *common]) == 0
    written = json.loads((tmp_path / "quick.json").read_text())
    written["versions"]["a-peer"] = "1.2"
    (tmp_path / "quick.json").write_text(json.dumps(written))
    assert main(["solvers", "--add", *common]) == 0
    assert main(["solvers", "--add", *common]) == 0
    names = [(r.suite, r.name) for r in output.read(tmp_path / "quick.json")]
    assert len(set(names)) == len(names)
    assert {suite for suite, _ in names} == {"growth", "solvers"}
    assert output.read_versions(tmp_path / "quick.json")["a-peer"] == "1.2"


def test_table_of_targets() -> None:
    """Targets come first, with what was measured and whether that is enough."""
    common: dict[str, Any] = {"suite": "steps", "unit": "x", "set": "gpt"}
    results = [
        Result(name="a", value=1.0, target=1.15, **common),
        Result(name="b", value=1.2, target=1.15, **common),
        Result(name="c", target=1.15, error="not measured: no peer", **common),
        Result(name="d", value=0.5, **common),
    ]
    assert [r.met for r in results] == [True, False, None, None]
    lines = output.tables(results, describe("cpu") | {"block_size": 256}).splitlines()
    assert "| steps | gpt | 1 | a | 1.00x | 1.15 | met |" in lines
    assert "| steps | gpt | 1 | b | 1.20x | 1.15 | NOT met |" in lines
    assert "| steps | gpt | 1 | c | - | 1.15 | not measured: no peer |" in lines
    assert "| gpt | 1 | d | 0.50x |  |" in lines


def test_ratios_by_hand() -> None:
    """Means and increments are those of plain + (refresh - plain) / N; limits by threads."""
    steps = ratios.Steps({("a", "plain"): 2.0, ("a", "refresh"): 12.0, ("b", "plain"): 1.0})
    assert steps.quantity("a", "increment") == 10.0
    assert steps.quantity("a", "refresh") == 12.0
    assert steps.quantity("a", "mean 10") == 3.0
    assert steps.quantity("b", "mean 10") == 1.0
    ratio = ratios.Ratio(ours=("a", "mean 10"), theirs=("b", "plain"), limits={1: 4.0, 2: 2.0})
    for threads, met in ((1, True), (2, False), (3, None)):
        unit = Unit(suite="steps", set="gpt", threads=threads)
        result = ratio.result(steps, Settings(), unit, {})
        assert (result.value, result.met) == (3.0, met)


@pytest.mark.parametrize(
    ("suite", "sets", "count"), [("steps", None, 8), ("steps", ["gpt"], 2), ("imports", ["gpt"], 1)]
)
def test_units(suite: str, sets: list[str] | None, count: int) -> None:
    """Sets and threads multiply where they matter."""
    assert len(SUITES[suite].units(sets, [1, 2])) == count


def test_every_target_has_a_suite() -> None:
    """The suites are all there, and every comparison names a case that some suite runs."""
    assert list(SUITES) == list(WHAT)
    assert all(isinstance(suite, Suite) for suite in SUITES.values())
    known = {*CASES, *PEERS}
    shown = {"steps": ["adamw-eager", "adamw-compiled"], "peers": []}
    for name in ("steps", "peers"):
        module = sys.modules[f"benchmarks.suites.{name}"]
        found = [r for key, value in vars(module).items() if key.endswith("RATIOS") for r in value]
        assert len(found) >= 3
        assert {case for r in found for case in (r.ours[0], r.theirs[0])} <= known
        assert all(r.set in SUITES[name].sets for r in found)
        # one case without a limit only shows what another one saves
        assert [r.ours[0] for r in found if not r.limits] == shown[name]


def test_exponent_and_peak_are_measured_right() -> None:
    """Exponents of exact powers; the peak of a call that holds two buffers at once."""
    assert exponent({n: 3.0 * n**2.5 for n in (1, 2, 8)}) == pytest.approx(2.5)

    def run() -> None:
        first = torch.ones(1000)
        second = first + 1
        del first
        third = second + 1
        del second, third

    assert peak_bytes(run, "cpu") == pytest.approx(8000, rel=0.05)


def test_bytes_of_a_state() -> None:
    """Momentum and second moment are two numbers per parameter; the parameters do not count."""
    problem = Problem.of("tiny", QUICK)
    case = CASES["torch-adamw-fused"](problem)
    for job in case.jobs:
        assert job.prepare is not None
        job.prepare(0)
        job.run(0)
    counters = 4 * len(problem.params)
    assert bytes_of(case.state(), problem) == 2 * problem.bytes + counters


def test_help_and_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """The help names the sets and suites; an unknown suite is an error that names the known."""
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*SETS, *SUITES, *PEERS))
    with pytest.raises(SystemExit) as end:
        main(["speed"])
    assert end.value.code == 2
    assert "train_step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("gpt", 3_410_176), ("resnet18", 11_227_812), ("gpt2", 124_439_808), ("many", 272_000)],
)
def test_sets_have_the_sizes_of_the_models(name: str, numbers: int) -> None:
    """The sets are the models that they are named after, number for number."""
    assert sum(math.prod(shape) for shape in SETS[name]().values()) == numbers


def test_gpt_set_is_52_square_blocks() -> None:
    """The matrices are 52 square blocks, the rest 9 vectors; growth's blocks are as many."""
    state = shampoo(256).init(fill(SETS["gpt"](), "meta"))["precondition"]
    assert {name: stack.step.shape[0] for name, stack in state.items()} == {"256": 9, "256x256": 52}
    state = shampoo(8).init(fill(blocks(5, 8)))["precondition"]
    assert {name: stack.step.shape[0] for name, stack in state.items()} == {"8x8": 5}


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
        leaves = tree.leaves(tx.init(fill(SETS["tiny"]())))
        real = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        assert sum(result["states"][name].values()) == real


def test_interleaving_times_every_job_in_every_round() -> None:
    """No job runs twice in a row, and each is timed once per round after the warm-up."""
    seen: list[str] = []

    def job(name: str) -> Job:
        return Job(name, "plain", lambda number: seen.append(name))

    jobs = [job(name) for name in "abc"]
    ticks = iter(range(1000))
    measured = interleave(jobs, rounds=4, timer=by_clock(lambda: float(next(ticks))), warmup=2)
    assert [m.samples for m in measured] == [(1.0,) * 4] * 3
    assert [seen.count(name) for name in "abc"] == [6, 6, 6]
    assert all(sorted(seen[k : k + 3]) == ["a", "b", "c"] for k in range(0, 18, 3))
