"""Bad input is refused before any work, by an error that names the parameter and the remedy."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import optree
import pytest
import torch
from catalogue import makes_a_stage
from torch import Tensor

import shampoo_func as sf
from shampoo_func import errors

Make = Callable[[], Any]

PATH = "layers.0.weight"
REMEDY = re.compile(
    r"\b(add|build|call|change|convert|escape|give|index|leave it out|must|name|needs?|pass|remove|"
    r"return|set|takes|the labels are|the parameters are|use|vmap|wrap|write)\b",
    re.IGNORECASE,
)


def tree_of(weight: Any) -> dict[str, Any]:
    """A nested tree with the given leaf at `PATH`."""
    return {
        "layers": [{"weight": weight, "bias": torch.ones(3)}, {"weight": torch.ones(3, 2)}],
        "scale": torch.ones(1),
    }


def params() -> dict[str, Any]:
    return tree_of(torch.arange(12.0).reshape(4, 3))


def copied(tree: Any) -> list[Tensor]:
    leaves = [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [leaf.to_dense() if leaf.is_sparse else leaf.clone() for leaf in leaves]


def refuse(
    kind: type[errors.ShampooFuncError], call: Make, *, names: str = "", keeps: Any = ()
) -> None:
    """Check that a call raises a typed error with a path and a remedy, and changes nothing."""
    before = copied(keeps)
    with pytest.raises(errors.ShampooFuncError) as caught:
        call()
    assert isinstance(caught.value, kind)
    assert isinstance(caught.value, ValueError | TypeError | RuntimeError)
    message = str(caught.value)
    assert names in message and REMEDY.search(message), message
    for old, now in zip(before, copied(keeps), strict=True):
        assert torch.equal(old, now)


class SpyState(NamedTuple):
    """A state that remembers nothing."""


@dataclass(frozen=True)
class Spy(sf.Transformation):
    """Passes updates on and writes down that it was called."""

    calls: list[str] = field(default_factory=list)

    def init(self, params: Any) -> SpyState:
        return SpyState()

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        self.calls.append("update")
        return updates, state


# Every public transformation ---------------------------------------------------------------------


def label(path: str, leaf: Tensor) -> str:
    return "matrix" if leaf.ndim == 2 else "rest"


def is_matrix(path: str, leaf: Tensor) -> bool:
    return leaf.ndim == 2


def half(step: Any) -> Any:
    return 0.5


def graft() -> sf.Preconditioner:
    return sf.graft(direction=sf.kronecker(), magnitude=sf.second_moment())


TRANSFORMATIONS: dict[str, Callable[[], sf.Transformation]] = {
    "accumulate": lambda: sf.accumulate(sf.trace(0.9), every=2),
    "adagrad": lambda: sf.adagrad(0.1),
    "adamw": lambda: sf.adamw(0.1),
    "add_decayed_weights": lambda: sf.add_decayed_weights(0.1),
    "add_decayed_weights of a schedule": lambda: sf.add_decayed_weights(half),
    "apply_if_finite": lambda: sf.apply_if_finite(sf.trace(0.9)),
    "blocked": lambda: sf.blocked(sf.precondition(graft()), block_size=2),
    "blocked trace": lambda: sf.blocked(sf.trace(0.9), block_size=2),
    "chain": lambda: sf.chain(sf.clip(1.0), sf.trace(0.9)),
    "clip": lambda: sf.clip(1.0),
    "clip_by_global_norm": lambda: sf.clip_by_global_norm(1.0),
    "ema": lambda: sf.ema(0.9),
    "identity": sf.identity,
    "masked": lambda: sf.masked(sf.trace(0.9), where=is_matrix),
    "masked by tree": lambda: sf.masked(
        sf.trace(0.9),
        mask={
            "layers": [{"weight": True, "bias": False}, {"weight": True}],
            "scale": False,
        },
    ),
    "kl_shampoo": lambda: sf.kl_shampoo(0.1, block_size=2),
    "kl_soap": lambda: sf.kl_soap(0.1, block_size=2),
    "muon": lambda: sf.muon(0.1),
    "partition": lambda: sf.partition({"matrix": sf.trace(0.9), "rest": sf.identity()}, label),
    "partition by regex": lambda: sf.partition(
        {"weights": sf.trace(0.9), "rest": sf.identity()}, [("weight$", "weights"), (".", "rest")]
    ),
    "precondition graft": lambda: sf.precondition(graft()),
    "precondition identity": lambda: sf.precondition(sf.identity_preconditioner()),
    "precondition kronecker": lambda: sf.precondition(sf.kronecker()),
    "precondition scalar second moment": lambda: sf.precondition(sf.scalar_second_moment()),
    "precondition second moment": lambda: sf.precondition(sf.second_moment()),
    "primal_averaging": lambda: sf.primal_averaging(half, weight_decay=half),
    "rmsprop": lambda: sf.rmsprop(0.1),
    "scale": lambda: sf.scale(2.0),
    "scale_by_adam": sf.scale_by_adam,
    "scale_by_learning_rate": lambda: sf.scale_by_learning_rate(0.1),
    "scale_by_learning_rate of a schedule": lambda: sf.scale_by_learning_rate(half),
    "scale_by_rms": sf.scale_by_rms,
    "scale_by_rss": sf.scale_by_rss,
    "scale_by_schedule": lambda: sf.scale_by_schedule(half),
    "scale_by_shampoo": lambda: sf.scale_by_shampoo(block_size=2, refresh_every=1),
    "schedule_free": lambda: sf.schedule_free(0.1, weight_decay=0.1),
    "sgd": lambda: sf.sgd(0.1, momentum=0.9),
    "sharded": lambda: sf.sharded(sf.shampoo(0.1, block_size=2), None),
    "soap": lambda: sf.soap(0.1, block_size=2),
    "shampoo": lambda: sf.shampoo(0.1, weight_decay=0.1, momentum=0.9, block_size=2),
    "shampoo plain": lambda: sf.shampoo(
        0.1, beta1=0.0, grafting=None, refresh_every=1, merge_dims=False
    ),
    "sign_sgd": lambda: sf.sign_sgd(0.1, momentum=0.9, scale="mean_abs"),
    "spectral_descent": lambda: sf.spectral_descent(0.1, block_size=2),
    "sweep": lambda: sf.sweep(sf.trace, decay=torch.tensor([0.5, 0.9])),
    "trace": lambda: sf.trace(0.9),
    "weight_ema": lambda: sf.weight_ema(0.9),
    "weight_lawa": lambda: sf.weight_lawa(2),
    "with_hyperparams": lambda: sf.with_hyperparams(sf.trace, decay=0.9),
}
every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


def start(name: str) -> tuple[sf.Transformation, dict[str, Any], Any]:
    """A transformation, parameters for it, and the state after one update."""
    tx, tree = TRANSFORMATIONS[name](), params()
    if name == "sweep":
        tree = sf.stack_copies(tree, 2)
    _, state = tx.update(tree, tx.init(tree), tree)
    return tx, tree, state


def with_leaf(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same tree with the leaf at `PATH` changed, the others shared."""
    first, *others = tree["layers"]
    return {**tree, "layers": [{**first, "weight": change(first["weight"])}, *others]}


