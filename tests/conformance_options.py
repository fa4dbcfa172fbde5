"""What a recorded case asks for: the reference's own names, read into plain values.

Nothing here knows `shampoo_func`; `conformance_build.py` turns the values into an optimizer. An
option that is not known here makes the case `Unsupported`: nothing is ignored silently.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

Options = Mapping[str, Any]
Exponents = dict[int, float | dict[int, float]]
DecayKind = Literal["l2", "decoupled", "corrected", "independent"]


class Unsupported(Exception):
    """The case asks for something that this library, or this script, does not have."""


# ------------------------------------------------------------------------------- matrix functions


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


Stability = Perturbation | PseudoInverse


@dataclass(frozen=True, kw_only=True)
class Eigen:
    """Inverse root by eigendecomposition (`EigenConfig`)."""

    stability: Stability = Perturbation()


@dataclass(frozen=True, kw_only=True)
class CoupledNewton:
    """Inverse root by coupled Newton iteration, the ridge being the optimizer's epsilon."""

    max_iterations: int = 100
    tolerance: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class HigherOrder:
    """Inverse root by a coupled iteration of higher order, with a ridge of its own."""

    relative_epsilon: float
    absolute_epsilon: float
    max_iterations: int = 100
    tolerance: float = 1e-8
    order: int = 3


@dataclass(frozen=True, kw_only=True)
class Eigh:
    """Eigenbasis by `eigh`; a basis that is off by no more than the tolerance is kept."""

    stability: Stability = Perturbation()
    tolerance: float = 0.0


@dataclass(frozen=True, kw_only=True)
class QR:
    """Eigenbasis by iterations of the QR algorithm from the previous one."""

    stability: Stability = Perturbation()
    tolerance: float = 0.0
    max_iterations: int = 1


@dataclass(frozen=True, kw_only=True)
class NewtonSchulz:
    """The orthogonal polar factor by Newton-Schulz iterations."""

    iterations: int = 5
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True, kw_only=True)
class SVD:
    """The orthogonal polar factor by singular value decomposition."""

    times_nuclear_norm: bool = False


RootSolver = Eigen | CoupledNewton | HigherOrder
BasisSolver = Eigh | QR


# -------------------------------------------------------------------------------- preconditioners


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """How factors are gathered, and what is done to one before it is decomposed.

    Attributes:
        kullback_leibler: Whether a gradient is preconditioned along the other dimensions first.
        weighted: Whether what is taken in has the weight `1 - beta2`, rather than 1.
        trace_exponent: A factor is scaled by its trace to minus this power; None for no scaling.
        dtype: Of the factors.
    """

    kullback_leibler: bool = False
    weighted: bool = True
    trace_exponent: float | None = None
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True, kw_only=True)
class RootShampoo:
    """Cached inverse roots, the reference's kinds `root` and `klroot`."""

    solver: RootSolver = Eigen()
    statistics: Statistics = Statistics()
    exponents: Exponents | None = None
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True, kw_only=True)
class EigendecomposedShampoo:
    """Cached eigenvalues and eigenvectors, the reference's kind `eigdec` and its KL form."""

    solver: BasisSolver = Eigh()
    statistics: Statistics = Statistics()
    exponents: Exponents | None = None


@dataclass(frozen=True, kw_only=True)
class EigenvalueCorrected:
    """A second moment in the eigenbasis (SOAP), the reference's kind `eigcorr`.

    Attributes:
        solver: Gives the basis.
        statistics: Of the factors; the second moment is weighted as they are.
        exponents: By order, the power of the second moment; 1/2 where there is none.
        ignored: By order, the dimensions that are not rotated.
    """

    solver: BasisSolver = Eigh()
    statistics: Statistics = Statistics()
    exponents: dict[int, float] | None = None
    ignored: dict[int, tuple[int, ...]] | None = None


@dataclass(frozen=True, kw_only=True)
class Spectral:
    """The orthogonal polar factor of a matrix."""

    solver: NewtonSchulz | SVD = NewtonSchulz()


