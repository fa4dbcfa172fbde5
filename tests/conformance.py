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
"""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

import shampoo_func as sf

Array = npt.NDArray[np.float64]
Options = Mapping[str, Any]
Exponents = dict[int, float | dict[int, float]]


class Unsupported(Exception):
    """The case asks for something that this library, or this script, does not have."""


# ---------------------------------------------------------------------------- what a case asks for


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """Eigenvalues are kept positive by adding epsilon to the matrix, or to its eigenvalues."""

    before: bool = True


@dataclass(frozen=True, kw_only=True)
class PseudoInverse:
    """Eigenvalues at or below `max(rtol * largest, atol)` contribute nothing.

    Attributes:
        atol: Absolute cutoff.
        rtol: Relative cutoff; None means the size of the matrix times the machine precision.
    """

    atol: float = 0.0
    rtol: float | None = 0.0


@dataclass(frozen=True, kw_only=True)
class Preconditioner:
    """Cached inverse roots by eigendecomposition, the reference's kind `root`."""

    stability: Perturbation | PseudoInverse = Perturbation()
    exponents: Exponents | None = None
    trace_exponent: float | None = None
    factor_dtype: torch.dtype = torch.float64
    root_dtype: torch.dtype = torch.float64


@dataclass(frozen=True, kw_only=True)
class Grafting:
    """The second moment whose norm the direction takes."""

    kind: Literal["sgd", "adagrad", "rmsprop", "adam"]
    beta2: float = 1.0
    epsilon: float = 1e-10


@dataclass(frozen=True, kw_only=True)
class Momentum:
    """Classic momentum."""

    momentum: float = 0.5
    dampening: float = 0.0
    nesterov: bool = False


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A case's configuration, understood completely; defaults are the reference's."""

    learning_rate: float
    beta1: float
    beta2: float
    beta3: float
    epsilon: float
    weight_decay: float
    weight_decay_kind: Literal["l2", "decoupled", "corrected", "independent"]
    block_size: float
    merge_dims: bool
    refresh_every: int
    start: float
    bias_correction: bool
    preconditioner: Preconditioner
    grafting: Grafting | None
    momentum: Momentum | None


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
    """
    options = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz")) as stored:
        arrays = {key: np.asarray(stored[key], dtype=np.float64) for key in stored.files}
    count = sum(key.startswith("param") for key in arrays)
    names = [f"{what}{i}" for what in ("param", "grads", "trajectory") for i in range(count)]
    _only(arrays, [*names, "lr"], "array")
    return Case(
        name=path.stem,
        options=options,
        params=[arrays[f"param{i}"] for i in range(count)],
        gradients=[arrays[f"grads{i}"] for i in range(count)],
        trajectory=[arrays[f"trajectory{i}"] for i in range(count)],
        learning_rates=arrays["lr"],
        tolerance=float(options["tolerance"]),
    )


# ------------------------------------------------------------------- from the reference's own names

# These say how the arrays were drawn or described, not what the optimizer does.
DESCRIPTIONS = {"name", "shapes", "steps", "sensitivity", "tolerance", "lowrank"}
SECTIONS = {"kw", "prec", "graft", "wd", "mom", "gpa", "sf"}

