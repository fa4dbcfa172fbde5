"""The recorded trajectories of the reference, and the script that replays them."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conformance
import conformance_options as asked
import numpy as np
import pytest
import torch
from conformance_build import RecordedRates

TESTS = Path(__file__).parent
DATA = TESTS / "data"
CASES = [str(path.relative_to(DATA).with_suffix("")) for path in sorted(DATA.rglob("*.json"))]
CASE = "adam_graft_freq5"

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a copy of one recorded case."""
    for suffix in (".json", ".npz"):
        shutil.copy(DATA / f"{CASE}{suffix}", tmp_path)
    return tmp_path


def edit_options(folder: Path, edit: Edit) -> None:
    """Changes the configuration of the case in `folder`."""
    path = folder / f"{CASE}.json"
    options = json.loads(path.read_text())
    edit(options)
    path.write_text(json.dumps(options))


def edit_arrays(folder: Path, edit: Edit) -> None:
    """Changes the arrays of the case in `folder`."""
    path = folder / f"{CASE}.npz"
    with np.load(path) as stored:
        arrays = {key: stored[key] for key in stored.files}
    edit(arrays)
    np.savez(path, **arrays)


def configuration(folder: Path) -> asked.Configuration:
    """The interpreted configuration of the case in `folder`."""
    return asked.configuration_of(conformance.load_case(folder / f"{CASE}.json").options)


def test_there_are_recorded_cases() -> None:
    assert CASE in CASES


@pytest.mark.parametrize("name", CASES)
def test_recorded_trajectory_is_reproduced(name: str) -> None:
    report = conformance.judge(DATA / f"{name}.json")
    assert report.verdict == "ok", report