@dataclass(frozen=True, kw_only=True)
class Sign:
    """The sign of every element."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """An elementwise second moment, or none at all (`sgd`).

    Attributes:
        kind: Whose.
        beta2: Decay; 1 for a sum.
        epsilon: Added to its root.
        weighted: Whether a square is taken in with the weight `1 - beta2`, rather than 1.
    """

    kind: Literal["sgd", "adagrad", "rmsprop", "adam"]
    beta2: float = 1.0
    epsilon: float = 1e-10
    weighted: bool = True


Preconditioner = (
    RootShampoo | EigendecomposedShampoo | EigenvalueCorrected | Spectral | Sign | Moment
)


# ------------------------------------------------------------------------------- the whole of it


@dataclass(frozen=True, kw_only=True)
class Momentum:
    """Classic momentum."""

    momentum: float = 0.5
    dampening: float = 0.0
    nesterov: bool = False


@dataclass(frozen=True, kw_only=True)
class PrimalAveraging:
    """Generalized primal averaging."""

    eval_interpolation: float = 0.9
    train_interpolation: float = 0.8


@dataclass(frozen=True, kw_only=True)
class ScheduleFree:
    """Schedule-Free averaging, weighted by a power of the learning rate."""

    train_interpolation: float = 0.8
    rate_power: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A case's configuration, understood completely; defaults are the reference's.

    Attributes:
        target_dims: Neighbouring dimensions are merged while more than this many are left; `inf`
            keeps every shape as it is.
        averaging: What follows the direction.
    """

    learning_rate: float
    beta1: float
    beta2: float
    beta3: float
    epsilon: float
    weight_decay: float
    weight_decay_kind: DecayKind
    block_size: float
    target_dims: float
    refresh_every: int
    start: float
    bias_correction: bool
    preconditioner: Preconditioner
    grafting: Preconditioner | None
    averaging: Momentum | PrimalAveraging | ScheduleFree | None


# These say how the arrays were drawn or described, not what the optimizer does: the learning rates
# themselves are an array.
DESCRIPTIONS = {
    "name",
    "shapes",
    "steps",
    "sensitivity",
    "tolerance",
    "lowrank",
    "seed",
    "schedule",
    "lr_schedule",
    "description",
    "note",
}
SECTIONS = {"kw", "prec", "graft", "wd", "mom", "gpa", "sf"}