UNUSABLE_LEAVES: dict[str, Callable[[Tensor], Any]] = {
    "complex": lambda leaf: leaf.to(torch.complex64),
    "sparse": lambda leaf: leaf.to_sparse(),
    "integer": lambda leaf: leaf.to(torch.int64),
    "bool": lambda leaf: leaf > 0,
    "a number": lambda leaf: 1.0,
    "a string": lambda leaf: "weight",
}
every_unusable_leaf = pytest.mark.parametrize("leaf", UNUSABLE_LEAVES)


def test_table_names_every_public_transformation() -> None:
    """The table above forgets none: every public constructor of a transformation is in it."""
    made = {word for name in TRANSFORMATIONS for word in name.split()}
    constructors = {name for name in sf.__all__ if makes_a_stage(getattr(sf, name))}
    constructors -= {"precondition"}
    assert constructors <= made


@every_transformation
@every_unusable_leaf
def test_init_refuses_a_parameter(name: str, leaf: str) -> None:
    """Complex, sparse, integer, bool parameters, and what is no tensor, are refused by `init`."""
    tx, tree, _ = start(name)
    bad = with_leaf(tree, UNUSABLE_LEAVES[leaf])
    refuse(errors.ParameterError, lambda: tx.init(bad), names=PATH, keeps=bad)


@every_transformation
def test_init_refuses_none_for_a_parameter(name: str) -> None:
    """None stands for a missing gradient, never for a parameter."""
    tx, tree, _ = start(name)
    bad = with_leaf(tree, lambda leaf: None)
    refuse(errors.ParameterError, lambda: tx.init(bad), names=PATH, keeps=bad)


@every_transformation
@every_unusable_leaf
def test_update_refuses_a_gradient(name: str, leaf: str) -> None:
    """Complex, sparse, integer, bool gradients, and what is no tensor, are refused by `update`."""
    tx, tree, state = start(name)
    bad = with_leaf(tree, UNUSABLE_LEAVES[leaf])
    call = functools.partial(tx.update, bad, state, tree)
    refuse(errors.GradientError, call, names=PATH, keeps=(tree, state))


WRONG_TREES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a leaf is missing": (
        lambda tree: {**tree, "layers": [{"bias": tree["layers"][0]["bias"]}, tree["layers"][1]]},
        PATH,
    ),
    "a leaf too many": (lambda tree: {**tree, "extra": torch.ones(2)}, "extra"),
    "a layer is missing": (lambda tree: {**tree, "layers": tree["layers"][:1]}, "layers.1.weight"),
    "a tensor for a layer": (lambda tree: {**tree, "layers": torch.ones(2)}, "layers"),
    "None for a layer": (lambda tree: {**tree, "layers": None}, "layers"),
    "a layer for a tensor": (lambda tree: with_leaf(tree, lambda leaf: {"a": leaf}), f"{PATH}.a"),
    "a tuple for a list": (lambda tree: {**tree, "layers": tuple(tree["layers"])}, ""),
    "only a tensor": (lambda tree: torch.ones(4, 3), ""),
    "transposed": (lambda tree: with_leaf(tree, lambda leaf: leaf.mT), PATH),
    "flat": (lambda tree: with_leaf(tree, lambda leaf: leaf.reshape(-1)), PATH),
    "one for all": (lambda tree: with_leaf(tree, lambda leaf: leaf[..., :1, :1]), PATH),
}


@every_transformation
@pytest.mark.parametrize("wrong", WRONG_TREES)
def test_update_refuses_a_tree_of_another_kind(name: str, wrong: str) -> None:
    """Gradients must have the structure and shapes of the parameters."""
    tx, tree, state = start(name)
    change, path = WRONG_TREES[wrong]
    call = functools.partial(tx.update, change(tree), state, tree)
    refuse(errors.TreeMismatchError, call, names=path, keeps=(tree, state))


