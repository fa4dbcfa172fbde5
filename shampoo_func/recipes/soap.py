"""SOAP, Adam in Shampoo's eigenbasis, and KL-SOAP, as sentences over the stages."""

from __future__ import annotations

from typing import Any, Literal

import torch

from shampoo_func import linalg
from shampoo_func.errors import check_choice, check_number
from shampoo_func.preconditioners import in_eigenbasis, second_moment
from shampoo_func.recipes.parts import unless_zero
from shampoo_func.transforms import (
    Chain,
    Policy,
    add_decayed_weights,
    blocked,
    chain,
    ema,
    every,
    precondition,
    scale_by_learning_rate,
)
from shampoo_func.types import Scalar, Schedule

__all__ = ["kl_soap", "soap"]


def soap(
    learning_rate: Scalar | Schedule = 3e-3,
    *,
    beta1: Scalar = 0.95,
    beta2: Scalar = 0.95,
    shampoo_beta2: Scalar | None = None,
    epsilon: Scalar = 1e-8,
    weight_decay: Scalar = 1e-2,
    refresh_every: int = 10,
    start: float = 1,
    policy: Policy | None = None,
    statistics: Literal["before", "after"] = "after",
    basis: Literal["qr", "eigh"] = "qr",
    momentum: Literal["rotated", "original"] = "rotated",
    before_start: Literal["identity", "skip"] = "skip",
    block_size: int | None = 1024,
    merge_dims: bool = False,
    max_dim: int | None = 10_000,
    precondition_1d: bool = False,
    kl: Literal["paper", "reference"] | None = None,
    factor_dtype: torch.dtype | None = None,
) -> Chain:
    """SOAP: Adam in the eigenbasis of Shampoo's factors.

    For a matrix block, with Q_L and Q_R the eigenvectors of the averages L of G G^T and R of
    G^T G: G' = Q_L^T G Q_R; M' and V' are averages of G' and G'^2; and
    W <- W - learning_rate (Q_L [M' / (sqrt(V') + epsilon)] Q_R^T + weight_decay W), with M' and
    V' bias-corrected.

    The defaults are those of SOAP's own code: the first update finds the bases by `eigh` and
    moves nothing; later ones improve them by one QR step, which sorts the columns, and the
    second moments with them; L and R take a gradient in after it was used. For
    eigenvalue-corrected Shampoo as in Distributed Shampoo set `statistics="before"`,
    `basis="eigh"`, `before_start="identity"`, `start=refresh_every`.

    Args:
        learning_rate: A number, 0-d tensor, or schedule of the step.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        shampoo_beta2: Decay of the factors; `beta2` if not given.
        epsilon: Added to the root of the second moment.
        weight_decay: Coefficient of the decoupled decay.
        refresh_every: Updates between two refreshes of the bases.
        start: The first refresh.
        policy: Another refresh policy, in the place of the last two.
        statistics: Whether L and R take in a gradient "before" or "after" its use; "before"
            is the more stable with very large batches (arXiv 2607.20548).
        basis: By one "qr" step from the previous basis, or by "eigh".
        momentum: Where the first moment is kept: in the "rotated" basis, one rotation less per
            step, or in the "original" one: the same numbers to rounding, but that there it takes
            in skipped gradients too.
        before_start: Adam in the "identity" basis before the first refresh, or "skip" those
            updates.
        block_size: Largest size of a block's dimension; None for whole matrices.
        merge_dims: Whether small dimensions are merged.
        max_dim: Dimensions of blocks larger than this are not rotated.
        precondition_1d: Whether vectors are rotated too, or get plain Adam.
        kl: KL-SOAP: the factors of KL-Shampoo, see `in_eigenbasis`.
        factor_dtype: dtype of the factors.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Source: arXiv 2409.11321, algorithm 3.

    Example:
        >>> tx = soap(3e-3, refresh_every=10)
        >>> params = {"w": torch.ones(8, 4), "b": torch.zeros(4)}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> list(state)
        ['precondition', 'add_decayed_weights', 'scale_by_learning_rate']
    """
    check_number("beta1", beta1, high=1.0, high_open=True)
    check_number("beta2", beta2, high=1.0, high_open=True)
    check_choice("basis", basis, ("qr", "eigh"))
    check_choice("momentum", momentum, ("rotated", "original"))
    # the inverse of one KL factor enters the other, and early ones have low rank
    damping = linalg.eigh_root(1e-30, relative_epsilon=0.0 if kl is None else 1e-6)
    solver: linalg.BasisSolver = linalg.eigh_basis(damping=damping)
    if basis == "qr":
        solver = linalg.qr_basis(sort="before", first="eigh", damping=damping)
    rotates = momentum == "rotated"
    direction = in_eigenbasis(
        second_moment(beta2, epsilon=epsilon),
        beta2=beta2 if shampoo_beta2 is None else shampoo_beta2,
        basis=solver,
        kl=kl,
        carry="permute" if basis == "qr" else "keep",
        momentum=beta1 if rotates else None,
        before_start=before_start,
        ignore=None if precondition_1d else {1: [0]},
        max_dim=max_dim,
        factor_dtype=factor_dtype,
    )
    return chain(
        blocked(
            precondition(
                direction,
                filter=None if rotates else ema(beta1),
                policy=every(refresh_every, start=start) if policy is None else policy,
                statistics=statistics,
            ),
            block_size=block_size,
            merge_dims=merge_dims,
        ),
        *unless_zero(weight_decay, add_decayed_weights(weight_decay)),
        scale_by_learning_rate(learning_rate),
    )


def kl_soap(
    learning_rate: Scalar | Schedule = 3e-3,
    *,
    form: Literal["paper", "reference"] = "paper",
    **options: Any,
) -> Chain:
    """SOAP with the factors of KL-Shampoo.

    F_1 <- beta2 F_1 + (1 - beta2) / d_2 G F_2^(-1) G^T, and F_2 likewise with F_1; their
    eigenbases are SOAP's, and Adam runs in them.

    Args:
        learning_rate: A number, 0-d tensor, or schedule of the step.
        form: "paper" as above; "reference" with F_2^(-1/2) and without 1 / d_2, which is how
            Distributed Shampoo takes KL factors.
        **options: Passed to `soap`.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Source: arXiv 2509.03378, section 4; arXiv 2607.20548.

    Example:
        >>> tx, params = kl_soap(3e-3, start=1), {"w": torch.ones(8, 4)}
        >>> tx.update(params, tx.init(params), params)[0]["w"].shape
        torch.Size([8, 4])
    """
    check_choice("form", form, ("paper", "reference"))
    return soap(learning_rate, kl=form, **options)