# These change how the reference runs, never what it computes.
INERT_ARGUMENTS = {
    "use_pin_memory",
    "shampoo_pt2_compile_config",
    "shampoo_runtime_config",
    "concurrency_config",
}
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
# Symmetric matrices may be stored by half; a failure is tolerated so often, and none happens.
INERT_OPTIONS = {"num_tolerated_failed_amortized_computations", "use_symmetric_packing"}
FACTOR_OPTIONS = INERT_OPTIONS | {
    "amortized_computation_config",
    "drop_weighting_factor_on_gsquare",
    "factor_matrix_dtype",
    "use_trace_scaling",
    "trace_scaling_exponent",
    "inverse_exponent_override",
}
ROOT_OPTIONS = FACTOR_OPTIONS | {"inv_factor_matrix_dtype"}
BASIS_DTYPES = {"factor_matrix_eigenvectors_dtype", "factor_matrix_eigenvalues_dtype"}
CORRECTED_DTYPES = {"factor_matrix_eigenvectors_dtype", "corrected_eigenvalues_dtype"}
# Retrying in double precision and moving the computation elsewhere change nothing in float64.
INERT_EIGEN_OPTIONS = {"retry_double_precision", "eigendecomposition_offload_device"}
BASIS_OPTIONS = {"rank_deficient_stability_config", "tolerance"}
EIGEN_OPTIONS = INERT_EIGEN_OPTIONS | BASIS_OPTIONS
MOMENT_OPTIONS: dict[str, set[str]] = {
    "sgd": set(),
    "adagrad": {"epsilon"},
    "rmsprop": {"epsilon", "beta2", "drop_weighting_factor_on_gsquare"},
    "adam": {"epsilon", "beta2", "drop_weighting_factor_on_gsquare"},
}
MOMENT_BETA2 = {"sgd": 1.0, "adagrad": 1.0, "rmsprop": 0.99, "adam": 0.999}
# Every kind under the names it may go by: the recording's, and the reference's class.
KINDS = {
    "root": ("root", "rootinv", "rootinvshampoo", "shampoo"),
    "klroot": ("klroot", "rootkl", "rootinvkl", "rootinvklshampoo", "kl", "klshampoo"),
    "eigdec": ("eigdec", "eigendecomposed", "eigendecomposedshampoo"),
    "kleigdec": (
        "kleigdec",
        "kleig",
        "eigdeckl",
        "kleigendecomposed",
        "eigendecomposedkl",
        "eigendecomposedklshampoo",
    ),
    "eigcorr": ("eigcorr", "eigenvaluecorrected", "eigenvaluecorrectedshampoo"),
    "soap": ("soap",),
    "spectral": ("spectral", "spectraldescent"),
    "sign": ("sign", "signdescent"),
    "sgd": ("sgd",),
    "adagrad": ("adagrad",),
    "rmsprop": ("rmsprop",),
    "adam": ("adam",),
}
KIND_OF = {alias: kind for kind, aliases in KINDS.items() for alias in aliases}
AVERAGING_CLASSES: dict[str, dict[str, set[str]]] = {
    "mom": {"ClassicMomentumConfig": {"momentum", "dampening", "use_nesterov"}},
    "gpa": {"GeneralizedPrimalAveragingConfig": {"eval_interp_coeff", "train_interp_coeff"}},
    "sf": {"ScheduleFreeConfig": {"train_interp_coeff", "eval_coeff_lr_power"}},
}
WEIGHT_DECAY_KINDS: dict[str, DecayKind] = {
    "L2": "l2",
    "DECOUPLED": "decoupled",
    "CORRECTED": "corrected",
    "INDEPENDENT": "independent",
}
DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("float64", "float32")}


def configuration_of(options: Options) -> Configuration:
    """Interprets the options of a case.

    Args:
        options: The JSON, in the reference's names.

    Returns:
        What to build.

    Raises:
        Unsupported: Any option is unknown or has a value that this library cannot follow.
    """
    _only(options, DESCRIPTIONS | SECTIONS, "section")
    arguments = options.get("kw", {})
    _only(arguments, ARGUMENTS, "argument")
    beta1, beta2 = (float(beta) for beta in arguments.get("betas", (0.9, 1.0)))
    beta3 = float(arguments.get("beta3", -1.0))
    preconditioner = _preconditioner(options.get("prec") or ("root", {}))
    stateless = isinstance(preconditioner, Spectral | Sign)
    # The reference refreshes at every step what has nothing to refresh.
    refresh_every = 1 if stateless else int(arguments.get("precondition_frequency", 1))
    start = _number(arguments.get("start_preconditioning_step", -1))
    target_dims = _target_dims(arguments.get("distributed_config"))
    epsilon = float(arguments.get("epsilon", 1e-12))
    if _drops_eigenvalues(preconditioner) and epsilon != 0.0:
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
        target_dims=2 if isinstance(preconditioner, Spectral) else target_dims,
        refresh_every=refresh_every,
        start=refresh_every if start == -1 else start,
        bias_correction=bool(arguments.get("use_bias_correction", True)),
        preconditioner=preconditioner,
        grafting=None if options.get("graft") is None else _preconditioner(options["graft"]),
        averaging=_averaging(options),
    )


# ---------------------------------------------------------------------------- printed values


class Call(NamedTuple):
    """A configuration object in print: `NAME(key=value, ...)`."""

    name: str
    options: dict[str, Any]


def parse_config(text: str) -> Any:
    """Reads the printed form of a configuration, without evaluating it.

    Args:
        text: Numbers, strings, tuples, dicts, `inf`, dtypes, and calls with keyword arguments;
            a function, which prints as `<function NAME at ADDRESS>`, is read as its name.

    Returns:
        The value; a call becomes a `Call`.

    Raises:
        Unsupported: The text holds anything else.
    """
    named = re.sub(r"<function ([\w.<>]+) at 0x[0-9a-f]+>", r"'\1'", text)
    try:
        return _value_of(ast.parse(named, mode="eval").body)
    except (SyntaxError, ValueError) as error:
        raise Unsupported(f"cannot read {text!r}") from error