STATEFUL = (
    "accumulate",
    "apply_if_finite",
    "blocked",
    "blocked trace",
    "chain",
    "ema",
    "masked",
    "masked by tree",
    "partition",
    "partition by regex",
    "precondition graft",
    "precondition kronecker",
    "precondition second moment",
    "scale_by_adam",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_shampoo",
    "shampoo plain",
    "sweep",
    "trace",
    "with_hyperparams",
)


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("wrong", ["a leaf is missing", "transposed", "flat", "one for all"])
def test_update_refuses_gradients_that_the_state_is_not_for(name: str, wrong: str) -> None:
    """Without parameters, a stage with a state per parameter goes by the state it has."""
    tx, tree, state = start(name)
    change, _ = WRONG_TREES[wrong]
    call = functools.partial(tx.update, change(tree), state)
    refuse(errors.TreeMismatchError, call, keeps=(tree, state))


@every_transformation
def test_update_refuses_an_unknown_argument(name: str) -> None:
    """A misspelt extra argument is no silent default."""
    tx, tree, state = start(name)
    call = functools.partial(tx.update, tree, state, tree, refesh=True)
    refuse(errors.UnknownArgumentError, call, names="refesh", keeps=(tree, state))


NEED_PARAMS: dict[str, Callable[[], sf.Transformation]] = {
    "add_decayed_weights": lambda: sf.add_decayed_weights(0.1),
    "of a schedule": lambda: sf.add_decayed_weights(half),
    "adamw": lambda: sf.adamw(0.1),
    "sgd": lambda: sf.sgd(0.1, weight_decay=0.1),
    "adagrad": lambda: sf.adagrad(0.1, weight_decay=0.1),
    "rmsprop": lambda: sf.rmsprop(0.1, weight_decay=0.1),
    "soap": lambda: sf.soap(0.1, block_size=2),
    "shampoo": lambda: sf.shampoo(0.1, weight_decay=0.1),
    "shampoo l2": lambda: sf.shampoo(0.1, weight_decay=0.1, weight_decay_kind="l2"),
}
WRAPPERS: dict[str, Callable[[sf.Transformation], sf.Transformation]] = {
    "bare": lambda tx: tx,
    "accumulate": lambda tx: sf.accumulate(tx, every=2),
    "apply_if_finite": sf.apply_if_finite,
    "chain": lambda tx: sf.chain(sf.clip(1.0), ("needs", tx)),
    "masked": lambda tx: sf.masked(tx, where=is_matrix),
    "partition": lambda tx: sf.partition({"rest": sf.clip(1.0), "matrix": tx}, label),
}


@pytest.mark.parametrize("name", NEED_PARAMS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_update_asks_for_missing_parameters(name: str, wrapper: str) -> None:
    """Decay without parameters is refused at the first update, however deep it stands."""
    tx, tree = WRAPPERS[wrapper](NEED_PARAMS[name]()), params()
    state = tx.init(tree)
    call = functools.partial(tx.update, tree, state)
    refuse(errors.MissingParamsError, call, names="params", keeps=(tree, state))


@pytest.mark.parametrize("wrapper", ["chain", "partition"])
@pytest.mark.parametrize("problem", ["missing parameters", "gradient", "shape", "argument"])
def test_nothing_is_computed_before_the_refusal(wrapper: str, problem: str) -> None:
    """The check comes before the first stage runs, not when the failing stage's turn comes."""
    spy, decay = Spy(), sf.add_decayed_weights(0.1)
    tx: sf.Transformation = (
        sf.chain(("spy", spy), decay)
        if wrapper == "chain"
        else sf.partition({"rest": spy, "matrix": decay}, label)
    )
    tree = params()
    state = tx.init(tree)
    changes: dict[str, Any] = {
        "gradient": with_leaf(tree, UNUSABLE_LEAVES["complex"]),
        "shape": with_leaf(tree, lambda leaf: leaf.reshape(-1)),
    }
    extra = {"refesh": True} if problem == "argument" else {}
    given = None if problem == "missing parameters" else tree
    call = functools.partial(tx.update, changes.get(problem, tree), state, given, **extra)
    refuse(errors.ShampooFuncError, call, keeps=(tree, state))
    assert spy.calls == []


# Missing gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["blocked", "blocked trace", "scale_by_shampoo", "shampoo plain", "partition"]
)
def test_missing_gradient_needs_its_parameter(name: str) -> None:
    """Without a gradient and without parameters nobody knows the shape."""
    tx, tree, state = start(name)
    gradients = with_leaf(tree, lambda leaf: None)
    call = functools.partial(tx.update, gradients, state)
    refuse(errors.MissingParamsError, call, names=PATH, keeps=(tree, state))


@every_transformation
def test_missing_gradient_is_welcome_with_its_parameter(name: str) -> None:
    """None is no bad input."""
    tx, tree, state = start(name)
    updates, _ = tx.update(with_leaf(tree, lambda leaf: None), state, tree)
    assert updates["layers"][0]["weight"] is None
    assert isinstance(updates["layers"][0]["bias"], Tensor)


# Hyper-parameters --------------------------------------------------------------------------------

NO_NUMBERS = (math.nan, "0.1", None, True, 1j, [0.1], torch.ones(2), torch.tensor(1j))
NO_COUNTS = (0, -1, 2.0, math.nan, "2", True)


def numbers(
    make: Callable[..., Any],
    argument: str,
    *bad: Any,
    like: tuple[Any, ...] = NO_NUMBERS,
    **rest: Any,
) -> list[Any]:
    """One test case for each value that an argument must not have."""
    name = getattr(make, "__name__", str(make))
    return [
        pytest.param(
            functools.partial(make, **{argument: value}, **rest), id=f"{name}-{argument}-{value}"
        )
        for value in (*bad, *like)
    ]


def counts(make: Callable[..., Any], argument: str, **rest: Any) -> list[Any]:
    return numbers(make, argument, like=NO_COUNTS, **rest)