# These change how the reference runs, never what it computes.
INERT_ARGUMENTS = {"use_pin_memory", "shampoo_runtime_config", "concurrency_config"}
ARGUMENTS = INERT_ARGUMENTS | {
    "lr",
    "betas",
    "beta3",
    "epsilon",
    "weight_decay",
    "max_preconditioner_dim",
    "precondition_frequency",
    "start_preconditioning_step",
    "use_bias_correction",
    "distributed_config",
}
INERT_PRECONDITIONER_OPTIONS = {
    "num_tolerated_failed_amortized_computations",
    "use_symmetric_packing",
}
PRECONDITIONER_OPTIONS = INERT_PRECONDITIONER_OPTIONS | {
    "amortized_computation_config",
    "drop_weighting_factor_on_gsquare",
    "factor_matrix_dtype",
    "inv_factor_matrix_dtype",
    "use_trace_scaling",
    "trace_scaling_exponent",
    "inverse_exponent_override",
}
# Retrying in double precision and moving the computation elsewhere change nothing in float64.
INERT_EIGEN_OPTIONS = {"retry_double_precision", "eigendecomposition_offload_device"}
EIGEN_OPTIONS = INERT_EIGEN_OPTIONS | {"rank_deficient_stability_config", "tolerance"}
GRAFTING_OPTIONS: dict[str, set[str]] = {
    "sgd": set(),
    "adagrad": {"epsilon"},
    "rmsprop": {"epsilon", "beta2", "drop_weighting_factor_on_gsquare"},
    "adam": {"epsilon", "beta2", "drop_weighting_factor_on_gsquare"},
}
GRAFTING_BETA2 = {"sgd": 1.0, "adagrad": 1.0, "rmsprop": 0.99, "adam": 0.999}
WEIGHT_DECAY_KINDS: dict[str, Literal["l2", "decoupled", "corrected", "independent"]] = {
    "L2": "l2",
    "DECOUPLED": "decoupled",
    "CORRECTED": "corrected",
    "INDEPENDENT": "independent",
}
DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("float64", "float32")}


class Call(NamedTuple):
    """A configuration object in print: `NAME(key=value, ...)`."""

    name: str
    options: dict[str, Any]


def parse_config(text: str) -> Any:
    """Reads the printed form of a configuration, without evaluating it.

    Args:
        text: Numbers, strings, tuples, dicts, `inf`, and calls with keyword arguments.

    Returns:
        The value; a call becomes a `Call`.

    Raises:
        Unsupported: The text holds anything else.
    """
    try:
        return _value_of(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError) as error:
        raise Unsupported(f"cannot read {text!r}") from error


def _value_of(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords):
            return Call(name, {str(word.arg): _value_of(word.value) for word in keywords})
        case ast.Name(id="inf") | ast.Attribute(value=ast.Name(id="math"), attr="inf"):
            return math.inf
    return ast.literal_eval(node)


def configuration_of(case: Case) -> Configuration:
    """Interprets the options of a case.

    Args:
        case: With the options in the reference's names.

    Returns:
        What to build.

    Raises:
        Unsupported: Any option is unknown or has a value that this library cannot follow.
    """
    options = case.options
    _only(options, DESCRIPTIONS | SECTIONS, "section")
    for averaging in ("gpa", "sf"):
        if options.get(averaging) is not None:
            raise Unsupported(f"iterate averaging: {averaging}")
    arguments = options.get("kw", {})
    _only(arguments, ARGUMENTS, "argument")
    beta1, beta2 = (float(beta) for beta in arguments.get("betas", (0.9, 1.0)))
    beta3 = float(arguments.get("beta3", -1.0))
    refresh_every = int(arguments.get("precondition_frequency", 1))
    start = _number(arguments.get("start_preconditioning_step", -1))
    preconditioner = _preconditioner(options.get("prec") or ("root", {}), beta2)
    epsilon = float(arguments.get("epsilon", 1e-12))
    if isinstance(preconditioner.stability, PseudoInverse) and epsilon != 0.0:
        raise Unsupported(f"the reference refuses a pseudo-inverse with epsilon {epsilon}")
    return Configuration(
        learning_rate=float(arguments.get("lr", 1e-2)),
        beta1=beta1,
        beta2=beta2,
        # Without a filter (beta1 = 0) the reference does not look at beta3.
        beta3=beta1 if beta3 == -1.0 or beta1 == 0.0 else beta3,
        epsilon=epsilon,
        weight_decay=float(arguments.get("weight_decay", 0.0)),
        weight_decay_kind=_weight_decay_kind(options.get("wd") or "DECOUPLED"),
        block_size=_number(arguments.get("max_preconditioner_dim", 1024)),
        merge_dims=_merges_dims(arguments.get("distributed_config")),
        refresh_every=refresh_every,
        start=refresh_every if start == -1 else start,
        bias_correction=bool(arguments.get("use_bias_correction", True)),
        preconditioner=preconditioner,
        grafting=_grafting(options.get("graft")),
        momentum=_momentum(options.get("mom")),
    )


