"""What an optimizer's state takes on every rank, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from shampoo_func import tree
from shampoo_func.errors import HyperparameterError
from shampoo_func.sharding import as_local, balance, plan_shards
from shampoo_func.transforms.blocked import Blocked
from shampoo_func.transforms.inspect import sub_states
from shampoo_func.transforms.sharded import with_sharding
from shampoo_func.types import Transformation, Tree

__all__ = ["StateReport", "state_report"]


@dataclass(frozen=True, slots=True)
class StateReport:
    """State per rank.

    blocks, block_bytes: of every rank the blocks whose state it has, and the bytes. costs: what
    it refreshes. other_bytes: the bytes of all state outside `blocked`, the same on each.
    """

    blocks: tuple[int, ...]
    block_bytes: tuple[int, ...]
    costs: tuple[float, ...]
    other_bytes: int

    @property
    def bytes(self) -> tuple[int, ...]:
        """The bytes of every rank's whole state."""
        return tuple(own + self.other_bytes for own in self.block_bytes)

    @property
    def byte_balance(self) -> float:
        """The largest bytes of block state over the mean."""
        return balance(self.block_bytes)

    @property
    def cost_balance(self) -> float:
        """The largest cost over the mean."""
        return balance(self.costs)

    def __str__(self) -> str:
        total = self.bytes
        return (
            f"{len(self.blocks)} rank(s): {sum(self.blocks)} blocks, {min(self.blocks)} to "
            f"{max(self.blocks)} per rank; state {min(total) / 2**20:.1f} to "
            f"{max(total) / 2**20:.1f} MiB per rank, of which {self.other_bytes / 2**20:.1f} MiB "
            f"outside of blocks; max/mean {self.byte_balance:.3f} in bytes of blocks, "
            f"{self.cost_balance:.3f} in cost"
        )


def state_report(
    tx: Transformation, params: Tree, mesh: DeviceMesh | int | None = None
) -> StateReport:
    """Report the state that an optimizer would have on every rank; nothing is allocated.

    Owners are planned as `blocked` plans them (with its own assignment and cost where it is on
    a mesh already). State outside `blocked` is stored as the parameters are: with plain ones
    all of it on every rank, with DTensors this rank's share.

    Args:
        tx: The transformation.
        params: The parameters, or tensors on the meta device of their shapes and dtypes.
        mesh: The ranks that share the blocks, or their number; those that `tx` is on if not
            given (one, if it is on none).

    Raises:
        HyperparameterError: If `mesh` is something else.

    Example:
        >>> from shampoo_func.recipes import shampoo
        >>> params = {"w": torch.empty(256, 256, device="meta")}
        >>> report = state_report(shampoo(1e-3, block_size=128), params, 2)
        >>> report.blocks, report.cost_balance
        ((2, 2), 1.0)
    """
    ranks: int | None = None
    if isinstance(mesh, DeviceMesh):
        ranks = mesh.size()
    elif mesh is not None:
        if isinstance(mesh, bool) or not isinstance(mesh, int) or mesh < 1:
            raise HyperparameterError(
                f"mesh must be a DeviceMesh or the number of ranks, got {mesh!r}."
            )
        ranks = mesh
    shapes = tree.map_params(
        lambda leaf: torch.empty(leaf.shape, dtype=leaf.dtype, device="meta"), params
    )
    count = ranks or max((_world(stage) for stage in _stages(tx)), default=1)
    local = sum(as_local(leaf).numel() for leaf in tree.leaves(params))
    whole = sum(leaf.numel() for leaf in tree.leaves(shapes))
    totals = _Totals(count, local / whole if whole else 1.0)
    alone = with_sharding(tx, lambda stage: None)
    totals.visit(tx, alone, alone.init(shapes), shapes)
    return StateReport(
        tuple(totals.blocks), tuple(totals.bytes), tuple(totals.costs), int(totals.other)
    )


class _Totals:
    """Sums over a state."""

    def __init__(self, ranks: int, share: float) -> None:
        self.share = share
        self.blocks = [0] * ranks
        self.bytes = [0] * ranks
        self.costs = [0.0] * ranks
        self.other = 0.0

    def visit(self, tx: Transformation, alone: Transformation, state: Any, params: Tree) -> None:
        """Add a state; `alone` is `tx` without a mesh, whose state it is."""
        parts = sub_states(alone, state, params)
        if parts is not None:
            meshed = sub_states(tx, state, params) or []
            for part, own in zip(parts, meshed, strict=True):
                self.visit(own.tx, part.tx, part.state, part.params)
        elif isinstance(tx, Blocked):
            self._add_blocks(tx, state, params)
        elif len(tx.children) == 1 and hasattr(state, "inner"):
            self.visit(tx.children[0], alone.children[0], state.inner, params)
            self._add_rest(state._replace(inner=()))
        else:
            self._add_rest(state)

    def _add_rest(self, state: Any) -> None:
        for leaf in tree.leaves(state):
            self.other += _bytes(leaf) * (self.share if leaf.ndim else 1.0)

    def _add_blocks(self, tx: Blocked, state: Any, params: Tree) -> None:
        own = tx.sharding
        shares = own is None or own.transport.shares_state
        plan = plan_shards(
            tx.plan(params),
            tree.paths(params),
            len(self.blocks),
            assignment="bucket_lpt" if own is None else own.assignment,
            cost=None if own is None else own.cost,
            itemsizes=[leaf.dtype.itemsize for leaf in tree.leaves(params)],
        )
        for rank, cost in enumerate(plan.loads()):
            self.costs[rank] += cost
        sizes = dict(plan.blocks.stacks)
        for name, counts in plan.counts().items():
            whole = sum(_bytes(leaf) for leaf in tree.leaves(state[name]))
            held = counts if shares else [sizes[name]] * len(counts)
            for rank, count in enumerate(held):
                self.blocks[rank] += count
                self.bytes[rank] += whole // sizes[name] * count


def _stages(tx: Transformation) -> list[Blocked]:
    """Return the `blocked` stages of a transformation."""
    found: list[Blocked] = []

    def note(stage: Blocked) -> Any:
        found.append(stage)
        return stage.sharding

    with_sharding(tx, note)
    return found


def _world(stage: Blocked) -> int:
    return 1 if stage.sharding is None else len(stage.sharding.ranks)


def _bytes(leaf: Tensor) -> int:
    return leaf.numel() * leaf.element_size()
