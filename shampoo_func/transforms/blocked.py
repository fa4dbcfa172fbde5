"""Lifting a transformation of stacks of blocks to one of any parameter tree."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shampoo_func import tree
from shampoo_func.blocks import BlockPlan, plan_shapes
from shampoo_func.errors import (
    HyperparameterError,
    MissingParamsError,
    TreeMismatchError,
    check_count,
)
from shampoo_func.sharding import (
    Cost,
    Cut,
    Exchange,
    Here,
    LocalExchange,
    RefreshExchange,
    Sharding,
    ShardPlan,
    Transport,
    as_local,
    check_not_batched,
    kinds_of,
    plan_shards,
    sharding,
    wrapped,
)
from shampoo_func.transforms.base import Wrapper
from shampoo_func.transforms.shared_refresh import check_shareable, with_shared_refresh
from shampoo_func.types import Transformation, Tree

__all__ = ["Blocked", "blocked", "check_stacks"]


@dataclass(frozen=True, slots=True)
class Blocked(Wrapper):
    """See `blocked`."""

    inner: Transformation
    block_size: int | None = 1024
    merge_dims: bool = True
    merge_to: int | None = None
    sharding: Sharding | None = None

    def plan(self, params: Tree) -> BlockPlan:
        """Return how the parameters are cut into blocks; only their shapes are looked at."""
        return plan_shapes(_specs(params), *self._sizes())

    def init(self, params: Tree) -> dict[str, Any]:
        """Return the inner state of every stack; every leaf has the block dimension first.

        On a mesh every rank must call it, and holds the state of the blocks that it owns.
        """
        tree.check_params(params)
        leaves = tree.leaves(params)
        if self.sharding is not None and not any(leaf.is_meta for leaf in leaves):
            self.sharding.check(self._cut(params), kinds_of(leaves), self.inner.name)
        exchange = self.exchange(params, leaves, (True,) * len(leaves))
        if isinstance(exchange, RefreshExchange):
            check_shareable(self.inner)
        stacks = exchange.collect([as_local(leaf) for leaf in leaves])
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
        present = tuple(leaf is not None for leaf in leaves)
        shapes = self._shapes_from(updates, params, present)
        exchange = self.exchange(shapes, leaves, present)
        check_stacks(exchange.sizes(), state)
        local = [as_local(leaf) for leaf in leaves]
        stacks = exchange.collect(local)
        param_stacks = {}
        if self.needs_params and params is not None:
            there = zip(tree.leaves(params), present, strict=True)
            own = [leaf if here else None for leaf, here in there]
            travel = self.exchange(shapes, own, present)
            param_stacks = travel.collect([as_local(leaf) for leaf in own])
        rows = {} if all(present) else exchange.rows()
        out, after = {}, dict(state)
        for name, stack in stacks.items():
            held = rows.get(name)
            before = state[name] if held is None else _take(state[name], held)
            inner = self.inner
            if isinstance(exchange, RefreshExchange):
                inner = with_shared_refresh(inner, exchange.refreshes(name))
            out[name], result = inner.update(stack, before, param_stacks.get(name), **extra)
            after[name] = result if held is None else _put(state[name], held, result)
        results = exchange.deliver(out, local)
        whole = [wrapped(own, leaf) for own, leaf in zip(results, leaves, strict=True)]
        return tree.unflatten(structure, whole), after

    def exchange(
        self, params: Tree, leaves: list[Tensor | None], present: tuple[bool, ...]
    ) -> Exchange:
        """Return how the blocks of some tensors come to their owners and go back.

        Args:
            params: The tree that has the shapes of all parameters.
            leaves: The tensors, as they are stored.
            present: Which of them are there.
        """
        if self.sharding is None:
            return LocalExchange(self.plan(params), present)
        check_not_batched(leaves)
        return self.sharding.exchange(self._cut(params), kinds_of(leaves), present)

    def here(self, params: Tree) -> list[list[Here]]:
        """Return, for every parameter, the blocks whose state this rank has."""
        leaves = tree.leaves(params)
        return self.exchange(params, leaves, (True,) * len(leaves)).here()

    def shard_plan(self, params: Tree) -> ShardPlan:
        """Return blocks and owners; one owner without a mesh."""
        cut = self._cut(params)
        if self.sharding is not None:
            return self.sharding.plan(cut)
        return plan_shards(self.plan(params), cut.paths, 1)

    def _cut(self, params: Tree) -> Cut:
        return Cut(tuple(tree.paths(params)), _specs(params), *self._sizes())

    def _sizes(self) -> tuple[int | None, bool, int | None]:
        return _fixed(self.block_size), self.merge_dims, _fixed(self.merge_to)

    def _shapes_from(self, updates: Tree, params: Tree | None, present: tuple[bool, ...]) -> Tree:
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


def _specs(params: Tree) -> tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]:
    """Return shape, dtype and device of every leaf."""
    return tuple(
        [
            (tuple([index(size) for size in leaf.shape]), leaf.dtype, leaf.device)
            for leaf in tree.leaves(params)
        ]
    )


def _fixed(size: int | None) -> int | None:
    """Tie a graph to this size, also where Dynamo would leave it open: blocks need numbers."""
    return None if size is None else index(size)


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


def check_stacks(planned: dict[str, int], state: dict[str, Any]) -> None:
    """Check that the state was made for stacks of these sizes."""
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
    mesh: DeviceMesh | None = None,
    transport: Transport | None = None,
    assignment: str = "bucket_lpt",
    cost: Cost | None = None,
    communication_dtype: torch.dtype | None = None,
) -> Blocked:
    """Run a transformation on stacks of equal-shaped blocks, on one process or a mesh.

    Small neighbouring dimensions of every parameter are merged while their product is at most
    `block_size`, larger ones are cut into pieces of `block_size` (the last may be smaller), and
    the blocks of all parameters that have one shape are stacked into one tensor
    `[n_blocks, d1, ..., dk]`. `inner` is run on each stack. Its state is kept in a dict keyed
    by block shape, `"256x256"`; every leaf has the block dimension first, counters too, so
    that a parameter without a gradient (None) leaves its blocks' state as it is.

    With a mesh each block is owned by one rank, which alone has its state and runs `inner` on
    it: gradients come to the owners and directions go back. The numbers are those of one
    process. Parameters and gradients may be plain tensors, the same on every rank, or DTensors
    with any of `Replicate`, `Shard` (uneven and strided too) and, for gradients, `Partial`. All
    ranks of the mesh must make the same calls, with None for the same gradients.

    Args:
        inner: A transformation of one tensor, e.g. `precondition(kronecker())`.
        block_size: Largest size of a block's dimension; None never cuts and never merges
            (dimensions of size 1 are still dropped if `merge_dims`).
        merge_dims: Whether to drop dimensions of size 1 and merge small ones.
        merge_to: Merge only while more than this many dimensions are left: 2 makes matrices of
            convolutions, as spectral methods want them. With `block_size=None` there is then
            no limit to merging. 1 if not given, and no merging with `block_size=None`.
        mesh: The ranks that share the blocks, all of them whatever the mesh's dimensions. One
            dimension of a larger mesh, `mesh["blocks"]`, shares them within a group and
            repeats them in every other (the paper's trainers per group). Every rank of the
            mesh must build the transformation.
        transport: How blocks travel: `all_gather()`, `reduce_scatter()`, `all_to_all()`,
            `shard_local()`, `refresh_sharded()`; the one that sends least if not given.
        assignment: How owners are chosen: "bucket_lpt", "lpt" or "chunk".
        cost: What is balanced: `cubic_cost()`, the default, or `byte_cost()`.
        communication_dtype: In which gradients and directions are sent; their own if not
            given.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range, or `inner` no
            transformation.
        ShardingError: If this rank is not in the mesh.

    Source: arXiv 2309.06497, sections 3.3 and 4.

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
    if mesh is None:
        return Blocked(inner, block_size, merge_dims, merge_to)
    shared = sharding(
        mesh,
        transport=transport,
        assignment=assignment,
        cost=cost,
        communication_dtype=communication_dtype,
    )
    return Blocked(inner, block_size, merge_dims, merge_to, shared)
