"""Distributed Shampoo as one sentence over the stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.codecs import Codec
from shampoo_func.errors import HyperparameterError, check_choice, check_count
from shampoo_func.preconditioners import (
    graft,
    identity_preconditioner,
    kronecker,
    quantized,
    second_moment,
    subsampled,
)
from shampoo_func.recipes.decay import DecayKind, decay_of
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
    primal_averaging,
    scale_by_learning_rate,
    schedule_free,
    trace,
)
from shampoo_func.types import Preconditioner, Scalar, Schedule, Transformation

__all__ = ["Grafting", "IterateAveraging", "shampoo"]

Grafting = Literal["adam", "rmsprop", "adagrad", "sgd"]
IterateAveraging = Literal["primal_averaging", "schedule_free"]


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
    root: linalg.RootSolver | linalg.Guarded | Literal["auto"] | None = None,
    kl: bool = False,
    policy: Policy | None = None,
    factor_dtype: torch.dtype | None = None,
    root_dtype: torch.dtype | None = None,
    apply_dtype: torch.dtype | None = None,
    statistics_every: int = 1,
    storage: Codec | Mapping[str, Codec] | None = None,
    averaging: IterateAveraging | None = None,
    eval_interpolation: Scalar = 0.9,
    train_interpolation: Scalar = 0.8,
    rate_power: Scalar = 2.0,
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
        root: Inverse root solver, in the place of `epsilon`; `eigh_root(epsilon)` if not given.
            "auto" is `auto_root(epsilon)`, which chooses by device and size.
        kl: Whether the factors are those of KL-Shampoo, as Distributed Shampoo takes them, see
            `kronecker`; for the paper's form see `kl_shampoo`.
        policy: Another refresh policy, `staggered(10)` for instance, in the place of
            `refresh_every` and `start`.
        factor_dtype: dtype of the factors.
        root_dtype: dtype of the roots.
        apply_dtype: dtype of the products with the roots, e.g. bfloat16, see `kronecker`.
        statistics_every: Take only every k-th gradient into the factors, see `subsampled`.
        storage: A codec, or codecs by role, for what is kept of factors, roots and grafting
            moments between steps, see `quantized`.
        averaging: Iterate averaging in the place of momentum: "primal_averaging" (GPA) or
            "schedule_free"; evaluate at `eval_params`. Decay then shrinks the iterates z.
        eval_interpolation: For "primal_averaging": how much of the average stays at a step.
        train_interpolation: Where gradients are taken, between the iterates (0) and their
            average (1).
        rate_power: For "schedule_free": iterates are weighted by this power of their rate.

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
    decay = decay_of(weight_decay, weight_decay_kind, learning_rate, peak_learning_rate)
    if root == "auto":
        root = linalg.auto_root(epsilon)
    elif root is not None and (isinstance(epsilon, Tensor) or epsilon != 1e-12):
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
        apply_dtype=apply_dtype,
    )
    check_count("statistics_every", statistics_every)
    if statistics_every > 1:
        direction = subsampled(direction, every=statistics_every)
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
    l2 = weight_decay_kind == "l2"
    if averaging is None:
        last: list[Transformation] = [
            *unless_zero(0.0 if l2 else decay, add_decayed_weights(decay)),
            *unless_zero(momentum, trace(momentum, nesterov=nesterov, dampening=dampening)),
            scale_by_learning_rate(learning_rate),
        ]
    else:
        if not is_zero(momentum):
            raise HyperparameterError(
                f"momentum={momentum!r} and averaging={averaging!r} are both given; remove one: "
                "averaging has a momentum of its own (train_interpolation)."
            )
        last = [
            _averaging_stage(
                averaging,
                learning_rate,
                0.0 if l2 else decay,
                eval_interpolation,
                train_interpolation,
                rate_power,
            )
        ]
    return chain(
        *unless_zero(decay if l2 else 0.0, add_decayed_weights(decay)), shampoo_direction, *last
    )


def _averaging_stage(
    averaging: IterateAveraging,
    learning_rate: Scalar | Schedule,
    decay: Scalar | Schedule,
    eval_interpolation: Scalar,
    train_interpolation: Scalar,
    rate_power: Scalar,
) -> Transformation:
    """Return the stage that moves and averages the parameters."""
    check_choice("averaging", averaging, ("primal_averaging", "schedule_free", None))
    if averaging == "schedule_free":
        return schedule_free(learning_rate, train_interpolation, rate_power, decay)
    return primal_averaging(learning_rate, eval_interpolation, train_interpolation, decay)


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
