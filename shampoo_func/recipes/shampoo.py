"""Distributed Shampoo as one sentence over the stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.codecs import Codec
from shampoo_func.errors import HyperparameterError, check_choice, check_number
from shampoo_func.preconditioners import (
    graft,
    identity_preconditioner,
    kronecker,
    quantized,
    second_moment,
)
from shampoo_func.recipes.parts import is_zero, unless_zero
from shampoo_func.transforms import (
    Chain,
    Policy,
    add_decayed_weights,
    blocked,
    chain,
    ema,
    identity,
    precondition,
    scale_by_learning_rate,
    trace,
)
from shampoo_func.types import Preconditioner, Scalar, Schedule, Transformation

__all__ = ["DecayKind", "Grafting", "shampoo"]

DecayKind = Literal["decoupled", "l2", "corrected", "independent"]
Grafting = Literal["adam", "rmsprop", "adagrad", "sgd"]


def shampoo(
    learning_rate: Scalar | Schedule,
    *,
    beta1: Scalar = 0.9,
    beta2: Scalar = 0.999,
    beta3: Scalar | None = None,
    epsilon: Scalar = 1e-12,
    weight_decay: Scalar = 0.0,
    weight_decay_kind: DecayKind = "decoupled",
    peak_learning_rate: Scalar | None = None,
    momentum: Scalar = 0.0,
    nesterov: bool = False,
    dampening: Scalar = 0.0,
    block_size: int | None = 1024,
    merge_dims: bool = True,
    refresh_every: int = 10,
    start: float | None = None,
    grafting: Grafting | Preconditioner | None = "adam",
    grafting_epsilon: Scalar | None = None,
    bias_correction: bool = True,
    exponents: Mapping[int, float | Mapping[int, float]] | None = None,
    max_dim: int | None = None,
    trace_scaling: float | None = None,
    root: linalg.RootSolver | linalg.Guarded | None = None,
    kl: bool = False,
    policy: Policy | None = None,
    factor_dtype: torch.dtype | None = None,
    root_dtype: torch.dtype | None = None,
    storage: Codec | Mapping[str, Codec] | None = None,
) -> Chain:
    """Shampoo with blocks, grafting, momentum and decay, as in Distributed Shampoo.

    For a matrix block G with filtered gradient M (beta1, beta3):

        L <- beta2 L + (1 - beta2) G G^T,   R <- beta2 R + (1 - beta2) G^T G
        U = L^(-1/4) M R^(-1/4),   scaled to the norm of the grafted method's update
        U <- U + weight_decay W,   then momentum,   then W <- W - learning_rate U

    with the roots recomputed every `refresh_every` updates from `start` on; before, the update
    is the grafted method's.

    Args:
        learning_rate: A number, 0-d tensor, or schedule of the step.
        beta1: Decay of the gradient filter, in [0, 1); the number 0 for none, whatever beta3.
        beta2: Decay of the factors, in [0, 1]; the number 1 means AdaGrad's sum. Adam and
            RMSprop grafting use the same decay.
        beta3: Coefficient of the filter for the current direction only; `beta1` if not given.
        epsilon: Damping of the factors, in the units of the squared gradient.
        weight_decay: Coefficient of the decay.
        weight_decay_kind: "l2" adds it to the gradient, "decoupled" to the direction,
            "corrected" to the direction times learning_rate / peak, "independent" to the
            direction divided by the peak, so that it does not scale with the peak.
        peak_learning_rate: The peak, for the last two; the learning rate itself if that is
            a number.
        momentum: Decay of the momentum on the direction, in [0, 1); 0 for none.
        nesterov: Whether the momentum looks ahead.
        dampening: Dampening of the momentum, in [0, 1).
        block_size: Largest size of a block's dimension, and the limit for merging.
        merge_dims: Whether small dimensions are merged.
        refresh_every: Updates between two refreshes of the roots.
        start: First refresh; `refresh_every` if not given, `math.inf` for never.
        grafting: Whose magnitude is used, per block; None for Shampoo's own.
        grafting_epsilon: The grafted method's epsilon; 1e-8, or 1e-10 for AdaGrad.
        bias_correction: Whether filter and factors are corrected (Adam grafting always is).
        exponents: Inverse exponents by order and dimension, see `kronecker`.
        max_dim: Dimensions of blocks larger than this are left alone.
        trace_scaling: See `kronecker`.
        root: Inverse root solver; `eigh_root(epsilon)` if not given. Excludes `epsilon`.
        kl: Whether the factors are those of KL-Shampoo, as Distributed Shampoo takes them, see
            `kronecker`; for the paper's form see `kl_shampoo`.
        policy: Another refresh policy, `staggered(10)` for instance, in the place of
            `refresh_every` and `start`.
        factor_dtype: dtype of the factors.
        root_dtype: dtype of the roots.
        storage: A codec, or codecs by role, for what is kept of factors, roots and grafting
            moments between steps, see `quantized`.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Source: arXiv 2309.06497, algorithm 2 and section 3.

    Example:
        >>> tx = shampoo(1e-2, beta2=0.99, weight_decay=0.1, block_size=256)
        >>> params = {"w": torch.ones(8, 4), "b": torch.zeros(4)}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> list(state)
        ['precondition', 'add_decayed_weights', 'scale_by_learning_rate']
    """
    check_choice(
        "weight_decay_kind", weight_decay_kind, ("decoupled", "l2", "corrected", "independent")
    )
    if root is not None and (isinstance(epsilon, Tensor) or epsilon != 1e-12):
        raise HyperparameterError(
            f"epsilon={epsilon!r} and root={root!r} are both given; set epsilon in the root."
        )
    direction: Preconditioner = kronecker(
        beta2,
        root=linalg.eigh_root(epsilon) if root is None else root,
        kl=kl,
        bias_correction=bias_correction,
        exponents=exponents,
        max_dim=max_dim,
        trace_scaling=trace_scaling,
        factor_dtype=factor_dtype,
        root_dtype=root_dtype,
    )
    magnitude = _grafted_method(grafting, beta2, grafting_epsilon)
    averaged = ema(beta1, bias_correction=bias_correction, lookahead=beta3)
    preconditioner = (
        direction if magnitude is None else graft(direction=direction, magnitude=magnitude)
    )
    shampoo_direction = blocked(
        precondition(
            preconditioner if storage is None else quantized(preconditioner, storage),
            filter=identity() if is_zero(beta1) else averaged,
            refresh_every=refresh_every if policy is None else 1,
            start=start,
            policy=policy,
        ),
        block_size=block_size,
        merge_dims=merge_dims,
    )
    decay = unless_zero(
        weight_decay, _decay(weight_decay, weight_decay_kind, learning_rate, peak_learning_rate)
    )
    before, after = (decay, []) if weight_decay_kind == "l2" else ([], decay)
    return chain(
        *before,
        shampoo_direction,
        *after,
        *unless_zero(momentum, trace(momentum, nesterov=nesterov, dampening=dampening)),
        scale_by_learning_rate(learning_rate),
    )


def _grafted_method(
    grafting: Grafting | Preconditioner | None, beta2: Scalar, epsilon: Scalar | None
) -> Preconditioner | None:
    """Return the preconditioner whose magnitude is used."""
    if grafting is None or isinstance(grafting, Preconditioner):
        return grafting
    check_choice("grafting", grafting, ("adam", "rmsprop", "adagrad", "sgd", None))
    if grafting == "sgd":
        return identity_preconditioner()
    if grafting == "adagrad":
        return second_moment(1.0, epsilon=1e-10 if epsilon is None else epsilon)
    return second_moment(
        beta2,
        epsilon=1e-8 if epsilon is None else epsilon,
        bias_correction=grafting == "adam",
    )


@dataclass(frozen=True, slots=True)
class _CorrectedDecay:
    """weight_decay * learning_rate(step) / peak, as a schedule."""

    weight_decay: Scalar
    learning_rate: Schedule
    peak: Scalar

    def __call__(self, step: Any) -> Any:
        return self.weight_decay * self.learning_rate(step) / self.peak


def _decay(
    weight_decay: Scalar,
    kind: DecayKind,
    learning_rate: Scalar | Schedule,
    peak: Scalar | None,
) -> Transformation:
    """Return the decay stage of the given kind."""
    check_number("weight_decay", weight_decay)
    if peak is not None:
        check_number("peak_learning_rate", peak, low_open=True, high_open=True)
    if is_zero(weight_decay) or kind in ("l2", "decoupled"):
        return add_decayed_weights(weight_decay)
    if peak is None:
        if callable(learning_rate) or isinstance(learning_rate, Tensor):
            raise HyperparameterError(
                f"weight_decay_kind={kind!r} with a schedule or tensor as learning_rate needs "
                "peak_learning_rate: the rate that weight_decay is meant for."
            )
        peak = learning_rate
    check_number("learning_rate", peak, low_open=True)
    if kind == "independent":
        return add_decayed_weights(weight_decay / peak)
    if callable(learning_rate) and not isinstance(learning_rate, Tensor):
        return add_decayed_weights(_CorrectedDecay(weight_decay, learning_rate, peak))
    return add_decayed_weights(weight_decay * learning_rate / peak)
