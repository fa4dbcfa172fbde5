"""First-order methods as sentences over the stages, with torch.optim's numbers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from shampoo_func.recipes.parts import unless_zero
from shampoo_func.transforms import (
    Chain,
    add_decayed_weights,
    chain,
    masked,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_rms,
    scale_by_rss,
    trace,
)
from shampoo_func.types import Scalar, Schedule, Transformation

__all__ = ["adagrad", "adamw", "rmsprop", "sgd"]


def adamw(
    learning_rate: Scalar | Schedule,
    *,
    beta1: Scalar = 0.9,
    beta2: Scalar = 0.999,
    epsilon: Scalar = 1e-8,
    weight_decay: Scalar = 1e-2,
    weight_decay_where: Callable[[str, Tensor], bool] | None = None,
) -> Chain:
    """AdamW: W <- W - learning_rate (M / (sqrt(V) + epsilon) + weight_decay W).

    M and V are the bias-corrected averages of the gradient and of its square.

    Args:
        learning_rate: A number, 0-d tensor, or schedule of the step.
        beta1: Decay of the mean, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        epsilon: Added to the root.
        weight_decay: Coefficient of the decoupled decay.
        weight_decay_where: Predicate on path and parameter: what is decayed; all if not given.

    Raises:
        HyperparameterError: If a number is out of range.

    Source: arXiv 1711.05101, algorithm 2.

    Example:
        >>> import torch
        >>> tx, params = adamw(0.1, weight_decay=0.0), torch.tensor([1.0])
        >>> tx.update(torch.tensor([3.0]), tx.init(params), params)[0]
        tensor([-0.1000])
    """
    decay: Transformation = add_decayed_weights(weight_decay)
    if weight_decay_where is not None:
        decay = masked(decay, where=weight_decay_where)
    return chain(
        scale_by_adam(beta1, beta2, epsilon),
        *unless_zero(weight_decay, decay),
        scale_by_learning_rate(learning_rate),
    )


def sgd(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.0,
    nesterov: bool = False,
    weight_decay: Scalar = 0.0,
) -> Chain:
    """Stochastic gradient descent with momentum and L2 regularisation.

    G <- G + weight_decay W; M <- momentum M + G; W <- W - learning_rate M, or with Nesterov
    W - learning_rate (G + momentum M).

    Args:
        learning_rate: A number, 0-d tensor, or schedule of the step.
        momentum: In [0, 1).
        nesterov: Whether the momentum looks ahead.
        weight_decay: Coefficient of the regularisation.

    Raises:
        HyperparameterError: If a number is out of range.

    Example:
        >>> import torch
        >>> tx, params = sgd(0.1), torch.tensor([1.0])
        >>> tx.update(torch.tensor([3.0]), tx.init(params), params)[0]
        tensor([-0.3000])
    """
    return chain(
        *unless_zero(weight_decay, add_decayed_weights(weight_decay)),
        *unless_zero(momentum, trace(momentum, nesterov=nesterov)),
        scale_by_learning_rate(learning_rate),
    )


def adagrad(
    learning_rate: Scalar | Schedule, *, epsilon: Scalar = 1e-10, weight_decay: Scalar = 0.0
) -> Chain:
    """AdaGrad: W <- W - learning_rate G / (sqrt(sum of G*G) + epsilon), with L2 in G.

    Args:
        learning_rate: A number, 0-d tensor, or schedule of the step.
        epsilon: Added to the root.
        weight_decay: Coefficient of the L2 regularisation.

    Raises:
        HyperparameterError: If a number is out of range.

    Source: JMLR 12 (2011) 2121.

    Example:
        >>> import torch
        >>> tx, params = adagrad(0.1), torch.tensor([1.0])
        >>> tx.update(torch.tensor([3.0]), tx.init(params), params)[0]
        tensor([-0.1000])
    """
    return chain(
        *unless_zero(weight_decay, add_decayed_weights(weight_decay)),
        scale_by_rss(epsilon),
        scale_by_learning_rate(learning_rate),
    )


def rmsprop(
    learning_rate: Scalar | Schedule,
    *,
    beta2: Scalar = 0.99,
    epsilon: Scalar = 1e-8,
    momentum: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
) -> Chain:
    """RMSprop: W <- W - learning_rate G / (sqrt(V) + epsilon), V the mean of G*G, L2 in G.

    Args:
        learning_rate: A number, 0-d tensor, or schedule of the step.
        beta2: Decay of the mean square (torch.optim's alpha), in [0, 1).
        epsilon: Added to the root.
        momentum: Decay of the momentum on the direction, in [0, 1).
        weight_decay: Coefficient of the L2 regularisation.

    Raises:
        HyperparameterError: If a number is out of range.

    Example:
        >>> import torch
        >>> tx, params = rmsprop(0.1, beta2=0.75, epsilon=0.0), torch.tensor([1.0])
        >>> tx.update(torch.tensor([3.0]), tx.init(params), params)[0]
        tensor([-0.2000])
    """
    return chain(
        *unless_zero(weight_decay, add_decayed_weights(weight_decay)),
        scale_by_rms(beta2, epsilon),
        *unless_zero(momentum, trace(momentum)),
        scale_by_learning_rate(learning_rate),
    )