def _value_of(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords):
            return Call(name, {str(word.arg): _value_of(word.value) for word in keywords})
        case ast.Name(id="inf") | ast.Attribute(value=ast.Name(id="math"), attr="inf"):
            return math.inf
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            return f"torch.{name}"
    return ast.literal_eval(node)


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
    number = float(str(value).removeprefix("math."))
    return number if math.isinf(number) else int(number)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise Unsupported(f"dtype {name}")
    dtype: torch.dtype = DTYPES[name]
    return dtype


def _config(given: str | Call, known: Mapping[str, Collection[str]]) -> Call:
    """Reads one configuration object whose class and options must be known."""
    config = parse_config(given) if isinstance(given, str) else given
    if not isinstance(config, Call) or config.name not in known:
        seen = getattr(config, "name", config)
        raise Unsupported(f"{seen} in place of {' or '.join(known)}")
    _only(config.options, known[config.name], f"option of {config.name}")
    return config


def _by_order(override: str | Options) -> dict[int, Any]:
    """Reads a table by order; JSON may have turned its keys, and those inside, to strings."""
    table = parse_config(override) if isinstance(override, str) else override
    return {
        int(order): {int(dim): float(e) for dim, e in entry.items()}
        if isinstance(entry, Mapping)
        else entry
        for order, entry in table.items()
    }


# ------------------------------------------------------------------------------- the sections


def _weight_decay_kind(name: str) -> DecayKind:
    # an enumeration prints as NAME, WeightDecayType.NAME or <WeightDecayType.NAME: 1>
    found = re.fullmatch(r"<?(?:WeightDecayType\.)?(\w+)(?:: \d+>)?", name)
    short = found[1].upper() if found else ""
    if short not in WEIGHT_DECAY_KINDS:
        raise Unsupported(f"unknown weight decay type: {name}")
    return WEIGHT_DECAY_KINDS[short]


def _target_dims(text: str | None) -> float:
    """To how many dimensions neighbouring ones are merged."""
    if text is None:
        return 1
    known = {"SingleDeviceDistributedConfig": {"target_parameter_dimensionality"}}
    options = _config(text, known).options
    return _number(options.get("target_parameter_dimensionality", 1))


def _averaging(options: Options) -> Momentum | PrimalAveraging | ScheduleFree | None:
    chosen = [name for name in ("mom", "gpa", "sf") if options.get(name) is not None]
    if len(chosen) > 1:
        raise Unsupported(f"the reference takes one of {' and '.join(chosen)}")
    if not chosen:
        return None
    (name,) = chosen
    own = options[name]
    ((printed_name, known),) = AVERAGING_CLASSES[name].items()
    if isinstance(own, str):
        own = _config(own, {printed_name: known}).options
    _only(own, known, f"option of {printed_name}")
    if name == "mom":
        return Momentum(
            momentum=float(own.get("momentum", 0.5)),
            dampening=float(own.get("dampening", 0.0)),
            nesterov=bool(own.get("use_nesterov", False)),
        )
    train = float(own.get("train_interp_coeff", 0.8))
    if name == "gpa":
        return PrimalAveraging(
            eval_interpolation=float(own.get("eval_interp_coeff", 0.9)), train_interpolation=train
        )
    power = float(own.get("eval_coeff_lr_power", 2))
    return ScheduleFree(train_interpolation=train, rate_power=power)


def _kind_and_options(section: Any) -> tuple[str, Options]:
    """Reads `[kind, options]`, a kind alone, or a configuration object in print."""
    if not isinstance(section, str):
        name, options = section
        return str(name), options
    printed = parse_config(section) if "(" in section else Call(section, {})
    if not isinstance(printed, Call):
        raise Unsupported(f"preconditioner: {section}")
    return printed.name, printed.options


