"""Muon, spectral descent and sign descent as sentences over the stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import HyperparameterError, check_number
from shampoo_func.preconditioners import PolarScale, SignScale, polar, sign_preconditioner
from shampoo_func.recipes.first_order import adamw
from shampoo_func.recipes.parts import is_zero, unless_zero
from shampoo_func.transforms import (
    Chain,
    Partition,
    add_decayed_weights,
    blocked,
    chain,
    identity,
    partition,
    precondition,
    scale_by_learning_rate,
    trace,
)
from shampoo_func.types import Scalar, Schedule, Transformation

__all__ = ["muon", "sign_sgd", "spectral_descent"]


def is_matrix(path: str, leaf: Tensor) -> bool:
    """Whether a parameter has two dimensions or more."""
    return leaf.ndim >= 2


@dataclass(frozen=True, slots=True)
class _MuonOrAdamw:
    """The labels of `muon`'s partition; a class, so that the recipe pickles and compares."""

    where: Callable[[str, Tensor], bool]

    def __call__(self, path: str, leaf: Tensor) -> str:
        return "muon" if self.where(path, leaf) else "adamw"


def muon(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.95,
    nesterov: bool = True,
    weight_decay: Scalar = 0.1,
    method: linalg.PolarMethod | None = None,
    scale: PolarScale | Callable[[int, int], float] = "spectral",
    where: Callable[[str, Tensor], bool] = is_matrix,
    block_size: int | None = None,
    adam_learning_rate: Scalar | Schedule | None = None,
    adam_beta1: Scalar = 0.9,
    adam_beta2: Scalar = 0.999,
    adam_epsilon: Scalar = 1e-8,
    adam_weight_decay: Scalar = 0.0,
) -> Partition:
    """Muon for matrices, AdamW for the rest.

    For a matrix W with gradient G, momentum mu and polar(U S V^T) = U V^T:

        M <- mu M + (1 - mu) G
        W <- W - learning_rate (scale polar((1 - mu) G + mu M) + weight_decay W)

    with polar(M) where `nesterov` is off. Embeddings, heads and all that is no hidden layer
    should go to AdamW; they are matrices too, so say so:
    `where=lambda path, leaf: leaf.ndim >= 2 and not path.startswith(("embed", "head"))`.

    The scale takes the rows of W for outputs, as in `torch.nn.Linear`; where they are inputs,
    pass a function that exchanges them. With "match_rms_adamw", AdamW's learning rate and decay
    fit. A tensor of more dimensions is taken as a matrix [d1, rest]. Equal shapes are worked on
    together, in one stack.

    Args:
        learning_rate: A number, 0-d tensor, or schedule of the step.
        momentum: Decay of the momentum, in [0, 1); the number 0 for none.
        nesterov: Whether the momentum looks ahead.
        weight_decay: Coefficient of the decoupled decay of the matrices; not scaled.
        method: Finds polar factors; `newton_schulz_polar()` if not given. On a GPU
            `newton_schulz_polar(compute_dtype=torch.bfloat16)` is usual.
        scale: "spectral", "match_rms_adamw", "fan", "none", "nuclear" or a function of
            (d_in, d_out), see `polar`.
        where: Predicate on path and parameter: what gets Muon; all with two dimensions or more
            if not given.
        block_size: Largest size of a block's dimension, each block with a polar factor of its
            own; None keeps matrices whole.
        adam_learning_rate: For the rest; `learning_rate` if not given.
        adam_beta1: Decay of the mean for the rest, in [0, 1).
        adam_beta2: Decay of the second moment for the rest, in [0, 1).
        adam_epsilon: Added to the root for the rest.
        adam_weight_decay: Coefficient of the decoupled decay of the rest.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024);
        arXiv 2502.16982, section 2.2.

    Example:
        >>> import torch
        >>> from shampoo_func.linalg import svd_polar
        >>> tx = muon(0.1, method=svd_polar(), weight_decay=0.0)
        >>> params = {"bias": torch.zeros(2), "weight": torch.zeros(2, 2)}
        >>> grads = {"bias": torch.ones(2), "weight": torch.tensor([[3.0, 4.0], [-4.0, 3.0]])}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> updates["weight"]
        tensor([[-0.0600, -0.0800],
                [ 0.0800, -0.0600]])
    """
    if not callable(where):
        raise HyperparameterError(
            f"where must be a predicate on a parameter's path and the parameter, got {where!r}."
        )
    matrices = spectral_descent(
        learning_rate,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        method=linalg.newton_schulz_polar() if method is None else method,
        scale=scale,
        block_size=block_size,
    )
    rest = adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        beta1=adam_beta1,
        beta2=adam_beta2,
        epsilon=adam_epsilon,
        weight_decay=adam_weight_decay,
    )
    return partition({"muon": matrices, "adamw": rest}, _MuonOrAdamw(where))