NAN_OR_LESS = (-1e-3, -math.inf, math.nan)
# where None, True, a schedule or a 1-d tensor has a meaning
ONLY_NAN_AND_TEXT = (math.nan, "0.1")
HYPERPARAMETERS = [
    *counts(sf.accumulate, "every", inner=sf.identity()),
    *numbers(sf.adagrad, "learning_rate", -0.1),
    *numbers(sf.adagrad, "epsilon", -1e-8, learning_rate=0.1),
    *numbers(sf.adagrad, "weight_decay", -0.1, learning_rate=0.1),
    *numbers(sf.adamw, "learning_rate", -0.1),
    *numbers(sf.adamw, "beta1", -0.1, 1.0, 1.5, learning_rate=0.1),
    *numbers(sf.adamw, "beta2", -0.1, 1.0, 1.5, learning_rate=0.1),
    *numbers(sf.adamw, "epsilon", -1e-8, learning_rate=0.1),
    *numbers(sf.adamw, "weight_decay", -0.1, learning_rate=0.1),
    *numbers(sf.add_decayed_weights, "weight_decay", -0.1),
    *counts(sf.blocked, "block_size", inner=sf.identity()),
    *numbers(sf.clip, "max_value", -1.0, 0.0),
    *numbers(sf.clip_by_global_norm, "max_norm", -1.0, 0.0),
    *[
        row
        for make in (
            sf.auto_root,
            sf.cholesky_root,
            sf.higher_order_newton_root,
            sf.newton_db_root,
            sf.newton_root,
            sf.newton_schulz_root,
        )
        for row in (
            *numbers(make, "epsilon", -1e-8),
            *numbers(make, "relative_epsilon", -1e-8, like=ONLY_NAN_AND_TEXT),
        )
    ],
    *[
        row
        for make in (sf.higher_order_newton_root, sf.newton_db_root, sf.newton_root)
        for row in (
            *counts(make, "iterations"),
            *counts(make, "max_iterations"),
            *numbers(make, "tolerance", -1e-8, torch.tensor(1e-6), like=ONLY_NAN_AND_TEXT),
        )
    ],
    *counts(sf.auto_root, "min_size"),
    *counts(sf.auto_root, "iterations"),
    *numbers(sf.chebyshev_root, "epsilon", -1e-8),
    *numbers(sf.chebyshev_root, "offset", 0.0, -1.0, math.inf, torch.tensor(0.1), like=()),
    *counts(sf.chebyshev_root, "degree"),
    *counts(sf.higher_order_newton_root, "order"),
    *numbers(sf.newton_schulz_root, "coefficients", "muon", (), ((1.0, 2.0),), 3, like=()),
    *numbers(sf.eigh_root, "retry_double", 1.5, "yes", like=()),
    *numbers(sf.eigh_root, "epsilon", -1e-8),
    *numbers(sf.eigh_root, "relative_epsilon", -1e-8),
    *numbers(sf.eigh_root, "perturb", "between", like=()),
    *numbers(sf.eigh_root, "compute_dtype", torch.int32, torch.complex64, "float64", like=()),
    *numbers(sf.eigh_root, "pseudo_inverse", sf.PseudoInverse(), like=()),
    *numbers(sf.ema, "decay", -0.1, 1.0, 1.5),
    *numbers(sf.ema, "lookahead", -0.1, 1.0, 1.5, decay=0.9, like=ONLY_NAN_AND_TEXT),
    *numbers(sf.kronecker, "beta2", -0.1, 1.5),
    *counts(sf.kronecker, "max_dim"),
    *numbers(sf.kronecker, "sides", "both", like=()),
    *numbers(sf.kronecker, "trace_scaling", -0.5, 0.0, 1.5, like=ONLY_NAN_AND_TEXT),
    *numbers(sf.kronecker, "factor_dtype", torch.int32, torch.complex64, like=()),
    *numbers(sf.kronecker, "apply_dtype", torch.int32, torch.complex64, like=()),
    *numbers(sf.kronecker, "root_dtype", torch.int32, torch.complex64, like=()),
    *numbers(sf.kronecker, "root", 0.5, "best", like=()),
    *numbers(
        sf.kronecker,
        "exponents",
        {2: -0.5},
        {2: math.nan},
        {2: {0: -0.5}},
        {2: {2: 0.5}},
        {2: {-1: 0.5}},
        {0: 0.5},
        {2: "0.5"},
        0.5,
        like=(),
    ),
    *numbers(sf.PseudoInverse, "absolute_tolerance", -1e-8, like=ONLY_NAN_AND_TEXT),
    *numbers(sf.PseudoInverse, "relative_tolerance", -1e-8, like=ONLY_NAN_AND_TEXT),
    *counts(sf.precondition, "refresh_every", preconditioner=sf.kronecker()),
    *numbers(sf.precondition, "start", like=NO_COUNTS, preconditioner=sf.kronecker()),
    *numbers(sf.precondition, "start", 4, like=(), preconditioner=sf.kronecker(), refresh_every=5),
    *numbers(sf.precondition, "policy", 10, like=(), preconditioner=sf.eigendecomposed()),
    *numbers(sf.precondition, "statistics", "never", like=(), preconditioner=sf.kronecker()),
    *numbers(sf.every, "period", like=NO_COUNTS, start=1),
    *numbers(sf.every, "start", like=NO_COUNTS, period=1),
    *numbers(sf.adaptive, "tolerance", -0.1, 1.5, like=ONLY_NAN_AND_TEXT),
    *counts(sf.adaptive, "period", tolerance=0.1),
    *numbers(sf.probabilistic, "probability", -0.1, 1.5),
    *numbers(sf.probabilistic, "seed", -1, 0.5, probability=0.1, like=()),
    *counts(sf.staggered, "period"),
    *numbers(sf.staggered, "start", like=NO_COUNTS, period=2),
    *numbers(sf.eigh_basis, "tolerance", -0.1, 1.5, like=ONLY_NAN_AND_TEXT),
    *numbers(sf.eigh_basis, "damping", 0.1, like=()),
    *counts(sf.qr_basis, "iterations"),
    *numbers(sf.qr_basis, "sort", "sometimes", like=()),
    *numbers(sf.guarded, "max_residual", -0.1, solver=sf.eigh_root(), like=ONLY_NAN_AND_TEXT),
    *numbers(sf.guarded, "solver", 0.5, sf.eigh_basis(), like=()),
    *numbers(sf.eigendecomposed, "beta2", -0.1, 1.5),
    *numbers(sf.eigendecomposed, "basis", 0.5, sf.eigh_root(), like=()),
    *numbers(sf.eigendecomposed, "eigenvalues", "always", like=()),
    *numbers(sf.eigendecomposed, "beta2", 1.0, eigenvalues="ema", like=()),
    *numbers(sf.eigendecomposed, "product_dtype", torch.bfloat16, torch.int32, like=()),
    *counts(sf.eight_bit, "block"),
    *numbers(sf.eight_bit, "block", 63, 2049, like=()),
    *numbers(sf.eight_bit, "form", "even", 8, like=()),
    *numbers(sf.four_bit_cholesky, "beta_error", -0.1, 1.0),
    *numbers(sf.four_bit_cholesky, "epsilon", -1e-8, 0.0),
    *numbers(sf.four_bit_eigen, "iterations", -1, 0.5, "two", like=()),
    *numbers(sf.four_bit_eigen, "basis", "svd", like=()),
    *numbers(sf.symmetric_packing, "dtype", torch.int32, torch.complex64, "float32", like=()),
    *numbers(sf.trace, "dtype", torch.int32, torch.complex64, decay=0.9, like=()),
    *numbers(sf.ema, "dtype", torch.int32, torch.complex64, decay=0.9, like=()),
    *numbers(
        sf.quantized,
        "codec",
        0.5,
        None,
        {"factor": 8},
        {"factors": sf.eight_bit()},
        {"eigenvalues": sf.eight_bit()},
        {"second_moment": sf.symmetric_packing()},
        inner=sf.kronecker(),
        like=(),
    ),
    *numbers(sf.quantized, "inner", 0.5, sf.trace(0.9), codec=sf.eight_bit(), like=()),
    *numbers(sf.shampoo, "storage", 8, "8bit", like=(), learning_rate=0.1),
    *numbers(sf.in_eigenbasis, "inner", 0.5, sf.eigh_basis(), like=()),
    *numbers(
        sf.in_eigenbasis, "momentum", -0.1, 1.0, inner=sf.second_moment(), like=ONLY_NAN_AND_TEXT
    ),
    *numbers(sf.in_eigenbasis, "carry", "drop", inner=sf.second_moment(), like=()),
    *numbers(sf.in_eigenbasis, "ignore", {0: [0]}, {2: [2]}, inner=sf.second_moment(), like=()),
    *numbers(sf.kl_shampoo, "beta2", -0.1, 1.0),
    *numbers(sf.kl_soap, "form", "both", like=()),
    *numbers(sf.soap, "beta1", -0.1, 1.0),
    *numbers(sf.soap, "basis", "svd", like=()),
    *numbers(sf.soap, "momentum", "nowhere", like=()),
    *numbers(sf.rmsprop, "learning_rate", -0.1),
    *numbers(sf.rmsprop, "beta2", -0.1, 1.0, 1.5, learning_rate=0.1),
    *numbers(sf.rmsprop, "epsilon", -1e-8, learning_rate=0.1),
    *numbers(sf.rmsprop, "momentum", -0.1, 1.0, learning_rate=0.1),
    *numbers(sf.rmsprop, "weight_decay", -0.1, learning_rate=0.1),
    *numbers(sf.scale, "factor"),
    *numbers(sf.scale_by_adam, "beta1", -0.1, 1.0),
    *numbers(sf.scale_by_adam, "beta2", -0.1, 1.0),
    *numbers(sf.scale_by_adam, "epsilon", -1e-8),
    *numbers(sf.scale_by_learning_rate, "learning_rate", -0.1),
    *numbers(sf.scale_by_rms, "beta2", -0.1, 1.0),
    *numbers(sf.scale_by_rms, "epsilon", -1e-8),
    *numbers(sf.scale_by_rss, "epsilon", -1e-8),
    *numbers(sf.scale_by_schedule, "schedule", 0.1, like=()),
    *numbers(sf.scale_by_shampoo, "beta1", -0.1, 1.0),
    *numbers(sf.scale_by_shampoo, "beta2", -0.1, 1.5),
    *counts(sf.scale_by_shampoo, "refresh_every"),
    *counts(sf.scale_by_shampoo, "block_size"),
    *numbers(sf.second_moment, "beta2", -0.1, 1.5),
    *numbers(sf.second_moment, "epsilon", -1e-8),
    *numbers(sf.sgd, "learning_rate", -0.1),
    *numbers(sf.sgd, "momentum", -0.1, 1.0, learning_rate=0.1),
    *numbers(sf.sgd, "weight_decay", -0.1, learning_rate=0.1),
    *numbers(sf.shampoo, "learning_rate", -0.1),
    *numbers(sf.shampoo, "beta1", -0.1, 1.0, learning_rate=0.1),
    *numbers(sf.shampoo, "beta2", -0.1, 1.5, learning_rate=0.1),
    *numbers(sf.shampoo, "beta3", -0.1, 1.0, learning_rate=0.1, like=ONLY_NAN_AND_TEXT),
    *numbers(sf.shampoo, "epsilon", -1e-8, learning_rate=0.1),
    *numbers(sf.shampoo, "weight_decay", -0.1, learning_rate=0.1),
    *numbers(sf.shampoo, "weight_decay_kind", "L2", like=(), learning_rate=0.1),
    *numbers(sf.shampoo, "peak_learning_rate", *NAN_OR_LESS, like=(), learning_rate=0.1),
    *numbers(sf.shampoo, "momentum", -0.1, 1.0, learning_rate=0.1),
    *numbers(sf.shampoo, "dampening", -0.1, 1.0, learning_rate=0.1, momentum=0.9),
    *counts(sf.shampoo, "block_size", learning_rate=0.1),
    *counts(sf.shampoo, "refresh_every", learning_rate=0.1),
    *numbers(sf.shampoo, "start", like=NO_COUNTS, learning_rate=0.1),
    *numbers(sf.shampoo, "grafting", "Adam", 0.5, sf.trace(0.9), like=(), learning_rate=0.1),
    *numbers(sf.shampoo, "grafting_epsilon", -1e-8, math.nan, like=(), learning_rate=0.1),
    *numbers(sf.shampoo, "exponents", {2: -0.5}, like=(), learning_rate=0.1),
    *counts(sf.shampoo, "max_dim", learning_rate=0.1),
    *numbers(sf.shampoo, "trace_scaling", -0.5, 0.0, 1.5, like=(), learning_rate=0.1),
    *numbers(sf.shampoo, "root", sf.eigh_root(), like=(), learning_rate=0.1, epsilon=1e-3),
    *numbers(
        sf.shampoo, "learning_rate", half, like=(), weight_decay=0.1, weight_decay_kind="corrected"
    ),
    *numbers(sf.trace, "decay", -0.1, 1.0, 1.5),
    *numbers(sf.trace, "dampening", -0.1, 1.0, 1.5, decay=0.9),
    *numbers(functools.partial(sf.with_hyperparams, sf.ema), "decay", -0.1, 1.0, math.nan, like=()),
    *counts(sf.donate, "donated", step=lambda params: (params,)),
    *counts(sf.stack_copies, "runs", params={"w": torch.ones(2)}),
    *counts(sf.refresh_due, "step", tx=sf.identity()),
]


