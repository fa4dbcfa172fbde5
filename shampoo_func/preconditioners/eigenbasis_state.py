"""What `in_eigenbasis` keeps."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["InEigenbasisState", "RotatedMomentum"]


class RotatedMomentum(NamedTuple):
    """step: int64 `[n]`, gradients taken in. mean: `[n, d1, ..., dk]`, in the eigenbasis."""

    step: Tensor
    mean: Tensor


class InEigenbasisState(NamedTuple):
    """Statistics, eigenbases and the inner state of a stack of order-k blocks.

    step: int64 `[n]`. factors, bases: k tensors `[n, d, d]`. eigenvalues: k tensors `[n, d]`
    with `kl`, else none. inner: the state of the preconditioner in the basis. momentum: the
    average that is kept in the basis, if any. started: bool `[n]`, whether a block was ever
    refreshed. failures, failures_in_a_row: int64 `[n]`, as in `kronecker`.
    """

    step: Tensor
    factors: tuple[Tensor, ...]
    bases: tuple[Tensor, ...]
    eigenvalues: tuple[Tensor, ...]
    inner: Any
    momentum: tuple[RotatedMomentum, ...]
    started: Tensor
    failures: Tensor
    failures_in_a_row: Tensor