def spectral_descent(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.0,
    nesterov: bool = False,
    weight_decay: Scalar = 0.0,
    method: linalg.PolarMethod | None = None,
    scale: PolarScale | Callable[[int, int], float] = "none",
    block_size: int | None = None,
) -> Chain:
    """Spectral descent: W <- W - learning_rate (scale polar(M) + weight_decay W).

    M is the gradient or, with a momentum mu, M <- mu M + (1 - mu) G; polar(U S V^T) = U V^T.
    Every parameter takes part: one of more than two dimensions as the matrix [d1, rest], a
    vector as one column, which is divided by its norm.

    Args:
        learning_rate: A number, 0-d tensor, or schedule of the step.
        momentum: Decay of the momentum, in [0, 1); the number 0 for none.
        nesterov: Whether to use (1 - mu) G + mu M.
        weight_decay: Coefficient of the decoupled decay.
        method: Finds polar factors; the exact `svd_polar()` if not given.
        scale: "none", "nuclear" (the true direction of steepest descent in the spectral norm),
            another rule or a function of (d_in, d_out), see `polar`.
        block_size: Largest size of a block's dimension, each block with a polar factor of its
            own; None keeps parameters whole.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Source: arXiv 1708.00523; arXiv 2409.20325, section 3.

    Example:
        >>> import torch
        >>> tx, params = spectral_descent(0.1), torch.zeros(2, 2)
        >>> tx.update(torch.tensor([[3.0, 4.0], [-4.0, 3.0]]), tx.init(params), params)[0]
        tensor([[-0.0600, -0.0800],
                [ 0.0800, -0.0600]])
    """
    direction = precondition(
        polar(linalg.svd_polar() if method is None else method, scale=scale),
        filter=_filter(momentum, nesterov),
    )
    return chain(
        blocked(direction, block_size=block_size, merge_dims=False),
        *unless_zero(weight_decay, add_decayed_weights(weight_decay)),
        scale_by_learning_rate(learning_rate),
    )


def sign_sgd(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.0,
    nesterov: bool = False,
    weight_decay: Scalar = 0.0,
    scale: SignScale | Callable[[Tensor], Any] = "none",
) -> Chain:
    """Sign descent, and Signum with a momentum: W <- W - learning_rate (sign(M) + decay W).

    M is the gradient or, with a momentum mu, M <- mu M + (1 - mu) G.

    Args:
        learning_rate: A number, 0-d tensor, or schedule of the step.
        momentum: Decay of the momentum, in [0, 1); the number 0 for none, 0.9 for Signum.
        nesterov: Whether to use (1 - mu) G + mu M.
        weight_decay: Coefficient of the decoupled decay.
        scale: Multiplies the signs of a parameter: "none", "mean_abs", "sum_abs" or a function
            of M, see `sign_preconditioner`.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Source: arXiv 1802.04434, algorithms 1 and 2.

    Example:
        >>> import torch
        >>> tx, params = sign_sgd(0.1), torch.zeros(2)
        >>> tx.update(torch.tensor([3.0, -4.0]), tx.init(params), params)[0]
        tensor([-0.1000,  0.1000])
    """
    return chain(
        precondition(sign_preconditioner(scale), filter=_filter(momentum, nesterov)),
        *unless_zero(weight_decay, add_decayed_weights(weight_decay)),
        scale_by_learning_rate(learning_rate),
    )


def _filter(momentum: Scalar, nesterov: bool) -> Transformation:
    """Return the momentum that averages, as torch.optim.Muon's does; nothing for 0."""
    check_number("momentum", momentum, high=1.0, high_open=True)
    if is_zero(momentum):
        return identity()
    return trace(momentum, nesterov=nesterov, dampening=momentum)