def _preconditioner(section: Any) -> Preconditioner:
    name, options = _kind_and_options(section)
    plain = re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("preconditionerconfig")
    kind = KIND_OF.get(plain)
    match kind:
        case "root" | "klroot":
            _only(options, ROOT_OPTIONS, f"option of {kind}")
            return RootShampoo(
                solver=_root_solver(options.get("amortized_computation_config", "EigenConfig()")),
                statistics=_statistics(options, kullback_leibler=kind == "klroot"),
                exponents=_exponents(options),
                dtype=_dtype(options.get("inv_factor_matrix_dtype", "torch.float64")),
            )
        case "eigdec" | "kleigdec":
            _only(options, FACTOR_OPTIONS | BASIS_DTYPES, f"option of {kind}")
            return EigendecomposedShampoo(
                solver=_basis_solver(options, "EighEigendecompositionConfig()", BASIS_DTYPES),
                statistics=_statistics(options, kullback_leibler=kind == "kleigdec"),
                exponents=_exponents(options),
            )
        case "eigcorr" | "soap":
            return _eigenvalue_corrected(options, kind)
        case "spectral":
            _only(options, {"orthogonalization_config"}, "option of spectral")
            return Spectral(solver=_polar_solver(options.get("orthogonalization_config")))
        case "sign":
            _only(options, {"scale_fn"}, "option of sign")
            _only_default(options.get("scale_fn"), "_default_scale_fn")
            return Sign()
        case "sgd" | "adagrad" | "rmsprop" | "adam":
            return _moment(kind, options)
    raise Unsupported(f"preconditioner kind: {name}")


def _statistics(options: Options, *, kullback_leibler: bool) -> Statistics:
    scaled = options.get("use_trace_scaling", False)
    return Statistics(
        kullback_leibler=kullback_leibler,
        weighted=not options.get("drop_weighting_factor_on_gsquare", False),
        trace_exponent=float(options.get("trace_scaling_exponent", 0.5)) if scaled else None,
        dtype=_dtype(options.get("factor_matrix_dtype", "torch.float64")),
    )


def _exponents(options: Options) -> Exponents | None:
    """Reads `{order: e}` or `{order: {dim: e}}`."""
    table = _by_order(options.get("inverse_exponent_override") or {})
    exponents = {
        order: entry if isinstance(entry, dict) else float(entry) for order, entry in table.items()
    }
    return exponents or None


def _root_solver(text: str) -> RootSolver:
    known = {
        "EigenConfig": EIGEN_OPTIONS,
        "CoupledNewtonConfig": {"max_iterations", "tolerance"},
        "CoupledHigherOrderConfig": {
            "rel_epsilon",
            "abs_epsilon",
            "max_iterations",
            "tolerance",
            "order",
            "disable_tf32",
        },
    }
    name, options = _config(text, known)
    if name == "EigenConfig":
        if options.get("tolerance", 0.0) != 0.0:
            raise Unsupported(f"EigenConfig with tolerance {options['tolerance']}")
        return Eigen(stability=_stability(options))
    iterations = int(options.get("max_iterations", 100))
    if name == "CoupledNewtonConfig":
        tolerance = float(options.get("tolerance", 1e-6))
        return CoupledNewton(max_iterations=iterations, tolerance=tolerance)
    if not {"rel_epsilon", "abs_epsilon"} <= options.keys():
        raise Unsupported("CoupledHigherOrderConfig without rel_epsilon and abs_epsilon")
    return HigherOrder(
        relative_epsilon=float(options["rel_epsilon"]),
        absolute_epsilon=float(options["abs_epsilon"]),
        max_iterations=iterations,
        tolerance=float(options.get("tolerance", 1e-8)),
        order=int(options.get("order", 3)),
    )


def _basis_solver(options: Options, default: str, dtypes: Collection[str]) -> BasisSolver:
    if any(_dtype(options[name]) != torch.float64 for name in dtypes & options.keys()):
        raise Unsupported("a basis or its eigenvalues in another dtype than float64")
    known = {
        "EighEigendecompositionConfig": EIGEN_OPTIONS,
        "QREigendecompositionConfig": BASIS_OPTIONS | {"max_iterations"},
    }
    name, own = _config(options.get("amortized_computation_config", default), known)
    stability, tolerance = _stability(own), float(own.get("tolerance", 0.0))
    if name == "EighEigendecompositionConfig":
        return Eigh(stability=stability, tolerance=tolerance)
    iterations = int(own.get("max_iterations", 1))
    return QR(stability=stability, tolerance=tolerance, max_iterations=iterations)


