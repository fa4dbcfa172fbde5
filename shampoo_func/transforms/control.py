"""Doing something only sometimes: on the host, in a compiled graph, or under vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import is_batchedtensor

from shampoo_func import tree
from shampoo_func.types import Tree

__all__ = ["when"]


def when(predicate: torch.Tensor, function: Callable[[Any], Any], operand: Tree) -> Tree:
    """Return `function(operand)` where a 0-d bool holds, else `operand`.

    Eager code branches on the host, so that nothing is computed in vain; a compiled graph
    branches by `torch.cond`, which keeps it one graph; under `torch.func.vmap` with one
    predicate per example, both are computed and selected.

    Args:
        predicate: 0-d bool tensor.
        function: Pure; returns a tree of the operand's structure, shapes, dtypes and strides.
        operand: A tree of tensors (None leaves stay None).
    """
    if is_batchedtensor(predicate):
        return tree.select(predicate, function(operand), operand)
    if not torch.compiler.is_compiling():
        return function(operand) if bool(predicate) else operand
    flat, structure = tree.flatten(operand)
    present = [leaf is not None for leaf in flat]

    def taken(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # torch.cond forbids outputs that alias inputs
        out = tree.leaves(function(tree.unflatten(structure, tree.filled(present, tensors))))
        return tuple(leaf.clone() for leaf in out if leaf is not None)

    def kept(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors)

    given = tuple(leaf for leaf in flat if leaf is not None)
    chosen = torch.cond(predicate, taken, kept, given)
    return tree.unflatten(structure, tree.filled(present, chosen))
