"""Clipping: by value, and by the norm of the whole tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo_func import linalg, tree
from shampoo_func.errors import check_number
from shampoo_func.sharding import whole_norms
from shampoo_func.transforms.base import Stateless
from shampoo_func.types import Scalar, Tree

__all__ = ["Clip", "ClipByGlobalNorm", "clip", "clip_by_global_norm", "global_norm"]


def global_norm(updates: Tree) -> Tensor:
    """Return the Euclidean norm of all leaves together, 0-d, in at least float32.

    Of DTensors it is the norm of the whole tensors, the same plain number on every rank.

    Args:
        updates: A tree of real floating tensors; None leaves count for nothing.

    Raises:
        GradientError: If a leaf is anything else.

    Example:
        >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0]), "c": None})
        tensor(5.)
    """
    tree.check_updates(updates)
    norms = [
        torch.linalg.vector_norm(leaf, dtype=linalg.compute_dtype(leaf.dtype))
        for leaf in tree.leaves(updates)
        if leaf is not None
    ]
    if not norms:
        return torch.zeros(())
    norms = whole_norms(norms)
    device = norms[0].device
    return torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms]))


@dataclass(frozen=True, slots=True)
class Clip(Stateless):
    """See `clip`."""

    max_value: Scalar

    def transform(self, updates: Tree) -> Tree:
        """Clamp every element."""

        def clamp(update: Tensor) -> Tensor:
            bound: Any = linalg.align(self.max_value, update)
            return update.clamp(-bound, bound).to(update.dtype)

        return tree.map(clamp, updates)


@dataclass(frozen=True, slots=True)
class ClipByGlobalNorm(Stateless):
    """See `clip_by_global_norm`."""

    max_norm: Scalar

    def transform(self, updates: Tree) -> Tree:
        """Scale all updates by one factor of at most 1."""
        norm = global_norm(updates)
        # the derivative of max_norm / norm at 0 is infinite, so 0 must not reach the quotient
        factor = (self.max_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0)
        return tree.map(lambda u: linalg.scaled(u, factor.to(u.device)), updates)


def clip(max_value: Scalar) -> Clip:
    """Clamp every element of the updates to [-max_value, max_value].

    Args:
        max_value: A positive number or 0-d tensor.

    Raises:
        HyperparameterError: If it is a number that is not positive.

    Example:
        >>> tx = clip(1.0)
        >>> tx.update(torch.tensor([-3.0, 0.5]), tx.init(torch.ones(2)))[0]
        tensor([-1.0000,  0.5000])
    """
    check_number("max_value", max_value, low_open=True)
    return Clip(max_value)


def clip_by_global_norm(max_norm: Scalar) -> ClipByGlobalNorm:
    """Scale the updates so that their norm, over the whole tree, is at most `max_norm`.

    U <- U min(1, max_norm / |U|). Inside `blocked` a stage sees one stack at a time, so
    global clipping belongs outside.

    Args:
        max_norm: A positive number or 0-d tensor.

    Raises:
        HyperparameterError: If it is a number that is not positive.

    Source: arXiv 1211.5063.

    Example:
        >>> tx = clip_by_global_norm(1.0)
        >>> tx.update(torch.tensor([3.0, 4.0]), tx.init(torch.ones(2)))[0]
        tensor([0.6000, 0.8000])
    """
    check_number("max_norm", max_norm, low_open=True)
    return ClipByGlobalNorm(max_norm)
