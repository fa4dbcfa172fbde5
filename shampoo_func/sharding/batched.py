"""Collectives under vmap would run once per example and return wrong values: refuse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_func.errors import ShardingError

__all__ = ["check_not_batched"]


def check_not_batched(leaves: Sequence[Tensor | None]) -> None:
    """Check that no tensor is one that vmap has batched.

    Raises:
        ShardingError: If one is.
    """
    if any(leaf is not None and torch._C._functorch.is_batchedtensor(leaf) for leaf in leaves):
        raise ShardingError(
            "a transformation on a mesh was called under vmap (a sweep, say), where its "
            "collectives would return wrong values; run the members one after the other, or build "
            "it without a mesh."
        )