@pytest.mark.parametrize("make", HYPERPARAMETERS)
def test_constructor_refuses_a_hyperparameter(make: Make) -> None:
    """Negative, NaN and out-of-range numbers, and what is no number, are refused at once."""
    with pytest.raises(errors.HyperparameterError) as caught:
        make()
    assert isinstance(caught.value, ValueError)
    assert REMEDY.search(str(caught.value)), caught.value


def test_error_says_argument_range_and_value() -> None:
    """A message about a number has all that is needed to mend it."""
    with pytest.raises(
        errors.HyperparameterError, match=r"beta2 must lie in \[0\.0, 1\.0\].*-0\.5"
    ):
        sf.kronecker(-0.5)


WRONG_PARTS: dict[str, tuple[type[errors.ShampooFuncError], Make]] = {
    "accumulate": (errors.HyperparameterError, lambda: sf.accumulate(0.1, every=2)),  # type: ignore[arg-type]
    "apply_if_finite": (errors.HyperparameterError, lambda: sf.apply_if_finite(0.1)),  # type: ignore[arg-type]
    "blocked preconditioner": (errors.HyperparameterError, lambda: sf.blocked(sf.kronecker())),  # type: ignore[arg-type]
    "chain preconditioner": (errors.ChainError, lambda: sf.chain(sf.kronecker())),  # type: ignore[arg-type]
    "chain number": (errors.ChainError, lambda: sf.chain(("a", 0.1))),  # type: ignore[arg-type]
    "chain number name": (errors.ChainError, lambda: sf.chain((1, sf.identity()))),  # type: ignore[arg-type]
    "chain triple": (errors.ChainError, lambda: sf.chain(("a", sf.identity(), 1))),  # type: ignore[arg-type]
    "chain named": (errors.ChainError, lambda: sf.chain(a=0.1)),  # type: ignore[arg-type]
    "graft direction": (
        errors.HyperparameterError,
        lambda: sf.graft(direction=sf.trace(0.9), magnitude=sf.second_moment()),  # type: ignore[arg-type]
    ),
    "graft magnitude": (
        errors.HyperparameterError,
        lambda: sf.graft(direction=sf.kronecker(), magnitude="adam"),  # type: ignore[arg-type]
    ),
    "masked without": (errors.PartitionError, lambda: sf.masked(sf.identity())),
    "masked with both": (
        errors.PartitionError,
        lambda: sf.masked(sf.identity(), where=is_matrix, mask={"w": True}),
    ),
    "masked where": (
        errors.PartitionError,
        lambda: sf.masked(sf.identity(), where={"w": True}),  # type: ignore[arg-type]
    ),
    "masked number": (errors.PartitionError, lambda: sf.masked(0.1, where=is_matrix)),  # type: ignore[arg-type]
    "partition number": (errors.PartitionError, lambda: sf.partition({"a": 0.1}, label)),  # type: ignore[dict-item]
    "partition unknown label": (
        errors.PartitionError,
        lambda: sf.partition({"a": sf.identity()}, [(".", "b")]),
    ),
    "partition regex": (
        errors.PartitionError,
        lambda: sf.partition({"a": sf.identity()}, [("(", "a")]),
    ),
    "precondition transformation": (
        errors.HyperparameterError,
        lambda: sf.precondition(sf.trace(0.9)),  # type: ignore[arg-type]
    ),
    "precondition filter": (
        errors.HyperparameterError,
        lambda: sf.precondition(sf.kronecker(), filter=0.9),  # type: ignore[arg-type]
    ),
    "sweep nothing": (errors.HyperparameterError, lambda: sf.sweep(sf.sgd)),
    "sweep number": (errors.HyperparameterError, lambda: sf.sweep(sf.sgd, learning_rate=0.1)),  # type: ignore[arg-type]
    "sweep 0-d": (
        errors.HyperparameterError,
        lambda: sf.sweep(sf.sgd, learning_rate=torch.tensor(0.1)),
    ),
    "sweep 2-d": (
        errors.HyperparameterError,
        lambda: sf.sweep(sf.sgd, learning_rate=torch.ones(2, 2)),
    ),
    "sweep lengths": (
        errors.HyperparameterError,
        lambda: sf.sweep(sf.sgd, learning_rate=torch.ones(2), momentum=torch.zeros(3)),
    ),
    "with_hyperparams no factory": (
        errors.HyperparameterError,
        lambda: sf.with_hyperparams(sf.sgd(0.1), learning_rate=0.1),  # type: ignore[arg-type]
    ),
    "with_hyperparams no float": (
        errors.HyperparameterError,
        lambda: sf.with_hyperparams(sf.sgd, learning_rate=1),
    ),
}


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_constructor_refuses_a_part_of_the_wrong_kind(name: str) -> None:
    """Stages, preconditioners, labels and masks are told apart when they are put together."""
    kind, make = WRONG_PARTS[name]
    refuse(kind, make)


