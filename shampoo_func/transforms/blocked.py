"""Lifting a transformation of stacks of blocks to one of any parameter tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo_func import tree
from shampoo_func.blocks import BlockPlan, LeafSpec, gather, plan_blocks, present_rows, scatter
from shampoo_func.errors import (
    HyperparameterError,
    MissingParamsError,
    TreeMismatchError,
    check_count,
)
from shampoo_func.transforms.base import Wrapper
from shampoo_func.types import Transformation, Tree

__all__ = ["Blocked", "blocked", "check_stacks"]


@dataclass(frozen=True, slots=True)
class Blocked(Wrapper):
    """See `blocked`."""

    inner: Transformation
    block_size: int | None = 1024
    merge_dims: bool = True
    merge_to: int | None = None

    def plan(self, params: Tree) -> BlockPlan:
        """Return how the parameters are cut into blocks; only their shapes are looked at."""
        specs = [LeafSpec.of(leaf) for leaf in tree.leaves(params)]
        return plan_blocks(
            specs,
            block_size=self.block_size,
            merge_dims=self.merge_dims,
            merge_to=self.merge_to,
        )

    def init(self, params: Tree) -> dict[str, Any]:
        """Return the inner state of every stack; every leaf has the block dimension first."""
        tree.check_params(params)
        stacks = gather(self.plan(params), tree.leaves(params))
        return {name: self._init_stack(stack) for name, stack in stacks.items()}

    def _init_stack(self, stack: Tensor) -> Any:
        # one block's state, n times: counters too become one per block
        state = torch.func.vmap(self.inner.init)(stack)
        return tree.materialized(state)

    def update(
        self, updates: Tree, state: dict[str, Any], params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, dict[str, Any]]:
        """Cut the updates into stacks, transform each, and lay the blocks back."""
        self.check_call(params, extra)
        tree.check_updates(updates, params, what="the parameter")
        leaves, structure = tree.flatten(updates)
        present = [leaf is not None for leaf in leaves]
        plan = self.plan(self._shapes_from(updates, params, present))
        check_stacks(plan, state)
        stacks = gather(plan, leaves)
        param_stacks = {}
        if self.needs_params and params is not None:
            there = zip(tree.leaves(params), present, strict=True)
            param_stacks = gather(plan, [leaf if here else None for leaf, here in there])
        rows = {} if all(present) else present_rows(plan, present)
        out, after = {}, dict(state)
        for name, stack in stacks.items():
            own = rows.get(name)
            before = state[name] if own is None else _take(state[name], own)
            out[name], result = self.inner.update(stack, before, param_stacks.get(name), **extra)
            after[name] = result if own is None else _put(state[name], own, result)
        return tree.unflatten(structure, list(scatter(plan, out, leaves))), after

    def _shapes_from(self, updates: Tree, params: Tree | None, present: list[bool]) -> Tree:
        """Return the tree that has the shapes of all parameters."""
        if all(present):
            return updates
        if params is None:
            missing = tree.path_of(updates, present.index(False))
            raise MissingParamsError(
                f"the gradient of {missing!r} is None, so its shape must come from the "
                "parameter: call update(updates, state, params)."
            )
        return params


def _take(state: Any, rows: list[int]) -> Any:
    """Return the given blocks' part of a stack's state."""
    return tree.map(lambda leaf: leaf[torch.tensor(rows, device=leaf.device)], state)


def _put(state: Any, rows: list[int], part: Any) -> Any:
    """Return the state with the given blocks' part replaced."""
    return tree.map(
        lambda whole, new: whole.index_copy(0, torch.tensor(rows, device=whole.device), new),
        state,
        part,
    )


def check_stacks(plan: BlockPlan, state: dict[str, Any]) -> None:
    """Check that the state was made for these stacks."""
    planned = dict(plan.stacks)
    held = {name: _blocks_in(part) for name, part in state.items()}
    same = planned.keys() == held.keys() and all(
        held[name] in (None, count) for name, count in planned.items()
    )
    if not same:
        raise TreeMismatchError(
            f"the gradients make the stacks {planned}, but the state holds {held} (blocks per "
            "shape); pass the gradients of the parameters that init was called with, or call "
            "init again."
        )


def _blocks_in(state: Any) -> int | None:
    """Return how many blocks a stack's state holds; None if it has no leaf to tell."""
    leaves = tree.leaves(state)
    return leaves[0].shape[0] if leaves else None


def blocked(
    inner: Transformation,
    *,
    block_size: int | None = 1024,
    merge_dims: bool = True,
    merge_to: int | None = None,
) -> Blocked:
    """Run a transformation on stacks of equal-shaped blocks.

    Small neighbouring dimensions of every parameter are merged while their product is at most
    `block_size`, larger ones are cut into pieces of `block_size` (the last may be smaller), and
    the blocks of all parameters that have one shape are stacked into one tensor
    `[n_blocks, d1, ..., dk]`. `inner` is run on each stack. Its state is kept in a dict keyed
    by block shape, `"256x256"`; every leaf has the block dimension first, counters too, so
    that a parameter without a gradient (None) leaves its blocks' state as it is.

    Args:
        inner: A transformation of one tensor, e.g. `precondition(kronecker())`.
        block_size: Largest size of a block's dimension; None never cuts and never merges
            (dimensions of size 1 are still dropped if `merge_dims`).
        merge_dims: Whether to drop dimensions of size 1 and merge small ones.
        merge_to: Merge only while more than this many dimensions are left: 2 makes matrices of
            convolutions, as spectral methods want them. With `block_size=None` there is then
            no limit to merging. 1 if not given, and no merging with `block_size=None`.

    Raises:
        HyperparameterError: If a number is no positive int, or `inner` no transformation.

    Source: arXiv 2309.06497, section 3.3.

    Example:
        >>> from shampoo_func.preconditioners import kronecker
        >>> from shampoo_func.transforms import precondition
        >>> tx = blocked(precondition(kronecker()), block_size=4)
        >>> state = tx.init({"w": torch.zeros(8, 4), "b": torch.zeros(4)})
        >>> {name: stack.preconditioner.factors[0].shape for name, stack in state.items()}
        {'4': torch.Size([1, 4, 4]), '4x4': torch.Size([2, 4, 4])}
    """
    if not isinstance(inner, Transformation):
        raise HyperparameterError(
            f"blocked needs a transformation, got {inner!r}; wrap a preconditioner in "
            "precondition(...)."
        )
    if block_size is not None:
        check_count("block_size", block_size)
    if merge_to is not None:
        check_count("merge_to", merge_to)
        if not merge_dims:
            raise HyperparameterError(
                f"merge_to={merge_to} says how far dimensions are merged, but merge_dims is "
                "False; leave out one of the two."
            )
    return Blocked(inner, block_size, merge_dims, merge_to)