def _only(given: Collection[str], known: Collection[str], what: str) -> None:
    """Refuses keys that are not known.

    Raises:
        Unsupported: There is one.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise Unsupported(f"unknown {what}: {', '.join(unknown)}")


def _number(value: float | str) -> float:
    """Reads a number that may be infinite, which JSON has no agreed spelling for."""
    number = float(value)
    return number if math.isinf(number) else int(number)


def _weight_decay_kind(
    name: str,
) -> Literal["l2", "decoupled", "corrected", "independent"]:
    if name not in WEIGHT_DECAY_KINDS:
        raise Unsupported(f"unknown weight decay type: {name}")
    return WEIGHT_DECAY_KINDS[name]


def _merges_dims(text: str | None) -> bool:
    """Whether dimensions are merged: the target dimensionality is 1 (yes) or infinite (no)."""
    if text is None:
        return True
    config = _call(text, "SingleDeviceDistributedConfig", {"target_parameter_dimensionality"})
    target = config.get("target_parameter_dimensionality", 1)
    if target not in (1, math.inf):
        raise Unsupported(f"target_parameter_dimensionality={target}")
    return bool(target == 1)


def _call(text: str | Call, name: str, known: Collection[str]) -> dict[str, Any]:
    """Reads one configuration object whose class and options must be known."""
    config = parse_config(text) if isinstance(text, str) else text
    if not isinstance(config, Call) or config.name != name:
        raise Unsupported(f"{getattr(config, 'name', config)} in place of {name}")
    _only(config.options, known, f"option of {name}")
    return config.options


def _preconditioner(section: Sequence[Any], beta2: float) -> Preconditioner:
    kind, options = section
    if kind != "root":
        raise Unsupported(f"preconditioner kind: {kind}")
    _only(options, PRECONDITIONER_OPTIONS, "option of root")
    if options.get("drop_weighting_factor_on_gsquare", False) and beta2 != 1.0:
        raise Unsupported(f"drop_weighting_factor_on_gsquare with beta2={beta2}")
    scaled = options.get("use_trace_scaling", False)
    return Preconditioner(
        stability=_stability(options.get("amortized_computation_config", "EigenConfig()")),
        exponents=_exponents(options.get("inverse_exponent_override") or {}),
        trace_exponent=float(options.get("trace_scaling_exponent", 0.5)) if scaled else None,
        factor_dtype=_dtype(options.get("factor_matrix_dtype", "torch.float64")),
        root_dtype=_dtype(options.get("inv_factor_matrix_dtype", "torch.float64")),
    )


def _stability(text: str) -> Perturbation | PseudoInverse:
    eigen = _call(text, "EigenConfig", EIGEN_OPTIONS)
    if eigen.get("tolerance", 0.0) != 0.0:
        raise Unsupported(f"EigenConfig with tolerance {eigen['tolerance']}")
    config = eigen.get("rank_deficient_stability_config", Call("PerturbationConfig", {}))
    if isinstance(config, Call) and config.name == "PseudoInverseConfig":
        cutoffs = _call(config, "PseudoInverseConfig", {"rank_atol", "rank_rtol"})
        rtol = cutoffs.get("rank_rtol", 0.0)
        return PseudoInverse(
            atol=float(cutoffs.get("rank_atol", 0.0)), rtol=None if rtol is None else float(rtol)
        )
    options = _call(config, "PerturbationConfig", {"perturb_before_computation"})
    return Perturbation(before=bool(options.get("perturb_before_computation", True)))


def _exponents(override: str | Options) -> Exponents | None:
    """Reads `{order: e}` or `{order: {dim: e}}`; JSON may have turned the keys to strings."""
    table = parse_config(override) if isinstance(override, str) else override
    exponents = {
        int(order): {int(dim): float(e) for dim, e in entry.items()}
        if isinstance(entry, Mapping)
        else float(entry)
        for order, entry in table.items()
    }
    return exponents or None


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise Unsupported(f"dtype {name}")
    dtype: torch.dtype = DTYPES[name]
    return dtype


def _grafting(section: Sequence[Any] | None) -> Grafting | None:
    if section is None:
        return None
    kind, options = section
    if kind not in GRAFTING_OPTIONS:
        raise Unsupported(f"grafting kind: {kind}")
    _only(options, GRAFTING_OPTIONS[kind], f"option of {kind} grafting")
    beta2 = float(options.get("beta2", GRAFTING_BETA2[kind]))
    dropped = bool(options.get("drop_weighting_factor_on_gsquare", False))
    # With beta2 = 1 the reference sums if the weighting is dropped, and takes in nothing if not.
    if kind in ("rmsprop", "adam") and dropped != (beta2 == 1.0):
        raise Unsupported(
            f"{kind} grafting with beta2={beta2} and drop_weighting_factor_on_gsquare={dropped}"
        )
    return Grafting(kind=kind, beta2=beta2, epsilon=float(options.get("epsilon", 1e-10)))


def _momentum(options: Options | None) -> Momentum | None:
    if options is None:
        return None
    _only(options, {"momentum", "dampening", "use_nesterov"}, "option of momentum")
    return Momentum(
        momentum=float(options.get("momentum", 0.5)),
        dampening=float(options.get("dampening", 0.0)),
        nesterov=bool(options.get("use_nesterov", False)),
    )


# ----------------------------------------------------------------------------- into our own names


@dataclass(frozen=True, slots=True)
class RecordedRates:
    """The schedule that returns `rates[step]`.

    Attributes:
        rates: One learning rate per step.
    """

    rates: tuple[float, ...]

    def __call__(self, step: int | torch.Tensor) -> float | torch.Tensor:
        """Looks up the rate of the step after `step` steps."""
        if isinstance(step, torch.Tensor):
            return torch.tensor(self.rates, dtype=torch.float64, device=step.device)[step]
        return self.rates[step]


def transformation_of(case: Case) -> sf.Transformation:
    """Builds the optimizer that a case was recorded with.

    Args:
        case: Its options, learning rates and the size of its parameters are used.

    Returns:
        A transformation with the whole chain, learning rate included.

    Raises:
        Unsupported: See `configuration_of`.
    """
    config = configuration_of(case)
    momentum = config.momentum or Momentum(momentum=0.0)
    relative_decay = config.weight_decay_kind in ("corrected", "independent")
    # No block is larger than the largest parameter, so its size stands in for infinity.
    largest = max(value.size for value in case.params)
    return sf.shampoo(
        RecordedRates(tuple(case.learning_rates.tolist())),
        beta1=config.beta1,
        beta2=config.beta2,
        beta3=config.beta3,
        weight_decay=config.weight_decay,
        weight_decay_kind=config.weight_decay_kind,
        peak_learning_rate=config.learning_rate if relative_decay else None,
        momentum=momentum.momentum,
        nesterov=momentum.nesterov,
        dampening=momentum.dampening,
        block_size=largest if math.isinf(config.block_size) else int(config.block_size),
        merge_dims=config.merge_dims,
        refresh_every=config.refresh_every,
        start=config.start,
        grafting=_magnitude(config.grafting),
        exponents=config.preconditioner.exponents,
        bias_correction=config.bias_correction,
        trace_scaling=config.preconditioner.trace_exponent,
        root=_root(config.preconditioner.stability, config.epsilon),
        factor_dtype=config.preconditioner.factor_dtype,
        root_dtype=config.preconditioner.root_dtype,
    )


def _root(stability: Perturbation | PseudoInverse, epsilon: float) -> Any:
    if isinstance(stability, PseudoInverse):
        cutoffs = sf.PseudoInverse(stability.atol, stability.rtol)
        return sf.eigh_root(0.0, pseudo_inverse=cutoffs)
    return sf.eigh_root(epsilon, perturb="before" if stability.before else "after")


def _magnitude(grafting: Grafting | None) -> Any:
    if grafting is None:
        return None
    if grafting.kind == "sgd":
        return sf.identity_preconditioner()
    return sf.second_moment(
        grafting.beta2, epsilon=grafting.epsilon, bias_correction=grafting.kind == "adam"
    )


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