# Names, labels and clocks ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: sf.chain(sf.trace(0.9), sf.trace(0.5)),
        lambda: sf.chain(("a", sf.identity()), ("a", sf.clip(1.0))),
        lambda: sf.chain(("a", sf.identity()), a=sf.clip(1.0)),
        lambda: sf.chain(sf.trace(0.9), trace=sf.clip(1.0)),
        lambda: sf.chain(sf.trace(0.9), sf.masked(sf.trace(0.5), where=is_matrix)),
    ],
)
def test_chain_refuses_a_name_given_twice(make: Make) -> None:
    """State is addressed by name, so that names are unique; the message says how to give one."""
    refuse(errors.ChainError, make, names="twice")


def test_chain_refuses_the_state_of_another_chain() -> None:
    """A state belongs to the stages it was made for."""
    tree = params()
    state = sf.chain(sf.trace(0.9)).init(tree)
    call = functools.partial(sf.chain(sf.ema(0.9)).update, tree, state)
    refuse(errors.ChainError, call, names="trace", keeps=(tree, state))


@pytest.mark.parametrize(
    "labels",
    [
        lambda path, leaf: "unknown" if leaf.ndim == 2 else "known",
        lambda path, leaf: None if leaf.ndim == 2 else "known",
        [("bias", "known")],
    ],
)
def test_partition_refuses_a_parameter_without_label(labels: Any) -> None:
    """A parameter that no row matches, or whose label has no transformation, is named."""
    tx, tree = sf.partition({"known": sf.identity()}, labels), params()
    matched = {"layers": [{"bias": torch.ones(3)}]}
    refuse(errors.PartitionError, lambda: tx.init(tree), names=PATH, keeps=tree)
    call = functools.partial(tx.update, tree, tx.init(matched), tree)
    refuse(errors.PartitionError, call, names=PATH, keeps=tree)


