"""Every public transformation and recipe, one line each: what the contract suite runs through."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import shampoo_func as sf

Tensor = torch.Tensor


def is_matrix(path: str, leaf: Tensor) -> bool:
    """Choose matrices (a module-level function, so that stages that hold it pickle)."""
    return leaf.ndim >= 2


def matrix_or_rest(path: str, leaf: Tensor) -> str:
    """Label matrices and the rest."""
    return "matrix" if is_matrix(path, leaf) else "rest"


def small_shampoo(**options: object) -> sf.Transformation:
    """Shampoo with settings at which float64 runs agree to many digits."""
    settings: dict[str, object] = {
        "beta2": 0.9,
        "epsilon": 1e-3,
        "block_size": 3,
        "refresh_every": 2,
        **options,
    }
    return sf.shampoo(0.1, **settings)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    """A transformation under test, and which constructor it stands for.

    counts_calls: whether it counts calls for all parameters together.
    """

    name: str
    covers: str
    make: Callable[[], sf.Transformation]
    counts_calls: bool = False

    def __str__(self) -> str:
        return self.name


def makes_a_stage(value: Any) -> bool:
    """Whether a function is annotated to return a transformation."""
    if not inspect.isfunction(value):
        return False
    returned = typing.get_type_hints(value)["return"]
    return isinstance(returned, type) and issubclass(returned, sf.Transformation)


def schedule() -> object:
    """Return a schedule that changes at every step."""
    return sf.linear_schedule(0.5, 0.1, 10)


def kronecker_stage() -> sf.Transformation:
    """Return a bare Kronecker stage: no blocks, no grafting."""
    return sf.precondition(
        sf.kronecker(0.9, root=sf.eigh_root(1e-3)), filter=sf.ema(0.5), refresh_every=2
    )


CASES = [
    Case("identity", "identity", sf.identity),
    Case("scale", "scale", lambda: sf.scale(-0.5)),
    Case("learning_rate", "scale_by_learning_rate", lambda: sf.scale_by_learning_rate(0.1)),
    Case(
        "learning_rate_schedule",
        "scale_by_learning_rate",
        lambda: sf.scale_by_learning_rate(schedule()),  # type: ignore[arg-type]
        counts_calls=True,
    ),
    Case(
        "schedule",
        "scale_by_schedule",
        lambda: sf.scale_by_schedule(schedule()),  # type: ignore[arg-type]
        counts_calls=True,
    ),
    Case("decay", "add_decayed_weights", lambda: sf.add_decayed_weights(0.1)),
    Case("trace", "trace", lambda: sf.trace(0.9, dampening=0.1)),
    Case("nesterov", "trace", lambda: sf.trace(0.9, nesterov=True)),
    Case("ema", "ema", lambda: sf.ema(0.9)),
    Case("ema_lookahead", "ema", lambda: sf.ema(0.9, lookahead=0.8)),
    Case("clip", "clip", lambda: sf.clip(0.3)),
    Case("global_norm", "clip_by_global_norm", lambda: sf.clip_by_global_norm(0.5)),
    Case("adam", "scale_by_adam", sf.scale_by_adam),
    Case("rms", "scale_by_rms", sf.scale_by_rms),
    Case("rss", "scale_by_rss", sf.scale_by_rss),
    Case("precondition", "precondition", kronecker_stage),
    Case(
        "blocked",
        "blocked",
        lambda: sf.blocked(
            sf.chain(sf.precondition(sf.second_moment(0.9)), sf.add_decayed_weights(0.1)),
            block_size=3,
            merge_dims=False,
        ),
    ),
    Case(
        "scale_by_shampoo",
        "scale_by_shampoo",
        lambda: sf.scale_by_shampoo(
            0.5, 0.9, refresh_every=2, block_size=4, root=sf.eigh_root(1e-3)
        ),
    ),
    Case(
        "chain",
        "chain",
        lambda: sf.chain(sf.clip_by_global_norm(1.0), sf.trace(0.9), last=sf.scale(0.5)),
    ),
    Case(
        "partition",
        "partition",
        lambda: sf.partition(
            {"matrix": kronecker_stage(), "rest": sf.scale_by_adam()}, matrix_or_rest
        ),
    ),
    Case(
        "partition_table",
        "partition",
        lambda: sf.partition(
            {"w": sf.trace(0.9), "rest": sf.scale(2.0)}, [("w", "w"), (".*", "rest")]
        ),
    ),
    Case("masked", "masked", lambda: sf.masked(sf.add_decayed_weights(0.1), where=is_matrix)),
    Case(
        "accumulate", "accumulate", lambda: sf.accumulate(sf.adamw(0.1), every=2), counts_calls=True
    ),
    Case(
        "apply_if_finite",
        "apply_if_finite",
        lambda: sf.apply_if_finite(kronecker_stage()),
        counts_calls=True,
    ),
    Case(
        "with_hyperparams",
        "with_hyperparams",
        lambda: sf.with_hyperparams(sf.adamw, learning_rate=0.1, beta2=0.9),
        counts_calls=True,
    ),
    Case(
        "primal_averaging",
        "primal_averaging",
        lambda: sf.primal_averaging(schedule(), weight_decay=0.1),  # type: ignore[arg-type]
        counts_calls=True,
    ),
    Case(
        "schedule_free",
        "schedule_free",
        lambda: sf.schedule_free(0.1, weight_decay=0.1, weight_power=0.5, use_max_rate=True),
        counts_calls=True,
    ),
    Case("weight_ema", "weight_ema", lambda: sf.weight_ema(0.9, every=2)),
    Case("weight_lawa", "weight_lawa", lambda: sf.weight_lawa(2, every=2)),
    Case("adamw", "adamw", lambda: sf.adamw(0.1, weight_decay_where=is_matrix)),
    Case("sgd", "sgd", lambda: sf.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
    Case("adagrad", "adagrad", lambda: sf.adagrad(0.1)),
    Case("rmsprop", "rmsprop", lambda: sf.rmsprop(0.1, momentum=0.5)),
    Case(
        "muon",
        "muon",
        lambda: sf.muon(0.1, method=sf.polar_express(3), scale="match_rms_adamw"),
    ),
    Case(
        "spectral_descent",
        "spectral_descent",
        lambda: sf.spectral_descent(0.1, scale="nuclear", weight_decay=0.1, block_size=4),
    ),
    Case(
        "sign_sgd",
        "sign_sgd",
        lambda: sf.sign_sgd(0.1, momentum=0.9, nesterov=True, scale="mean_abs"),
    ),
    Case("shampoo", "shampoo", lambda: small_shampoo(weight_decay=0.1, momentum=0.5)),
    Case(
        "shampoo_options",
        "shampoo",
        lambda: small_shampoo(
            beta3=0.8,
            grafting="sgd",
            weight_decay=0.1,
            weight_decay_kind="l2",
            exponents={2: 0.5, 3: {0: 0.0}},
            trace_scaling=0.5,
            start=3,
        ),
    ),
    Case("shampoo_packed", "shampoo", lambda: small_shampoo(storage=sf.symmetric_packing())),
    Case(
        "staggered",
        "precondition",
        lambda: sf.blocked(
            sf.precondition(
                sf.graft(
                    direction=sf.kronecker(0.9, root=sf.eigh_root(1e-3), kl=True),
                    magnitude=sf.second_moment(0.9),
                ),
                policy=sf.staggered(2),
            ),
            block_size=3,
        ),
    ),
    Case(
        "adaptive",
        "precondition",
        lambda: sf.precondition(
            sf.eigendecomposed(0.9, basis=sf.eigh_basis(1e-3), eigenvalues="every_step"),
            filter=sf.ema(0.5),
            policy=sf.adaptive(0.1, period=2),
        ),
    ),
    Case(
        "sharded",
        "sharded",
        lambda: sf.sharded(sf.blocked(sf.trace(0.9), block_size=3), None),
    ),
    Case("soap", "soap", lambda: sf.soap(0.1, beta2=0.9, block_size=3, refresh_every=2)),
    Case(
        "kl_soap",
        "kl_soap",
        lambda: sf.kl_soap(
            0.1,
            basis="eigh",
            momentum="original",
            statistics="before",
            before_start="identity",
            block_size=3,
            policy=sf.probabilistic(0.5, start=3),
        ),
    ),
    Case(
        "kl_shampoo",
        "kl_shampoo",
        lambda: sf.kl_shampoo(0.1, epsilon=1e-3, block_size=3, refresh_every=2),
    ),
    Case(
        "subsampled",
        "precondition",
        lambda: sf.blocked(
            sf.precondition(
                sf.graft(
                    direction=sf.subsampled(
                        sf.kronecker(0.9, root=sf.eigh_root(1e-3), kl=True), every=2
                    ),
                    magnitude=sf.second_moment(0.9),
                ),
                refresh_every=3,
            ),
            block_size=3,
        ),
    ),
]
