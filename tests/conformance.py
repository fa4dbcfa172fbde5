"""Replays recorded trajectories of the reference implementation through `shampoo_func`.

    python tests/conformance.py DIR

`DIR` holds cases: `NAME.json`, the configuration in the names of Distributed Shampoo
(facebookresearch/optimizers), and `NAME.npz`, the float64 arrays `param0`, `grads0`, `trajectory0`,
`param1`, ... and `lr`, one learning rate per step. For every case one line is printed: name, error,
tolerance and a verdict. The error is the largest, over the parameters, of::

    ||ours - recorded|| / ||recorded - initial||        (norms over the whole trajectory)

The recording kept learning rates and bias corrections in float32 scalars while ours are float64;
that is what the tolerance allows for. An option that this library lacks makes the case
`unsupported`, and so does every option that this script does not know: nothing is ignored silently.
The exit status is 0 only if there was a case and all of them passed.

`conformance_options.py` reads the reference's names, `conformance_build.py` has ours.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from conformance_build import transformation_from
from conformance_options import Options, Unsupported, configuration_of

import shampoo_func as sf

Array = npt.NDArray[np.float64]

# Of a case that names none: room for float32 learning rates and bias corrections.
TOLERANCE = 5e-5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One recorded trajectory.

    Attributes:
        name: File name without suffix.
        options: The JSON as it was read.
        params: Initial values.
        gradients: Per parameter, `[steps, *shape]`.
        trajectory: Per parameter, `[steps, *shape]`, the values after each step.
        learning_rates: `[steps]`.
        tolerance: Largest error that passes.
    """

    name: str
    options: Options
    params: list[Array]
    gradients: list[Array]
    trajectory: list[Array]
    learning_rates: Array
    tolerance: float


def load_case(path: Path) -> Case:
    """Reads `NAME.json` and the `NAME.npz` beside it.

    Args:
        path: The JSON file.

    Returns:
        The case; its options are not interpreted yet.

    Raises:
        Unsupported: There is an array of an unknown name.
    """
    options = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz")) as stored:
        arrays = {key: np.asarray(stored[key], dtype=np.float64) for key in stored.files}
    count = sum(key.startswith("param") for key in arrays)
    names = [f"{what}{i}" for what in ("param", "grads", "trajectory") for i in range(count)]
    unknown = sorted(set(arrays) - {*names, "lr"})
    if unknown:
        raise Unsupported(f"unknown array: {', '.join(unknown)}")
    return Case(
        name=path.stem,
        options=options,
        params=[arrays[f"param{i}"] for i in range(count)],
        gradients=[arrays[f"grads{i}"] for i in range(count)],
        trajectory=[arrays[f"trajectory{i}"] for i in range(count)],
        learning_rates=arrays["lr"],
        tolerance=float(options.get("tolerance", TOLERANCE)),
    )


def transformation_of(case: Case) -> sf.Transformation:
    """Builds the optimizer that a case was recorded with.

    Args:
        case: Its options and learning rates are used.

    Returns:
        A transformation with the whole chain, learning rate included.

    Raises:
        Unsupported: See `configuration_of`.
    """
    return transformation_from(configuration_of(case.options), case.learning_rates.tolist())


# ------------------------------------------------------------------------------- replay and report


@dataclass(frozen=True, kw_only=True)
class Report:
    """The verdict on one case.

    Attributes:
        name: Of the case.
        verdict: "ok", "FAIL" or "unsupported".
        error: See the module's formula; None if there was no replay.
        tolerance: Largest error that passes; None if there was no replay.
        reason: Why there was no replay.
    """

    name: str
    verdict: Literal["ok", "FAIL", "unsupported"]
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""


def replay(case: Case, transformation: sf.Transformation) -> list[Array]:
    """Feeds the recorded gradients to a transformation.

    Args:
        case: Initial values and gradients.
        transformation: Made by `transformation_of`.

    Returns:
        Per parameter, `[steps, *shape]`, the values after each step.
    """
    params = {f"param{i}": torch.tensor(value) for i, value in enumerate(case.params)}
    state = transformation.init(params)
    visited: dict[str, list[torch.Tensor]] = {name: [] for name in params}
    for step in range(len(case.learning_rates)):
        gradients = {
            f"param{i}": torch.tensor(recorded[step]) for i, recorded in enumerate(case.gradients)
        }
        updates, state = transformation.update(gradients, state, params)
        params = sf.apply_updates(params, updates)
        for name, value in params.items():
            visited[name].append(value)
    return [torch.stack(values).numpy() for values in visited.values()]


def error_of(case: Case, trajectory: Sequence[Array]) -> float:
    """The largest relative deviation over the parameters: see the module's formula.

    Args:
        case: With the recorded trajectory.
        trajectory: Ours, in the same layout.

    Returns:
        The error; NaN if any value is NaN.
    """
    errors = [
        _relative(float(np.linalg.norm(ours - recorded)), float(np.linalg.norm(recorded - initial)))
        for ours, recorded, initial in zip(trajectory, case.trajectory, case.params, strict=True)
    ]
    return float(np.max(errors))


def _relative(deviation: float, distance: float) -> float:
    if distance == 0.0:
        return 0.0 if deviation == 0.0 else math.inf
    return deviation / distance


def judge(path: Path) -> Report:
    """Loads, replays and compares one case.

    Args:
        path: The JSON file.

    Returns:
        The verdict; an exception other than `Unsupported` is a failure.
    """
    try:
        case = load_case(path)
        error = error_of(case, replay(case, transformation_of(case)))
    except Unsupported as reason:
        return Report(name=path.stem, verdict="unsupported", reason=str(reason))
    except Exception as exception:
        # Whatever breaks one case is its verdict; the others are still replayed.
        reason_text = f"{type(exception).__name__}: {exception}"
        return Report(name=path.stem, verdict="FAIL", reason=reason_text)
    # Written so that a NaN fails.
    verdict: Literal["ok", "FAIL"] = "ok" if error <= case.tolerance else "FAIL"
    return Report(name=case.name, verdict=verdict, error=error, tolerance=case.tolerance)


def lines(reports: Sequence[Report]) -> list[str]:
    """One aligned line per report, then the summary.

    Args:
        reports: In the order to print.

    Returns:
        The lines, without line ends.
    """
    width = max((len(report.name) for report in reports), default=0)
    table = [
        f"{report.name:<{width}}  {_scientific(report.error)}  {_scientific(report.tolerance)}"
        f"  {report.verdict}{': ' if report.reason else ''}{report.reason}"
        for report in reports
    ]
    passed, failed, unsupported = (
        sum(report.verdict == verdict for report in reports)
        for verdict in ("ok", "FAIL", "unsupported")
    )
    return [*table, f"{passed} passed, {failed} failed, {unsupported} unsupported"]


def _scientific(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.2e}':>8}"


def main(arguments: Sequence[str]) -> int:
    """Replays every case of a folder and prints the verdicts.

    Args:
        arguments: One: the folder.

    Returns:
        The exit status: 0 if there was a case and all passed, 2 if the call was wrong, else 1.
    """
    if len(arguments) != 1:
        print("usage: python tests/conformance.py DIR", file=sys.stderr)
        return 2
    reports = [judge(path) for path in sorted(Path(arguments[0]).glob("*.json"))]
    print("\n".join(lines(reports)))
    if not reports:
        print(f"no case (*.json) in {arguments[0]}", file=sys.stderr)
    return 0 if reports and all(report.verdict == "ok" for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