def test_mask_of_another_structure_is_refused() -> None:
    """A mask must have a flag where there is a parameter."""
    tx, tree = sf.masked(sf.trace(0.9), mask={"layers": True}), params()
    refuse(errors.TreeMismatchError, lambda: tx.init(tree), names=PATH, keeps=tree)


def test_refresh_due_needs_one_schedule() -> None:
    """One answer cannot serve two clocks."""
    tx = sf.partition(
        {"matrix": sf.shampoo(0.1, refresh_every=2), "rest": sf.shampoo(0.1, refresh_every=3)},
        label,
    )
    refuse(errors.RefreshError, lambda: sf.refresh_due(tx, 6), names="refresh=None")


@pytest.mark.parametrize("refresh", ["yes", 2, 0.5, torch.tensor(True)])
def test_refresh_is_none_or_a_python_bool(refresh: Any) -> None:
    """The refresh argument is static: two graphs when compiled, and no synchronisation."""
    tx, tree, state = start("scale_by_shampoo")
    call = functools.partial(tx.update, tree, state, refresh=refresh)
    refuse(errors.HyperparameterError, call, names="refresh", keeps=(tree, state))


# Around the optimizer ----------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", WRONG_TREES)
def test_apply_updates_refuses_a_tree_of_another_kind(wrong: str) -> None:
    """Updates must have the structure and shapes of the parameters."""
    tree = params()
    change, path = WRONG_TREES[wrong]
    call = functools.partial(sf.apply_updates, tree, change(tree))
    refuse(errors.TreeMismatchError, call, names=path, keeps=tree)


@every_unusable_leaf
def test_apply_updates_refuses_unusable_leaves(leaf: str) -> None:
    """Neither a parameter nor an update may be complex, sparse or an integer."""
    tree, bad = params(), with_leaf(params(), UNUSABLE_LEAVES[leaf])
    refuse(errors.ParameterError, lambda: sf.apply_updates(bad, tree), names=PATH, keeps=tree)
    refuse(errors.GradientError, lambda: sf.apply_updates(tree, bad), names=PATH, keeps=tree)


@every_unusable_leaf
def test_global_norm_refuses_unusable_leaves(leaf: str) -> None:
    """The norm is one of real tensors."""
    bad = with_leaf(params(), UNUSABLE_LEAVES[leaf])
    refuse(errors.GradientError, lambda: sf.global_norm(bad), names=PATH)


@every_unusable_leaf
def test_stack_copies_refuses_unusable_leaves(leaf: str) -> None:
    """Only parameters are copied."""
    bad = with_leaf(params(), UNUSABLE_LEAVES[leaf])
    refuse(errors.ParameterError, lambda: sf.stack_copies(bad, 2), names=PATH)


