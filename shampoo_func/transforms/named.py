"""Preconditioners as stages with the names that optax users look for."""

from __future__ import annotations

from typing import Any

from shampoo_func.errors import check_number
from shampoo_func.preconditioners import kronecker, second_moment
from shampoo_func.transforms.blocked import Blocked, blocked
from shampoo_func.transforms.momentum import ema
from shampoo_func.transforms.precondition import Precondition, precondition
from shampoo_func.types import Scalar

__all__ = ["scale_by_adam", "scale_by_rms", "scale_by_rss", "scale_by_shampoo"]


def scale_by_adam(
    beta1: Scalar = 0.9, beta2: Scalar = 0.999, epsilon: Scalar = 1e-8
) -> Precondition:
    """Adam's direction: the corrected mean over the root of the corrected second moment.

    Args:
        beta1: Decay of the mean, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        epsilon: Added to the root.

    Raises:
        HyperparameterError: If a number is out of range.

    Source: arXiv 1412.6980, algorithm 1.

    Example:
        >>> import torch
        >>> tx = scale_by_adam()
        >>> tx.update(torch.tensor([3.0, -4.0]), tx.init(torch.zeros(2)))[0]
        tensor([ 1., -1.])
    """
    check_number("beta2", beta2, high=1.0, high_open=True)
    return precondition(second_moment(beta2, epsilon=epsilon), filter=ema(beta1))


def scale_by_rms(
    beta2: Scalar = 0.9, epsilon: Scalar = 1e-8, *, bias_correction: bool = False
) -> Precondition:
    """RMSprop's direction: the gradient over the root of its mean square.

    Args:
        beta2: Decay of the mean square, in [0, 1).
        epsilon: Added to the root.
        bias_correction: Whether to divide the mean square by 1 - beta2^t.

    Example:
        >>> import torch
        >>> tx = scale_by_rms(0.75, 0.0)
        >>> tx.update(torch.tensor([3.0, -4.0]), tx.init(torch.zeros(2)))[0]
        tensor([ 2., -2.])
    """
    check_number("beta2", beta2, high=1.0, high_open=True)
    return precondition(second_moment(beta2, epsilon=epsilon, bias_correction=bias_correction))


def scale_by_rss(epsilon: Scalar = 1e-10) -> Precondition:
    """AdaGrad's direction: the gradient over the root of its sum of squares.

    Args:
        epsilon: Added to the root.

    Example:
        >>> import torch
        >>> tx = scale_by_rss()
        >>> tx.update(torch.tensor([3.0, -4.0]), tx.init(torch.zeros(2)))[0]
        tensor([ 1., -1.])
    """
    return precondition(second_moment(1.0, epsilon=epsilon))


def scale_by_shampoo(
    beta1: Scalar = 0.9,
    beta2: Scalar = 0.999,
    *,
    refresh_every: int = 10,
    start: float | None = None,
    block_size: int | None = 1024,
    merge_dims: bool = True,
    **options: Any,
) -> Blocked:
    """Shampoo's direction, without grafting: blocks, factors, periodic inverse roots.

    Args:
        beta1: Decay of the gradient filter, in [0, 1).
        beta2: Decay of the factors, in [0, 1]; the number 1 means AdaGrad's sum.
        refresh_every: Updates between two refreshes.
        start: The first update that refreshes; `refresh_every` if not given.
        block_size: See `blocked`.
        merge_dims: See `blocked`.
        **options: Passed to `kronecker`.

    Source: arXiv 1802.09568; arXiv 2309.06497.

    Example:
        >>> import torch
        >>> tx = scale_by_shampoo(refresh_every=1)
        >>> params = {"w": torch.zeros(8, 4)}
        >>> tx.update({"w": torch.ones(8, 4)}, tx.init(params))[0]["w"].shape
        torch.Size([8, 4])
    """
    return blocked(
        precondition(
            kronecker(beta2, **options),
            filter=ema(beta1),
            refresh_every=refresh_every,
            start=start,
        ),
        block_size=block_size,
        merge_dims=merge_dims,
    )