def test_main_passes_on_recorded_cases(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main([str(folder)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[0] == CASE
    assert table[0].endswith("ok")
    assert table[-1] == "1 passed, 0 failed, 0 unsupported"


def test_command_line_fails_on_a_perturbed_trajectory(folder: Path) -> None:
    def perturb(arrays: dict[str, Any]) -> None:
        arrays["trajectory1"][-1] *= 1.01

    edit_arrays(folder, perturb)
    finished = subprocess.run(
        [sys.executable, str(TESTS / "conformance.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1, finished.stderr
    assert "FAIL" in finished.stdout
    assert "0 passed, 1 failed, 0 unsupported" in finished.stdout


def test_nan_is_a_failure(folder: Path) -> None:
    def spoil(arrays: dict[str, Any]) -> None:
        arrays["trajectory0"][3, 0, 0] = math.nan

    edit_arrays(folder, spoil)
    assert conformance.judge(folder / f"{CASE}.json").verdict == "FAIL"


def test_broken_case_is_a_failure_and_others_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a_broken_case.json").write_text("{")
    assert conformance.main([str(folder)]) == 1
    assert "1 passed, 1 failed, 0 unsupported" in capsys.readouterr().out


def test_empty_folder_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out == "0 passed, 0 failed, 0 unsupported\n"


def test_wrong_call_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main([]) == 2
    assert "usage" in capsys.readouterr().err


def root_options(**options: Any) -> Edit:
    return lambda case: case.update(prec=["root", options])


def arguments(**changes: Any) -> Edit:
    return lambda case: case["kw"].update(changes)


def sections(**changes: Any) -> Edit:
    return lambda case: case.update(changes)


UNSUPPORTED: dict[str, Edit] = {
    "unknown section": sections(surprise=1),
    "unknown argument": arguments(surprise=1),
    "unknown root option": root_options(surprise=1),
    "unknown eigen option": root_options(amortized_computation_config="EigenConfig(surprise=1)"),
    "unknown eigendecomposed option": sections(prec=["eigdec", {"surprise": 1}]),
    "unknown SOAP option": sections(prec=["eigcorr", {"surprise": 1}]),
    "unknown spectral option": sections(prec=["spectral", {"surprise": 1}]),
    "unknown grafting option": sections(graft=["adam", {"surprise": 1}]),
    "sgd has no options": sections(graft=["sgd", {"beta2": 0.9}]),
    "unknown momentum option": sections(mom={"surprise": 1}),
    "unknown option of primal averaging": sections(gpa={"surprise": 1}),
    "unknown option of Schedule-Free": sections(sf={"surprise": 1}),
    "two kinds of averaging": sections(gpa={}, sf={}),
    "preconditioner kind": sections(prec=["surprise", {}]),
    "weight decay kind": sections(wd="SURPRISE"),
    "root solver": root_options(amortized_computation_config="SurpriseConfig()"),
    "eigen tolerance": root_options(amortized_computation_config="EigenConfig(tolerance=0.1)"),
    "higher order without damping": root_options(
        amortized_computation_config="CoupledHigherOrderConfig(rel_epsilon=0.1)"
    ),
    "pseudo-inverse with epsilon": root_options(
        amortized_computation_config="EigenConfig(rank_deficient_stability_config="
        "PseudoInverseConfig(rank_rtol=1e-9))"
    ),
    "pseudo-inverse with corrected eigenvalues": lambda case: case.update(
        kw={**case["kw"], "epsilon": 0.0},
        prec=[
            "eigcorr",
            {
                "amortized_computation_config": "EighEigendecompositionConfig("
                "rank_deficient_stability_config=PseudoInverseConfig())"
            },
        ],
    ),
    "function": sections(prec=["sign", {"scale_fn": "<function mine at 0x7f00>"}]),
    "code": root_options(amortized_computation_config="__import__('os').getcwd()"),
    "no expression": root_options(inverse_exponent_override="{2: "),
    "grafting that takes in nothing": sections(graft=["adam", {"beta2": 1.0}]),
    "dtype": root_options(factor_matrix_dtype="torch.int8"),
    "basis dtype": sections(prec=["eigdec", {"factor_matrix_eigenvectors_dtype": "torch.float32"}]),
    "distribution": arguments(distributed_config="DDPDistributedConfig()"),
}


@pytest.mark.parametrize("edit", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_unknown_option_is_unsupported(
    folder: Path, edit: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_options(folder, edit)
    assert conformance.main([str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "unsupported: " in printed
    assert "0 passed, 0 failed, 1 unsupported" in printed


def test_unknown_array_is_unsupported(folder: Path) -> None:
    edit_arrays(folder, lambda arrays: arrays.update(momentum0=arrays["param0"]))
    assert conformance.judge(folder / f"{CASE}.json").verdict == "unsupported"


def test_options_are_read_as_the_reference_means_them(folder: Path) -> None:
    def rewrite(options: dict[str, Any]) -> None:
        options["kw"] = {
            "lr": 0.3,
            "betas": [0.8, 1.0],
            "max_preconditioner_dim": math.inf,
            "precondition_frequency": 3,
            "start_preconditioning_step": "inf",
            "use_bias_correction": False,
            "distributed_config": "SingleDeviceDistributedConfig("
            "target_parameter_dimensionality=inf)",
        }
        options["prec"] = [
            "root",
            {
                "amortized_computation_config": "EigenConfig(rank_deficient_stability_config="
                "PerturbationConfig(perturb_before_computation=False), tolerance=0.0)",
                "drop_weighting_factor_on_gsquare": True,
                "use_symmetric_packing": False,
                "use_trace_scaling": True,
                "trace_scaling_exponent": 0.25,
                "inverse_exponent_override": {"2": 0.5, "3": {"0": 0.0}},
            },
        ]
        options.update(wd="INDEPENDENT", graft=["rmsprop", {}], mom={"use_nesterov": True})

    edit_options(folder, rewrite)
    assert configuration(folder) == asked.Configuration(
        learning_rate=0.3,
        beta1=0.8,
        beta2=1.0,
        beta3=0.8,
        epsilon=1e-12,
        weight_decay=0.0,
        weight_decay_kind="independent",
        block_size=math.inf,
        target_dims=math.inf,
        refresh_every=3,
        start=math.inf,
        bias_correction=False,
        preconditioner=asked.RootShampoo(
            solver=asked.Eigen(stability=asked.Perturbation(before=False)),
            statistics=asked.Statistics(weighted=False, trace_exponent=0.25),
            exponents={2: 0.5, 3: {0: 0.0}},
        ),
        grafting=asked.Moment(kind="rmsprop", beta2=0.99, epsilon=1e-10),
        averaging=asked.Momentum(momentum=0.5, nesterov=True),
    )


@pytest.mark.parametrize(
    ("plain", "other"),
    [
        (sections(wd="INDEPENDENT"), sections(wd="WeightDecayType.INDEPENDENT")),
        (sections(wd="CORRECTED"), sections(wd="corrected")),
        (sections(wd="L2"), sections(wd="<WeightDecayType.L2: 1>")),
        (sections(mom={"momentum": 0.9}), sections(mom="ClassicMomentumConfig(momentum=0.9)")),
        (sections(prec=["eigcorr", {}]), sections(prec="eigcorr")),
        (
            sections(graft=["adam", {"beta2": 0.9}]),
            sections(graft="AdamPreconditionerConfig(beta2=0.9)"),
        ),
        (
            sections(prec=["eigdec", {"inverse_exponent_override": "{2: 0.5}"}]),
            sections(
                prec="EigendecomposedShampooPreconditionerConfig(amortized_computation_config="
                "EighEigendecompositionConfig(), inverse_exponent_override={2: 0.5})"
            ),
        ),
        (sections(prec=["root", {}]), lambda case: case.pop("prec")),
        (
            sections(prec=["kleigdec", {}]),
            sections(prec=["EigendecomposedKLShampooPreconditionerConfig", {}]),
        ),
        (
            sections(prec=["eigcorr", {"ignored_basis_change_dims": "{2: [0]}"}]),
            sections(prec=["eigcorr", {"ignored_basis_change_dims": {"2": [0]}}]),
        ),
        (
            root_options(inverse_exponent_override="{2: 0.5, 3: {0: 0.0}}"),
            root_options(inverse_exponent_override={"2": 0.5, "3": {"0": 0.0}}),
        ),
        (sections(sf={}), sections(sf={"train_interp_coeff": 0.8, "eval_coeff_lr_power": 2})),
        (arguments(max_preconditioner_dim="inf"), arguments(max_preconditioner_dim=math.inf)),
        (sections(graft=None), lambda case: case.pop("graft")),
        (
            arguments(start_preconditioning_step=9),
            arguments(start_preconditioning_step=9, use_pin_memory=True),
        ),
    ],
)
def test_spellings_mean_the_same(folder: Path, plain: Edit, other: Edit) -> None:
    read = []
    for edit in (plain, other):
        for suffix in (".json", ".npz"):
            shutil.copy(DATA / f"{CASE}{suffix}", folder)
        edit_options(folder, edit)
        read.append(configuration(folder))
    assert read[0] == read[1]


@pytest.mark.parametrize(("written", "start"), [(-1, 5), (7, 7), (math.inf, math.inf)])
def test_start_defaults_to_the_first_refresh(folder: Path, written: float, start: float) -> None:
    edit_options(folder, arguments(start_preconditioning_step=written))
    assert configuration(folder).start == start


def test_recorded_rates_answer_ints_and_tensors() -> None:
    rates = RecordedRates((0.5, 0.1))
    assert rates(0) == 0.5
    looked_up = rates(torch.tensor(1))
    assert looked_up.dtype == torch.float32
    assert looked_up == torch.tensor(0.1, dtype=torch.float32)