@pytest.mark.parametrize(
    "change", [lambda leaf: leaf.new_ones(3, 4, 3), lambda leaf: leaf.new_ones(())]
)
def test_sweep_refuses_parameters_that_are_not_stacked(change: Callable[[Tensor], Tensor]) -> None:
    """Every leaf has the runs first."""
    tx, tree, state = start("sweep")
    bad = with_leaf(tree, change)
    refuse(errors.ShampooFuncError, lambda: tx.init(bad), names=PATH, keeps=bad)
    call = functools.partial(tx.update, bad, state)
    refuse(errors.ShampooFuncError, call, names=PATH, keeps=(bad, state))


def test_hyperparams_cannot_be_renamed() -> None:
    """The state's hyper-parameters may change their values, not their names."""
    tx, tree, state = start("with_hyperparams")
    other = state._replace(hyperparams={"beta": torch.tensor(0.5)})
    call = functools.partial(tx.update, tree, other, tree)
    refuse(errors.HyperparameterError, call, names="beta", keeps=(tree, other))


def test_parameter_state_names_the_parameters_there_are() -> None:
    """A path that leads nowhere is answered by those that do."""
    tx, tree, state = start("shampoo")
    call = functools.partial(sf.parameter_state, tx, state, tree, "layers.0.wieght")
    refuse(errors.TreeMismatchError, call, names=PATH)


# Donation ----------------------------------------------------------------------------------------

DONATIONS: dict[str, Callable[[Any], Any]] = {
    "another shape": lambda tree: (with_leaf(tree, lambda leaf: leaf[:2]),),
    "another shape that broadcasts": lambda tree: (with_leaf(tree, lambda leaf: leaf[:1]),),
    "another dtype": lambda tree: (with_leaf(tree, lambda leaf: leaf.double()),),
    "no tensor": lambda tree: (with_leaf(tree, lambda leaf: 1.0),),
    "None": lambda tree: (with_leaf(tree, lambda leaf: None),),
    "a leaf's memory": lambda tree: (
        with_leaf(tree, lambda leaf: leaf + 1) | {"scale": tree["layers"][0]["weight"][0, :1]},
    ),
}


@pytest.mark.parametrize("name", DONATIONS)
def test_donation_refuses_results_that_do_not_fit(name: str) -> None:
    """Nothing is overwritten unless every result has its input's shape, dtype and own memory."""
    tree = params()
    step = sf.donate(DONATIONS[name], donated=1)
    names = "scale" if name == "a leaf's memory" else PATH
    refuse(errors.DonationError, lambda: step(tree), names=names, keeps=tree)


def test_donation_refuses_a_leaf_that_moves_inside_its_own_memory() -> None:
    """A result that is a view of its own input at other places would be read while written."""
    memory = torch.arange(6.0)
    tree = {"a": torch.zeros(2), "w": memory[2:]}
    step = sf.donate(lambda tree: ({"a": tree["a"] + 1, "w": memory[:4]},), donated=1)
    refuse(errors.DonationError, lambda: step(tree), names="w", keeps=(tree, memory))


@pytest.mark.parametrize(
    "results", [lambda tree: {"w": tree["w"]}, lambda tree: (), lambda tree: ({"v": tree["w"]},)]
)
def test_donation_refuses_results_of_another_structure(results: Any) -> None:
    """A step returns a tuple that begins with the new values of its donated arguments."""
    tree = {"w": torch.ones(2)}
    step = sf.donate(results, donated=1)
    refuse(errors.DonationError, lambda: step(tree), keeps=tree)


def test_donation_needs_its_arguments_by_position() -> None:
    """An argument given by name cannot be matched with a result."""
    tree = {"w": torch.ones(2)}
    step = sf.donate(lambda tree: (tree,), donated=1)
    refuse(errors.DonationError, lambda: step(tree=tree), keeps=tree)


def test_donation_refuses_two_arguments_that_share_memory() -> None:
    """Writing one would spoil the other."""
    leaf = torch.ones(2)
    step = sf.donate(lambda tree: ({name: value + 1 for name, value in tree.items()},), donated=1)
    call = functools.partial(step, {"a": leaf, "b": leaf.view(1, 2)})
    refuse(errors.DonationError, call, names=".b'", keeps=leaf)
    memory = torch.ones(4)
    call = functools.partial(step, {"a": memory[:3], "b": memory[1:]})
    refuse(errors.DonationError, call, names=".b'", keeps=memory)


@pytest.mark.parametrize(
    "leaf", [torch.ones(1).expand(3), torch.ones(5).as_strided((3, 2), (1, 1))]
)
def test_donation_refuses_arguments_that_overlap_themselves(leaf: Tensor) -> None:
    """Elements that are one place in memory cannot be written one by one."""
    tree = {"a": torch.zeros(2), "w": leaf}
    step = sf.donate(lambda tree: ({name: leaf + 1 for name, leaf in tree.items()},), donated=1)
    refuse(errors.DonationError, lambda: step(tree), names="w", keeps=tree)


def test_donation_refuses_what_is_no_tensor() -> None:
    """A Python number cannot be overwritten."""
    step = sf.donate(lambda tree: ({"w": tree["w"] + 1},), donated=1)
    refuse(errors.DonationError, lambda: step({"w": 1.0}), names="w")


def test_donation_allows_what_is_safe() -> None:
    """Results that are the arguments themselves, and empty leaves, need no copies."""
    empty = torch.ones(0)
    tree = {"a": torch.ones(2), "b": empty, "c": empty}
    (result,) = sf.donate(lambda tree: (dict(tree),), donated=1)(tree)
    assert result["a"] is tree["a"]