def _stability(options: Options) -> Stability:
    known = {
        "PseudoInverseConfig": {"rank_atol", "rank_rtol"},
        "PerturbationConfig": {"perturb_before_computation"},
    }
    default = Call("PerturbationConfig", {})
    name, own = _config(options.get("rank_deficient_stability_config", default), known)
    if name == "PerturbationConfig":
        return Perturbation(before=bool(own.get("perturb_before_computation", True)))
    rtol = own.get("rank_rtol", 0.0)
    return PseudoInverse(
        atol=float(own.get("rank_atol", 0.0)), rtol=None if rtol is None else float(rtol)
    )


def _drops_eigenvalues(preconditioner: Preconditioner) -> bool:
    solver = getattr(preconditioner, "solver", None)
    return isinstance(getattr(solver, "stability", None), PseudoInverse)


def _eigenvalue_corrected(options: Options, kind: str) -> EigenvalueCorrected:
    _only(
        options, FACTOR_OPTIONS | CORRECTED_DTYPES | {"ignored_basis_change_dims"}, "option of SOAP"
    )
    default = {"eigcorr": "EighEigendecompositionConfig()", "soap": "QREigendecompositionConfig()"}
    ignored = _by_order(options.get("ignored_basis_change_dims") or {})
    exponents = _by_order(options.get("inverse_exponent_override") or {})
    solver = _basis_solver(options, default[kind], CORRECTED_DTYPES)
    if isinstance(solver.stability, PseudoInverse):
        raise Unsupported("the reference refuses a pseudo-inverse with corrected eigenvalues")
    return EigenvalueCorrected(
        solver=solver,
        statistics=_statistics(options, kullback_leibler=False),
        exponents={order: float(power) for order, power in exponents.items()} or None,
        ignored={order: tuple(dims) for order, dims in ignored.items()} or None,
    )


def _polar_solver(text: str | None) -> NewtonSchulz | SVD:
    known = {
        "NewtonSchulzOrthogonalizationConfig": {
            "num_iterations",
            "coefficients",
            "scale_by_dims_fn",
        },
        "SVDOrthogonalizationConfig": {"scale_by_nuclear_norm", "scale_by_dims_fn"},
    }
    name, options = _config(text or "NewtonSchulzOrthogonalizationConfig()", known)
    _only_default(options.get("scale_by_dims_fn"), "_default_scale_by_dims_fn")
    if name == "SVDOrthogonalizationConfig":
        return SVD(times_nuclear_norm=bool(options.get("scale_by_nuclear_norm", False)))
    a, b, c = options.get("coefficients", NewtonSchulz().coefficients)
    return NewtonSchulz(
        iterations=int(options.get("num_iterations", 5)),
        coefficients=(float(a), float(b), float(c)),
    )


def _only_default(function: str | None, default: str) -> None:
    """Refuses a function that is not the default: its printed name says nothing of its values."""
    if function is not None and default not in function:
        raise Unsupported(f"a function in a configuration: {function}")


def _moment(kind: Literal["sgd", "adagrad", "rmsprop", "adam"], options: Options) -> Moment:
    _only(options, MOMENT_OPTIONS[kind], f"option of {kind}")
    beta2 = float(options.get("beta2", MOMENT_BETA2[kind]))
    dropped = bool(options.get("drop_weighting_factor_on_gsquare", False))
    if kind in ("rmsprop", "adam") and beta2 == 1.0 and not dropped:
        raise Unsupported(f"{kind} with beta2=1, in which the reference takes in nothing")
    return Moment(
        kind=kind,
        beta2=beta2,
        epsilon=float(options.get("epsilon", 1e-10)),
        weighted=not dropped,
    )
