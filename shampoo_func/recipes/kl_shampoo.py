"""KL-Shampoo as a sentence over the stages, in its paper's form."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import check_number
from shampoo_func.preconditioners import eigendecomposed
from shampoo_func.recipes.parts import is_matrix, unless_zero
from shampoo_func.transforms import (
    Chain,
    Policy,
    add_decayed_weights,
    blocked,
    chain,
    ema,
    every,
    partition,
    precondition,
    scale_by_adam,
    scale_by_learning_rate,
)
from shampoo_func.types import Scalar, Schedule

__all__ = ["kl_shampoo"]


def kl_shampoo(
    learning_rate: Scalar | Schedule = 1e-4,
    *,
    beta1: Scalar = 0.9,
    beta2: Scalar = 0.98,
    epsilon: Scalar = 1e-8,
    relative_epsilon: Scalar = 1e-6,
    weight_decay: Scalar = 1e-2,
    refresh_every: int = 10,
    start: float = 1,
    policy: Policy | None = None,
    statistics: Literal["before", "after"] = "before",
    block_size: int | None = 1024,
    merge_dims: bool = False,
    factor_dtype: torch.dtype | None = None,
) -> Chain:
    """KL-Shampoo: factors that minimise the KL divergence to the gradients' covariance.

    For a matrix block G of size d_1 x d_2 with filtered gradient M:

        L <- beta2 L + (1 - beta2) / d_2 G R^(-1) G^T
        R <- beta2 R + (1 - beta2) / d_1 G^T L^(-1) G     (both with the old partner)
        W <- W - learning_rate (L^(-1/2) M R^(-1/2) + weight_decay W)

    No grafting is needed, since the product of the two has the scale of the covariance. The
    eigenbases are improved by one QR step every `refresh_every` updates, and the eigenvalues
    re-estimated at every step, as moving averages in the basis. Parameters of less than two
    dimensions get Adam. For Distributed Shampoo's variant use `shampoo(..., kl=True)`.

    Args:
        learning_rate: A number, 0-d tensor, or schedule of the step.
        beta1: Decay of the gradient filter, in [0, 1).
        beta2: Decay of the factors and eigenvalues, in [0, 1).
        epsilon: Damping of the factors, and Adam's epsilon.
        relative_epsilon: Damping relative to the largest eigenvalue: early factors have low
            rank, and the inverse of one enters the other.
        weight_decay: Coefficient of the decoupled decay.
        refresh_every: Updates between two refreshes of the bases.
        start: The first refresh, which is by `eigh`.
        policy: Another refresh policy, in the place of the last two.
        statistics: Whether L and R take in a gradient "before" or "after" its use.
        block_size: Largest size of a block's dimension; None for whole matrices.
        merge_dims: Whether small dimensions are merged.
        factor_dtype: dtype of the factors.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Source: arXiv 2509.03378, algorithm 1.

    Example:
        >>> tx = kl_shampoo(1e-3)
        >>> params = {"w": torch.ones(8, 4), "b": torch.zeros(4)}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> list(state)
        ['partition', 'add_decayed_weights', 'scale_by_learning_rate']
    """
    check_number("beta2", beta2, high=1.0, high_open=True)
    exponents = dict.fromkeys(range(1, 9), 0.5)
    direction = eigendecomposed(
        beta2,
        basis=linalg.qr_basis(
            sort="never",
            first="eigh",
            damping=linalg.eigh_root(epsilon, relative_epsilon=relative_epsilon),
        ),
        eigenvalues="ema",
        kl=True,
        normalize=True,
        exponents=exponents,
        factor_dtype=factor_dtype,
    )
    matrices = blocked(
        precondition(
            direction,
            filter=ema(beta1),
            policy=every(refresh_every, start=start) if policy is None else policy,
            statistics=statistics,
        ),
        block_size=block_size,
        merge_dims=merge_dims,
    )
    return chain(
        partition(
            {"matrix": matrices, "rest": scale_by_adam(beta1, beta2, epsilon)}, _matrix_or_rest
        ),
        *unless_zero(weight_decay, add_decayed_weights(weight_decay)),
        scale_by_learning_rate(learning_rate),
    )


def _matrix_or_rest(path: str, leaf: Tensor) -> str:
    return "matrix" if is_matrix(path, leaf) else "rest"
