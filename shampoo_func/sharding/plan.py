"""Which rank owns which block: a frozen plan, from paths and shapes alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from shampoo_func.blocks import BlockPlan
from shampoo_func.errors import HyperparameterError, check_choice, check_count
from shampoo_func.sharding.costs import Cost, CubicCost
from shampoo_func.sharding.owners import ASSIGNMENTS

__all__ = ["ShardPlan", "balance", "plan_shards"]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The blocks of a tree and the owner of each.

    blocks: how parameters are cut. paths: their names. world: the number of ranks. stacks: the
    names of the stacks. shapes: the shape of a block of each. costs: what one costs. owners:
    for each stack the owner of every row.
    """

    blocks: BlockPlan
    paths: tuple[str, ...]
    world: int
    stacks: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    costs: tuple[float, ...]
    owners: tuple[tuple[int, ...], ...]

    def rows(self, rank: int) -> dict[str, list[int]]:
        """Return the rows of every stack that a rank owns; a stack without any is left out."""
        found = {
            name: [row for row, owner in enumerate(own) if owner == rank]
            for name, own in zip(self.stacks, self.owners, strict=True)
        }
        return {name: rows for name, rows in found.items() if rows}

    def counts(self) -> dict[str, list[int]]:
        """Return how many blocks of every stack each rank owns."""
        found = {}
        for name, own in zip(self.stacks, self.owners, strict=True):
            counts = [0] * self.world
            for owner in own:
                counts[owner] += 1
            found[name] = counts
        return found

    def loads(self) -> list[float]:
        """Return the cost of every rank's blocks."""
        loads = [0.0] * self.world
        for cost, counts in zip(self.costs, self.counts().values(), strict=True):
            for rank, count in enumerate(counts):
                loads[rank] += count * cost
        return loads

    def fingerprint(self, *extra: object) -> int:
        """Return a number of 62 bits that two different plans do not share.

        Args:
            *extra: What else must be the same on all ranks; values with a stable `repr`.
        """
        digest = hashlib.sha256(repr((self.world, self.paths, self.stacks, extra)).encode())
        for parameter in self.blocks.parameters:
            digest.update(repr((parameter.shape, parameter.merged)).encode())
        for name, own in zip(self.stacks, self.owners, strict=True):
            digest.update(repr((name, own)).encode())
        return int.from_bytes(digest.digest()[:8], "big") >> 2


def plan_shards(
    blocks: BlockPlan,
    paths: Sequence[str],
    world: int,
    *,
    assignment: str = "bucket_lpt",
    cost: Cost | None = None,
    itemsizes: Sequence[int] | None = None,
) -> ShardPlan:
    """Assign the blocks of a tree to ranks.

    Shapes are taken from the dearest on, and blocks of one shape in the order of their
    parameters' paths and their places in them, so the plan is the same on every rank and does
    not depend on how parameters are nested or ordered.

    Args:
        blocks: How the parameters are cut (`plan_blocks`).
        paths: The dotted path of every parameter, in the order of the plan.
        world: The number of ranks that share the blocks.
        assignment: "bucket_lpt", "lpt" or "chunk".
        cost: What is balanced; `cubic_cost()` if not given.
        itemsizes: Bytes per element of every parameter, for costs in bytes; 4 if not given.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Example:
        >>> import torch
        >>> from shampoo_func.blocks import LeafSpec, plan_blocks
        >>> spec = LeafSpec((6, 2), torch.float32, torch.device("cpu"))
        >>> plan = plan_shards(plan_blocks([spec], block_size=2), ["w"], 2)
        >>> plan.owners, plan.loads()
        (((0, 0, 1),), [32.0, 16.0])
    """
    check_count("world", world)
    check_choice("assignment", assignment, ASSIGNMENTS)
    price = CubicCost() if cost is None else cost
    if not isinstance(price, Cost):
        raise HyperparameterError(f"cost must be a cost such as cubic_cost(), got {cost!r}.")
    sizes = dict(blocks.stacks)
    shapes: dict[str, tuple[int, ...]] = {}
    bytes_each: dict[str, int] = {}
    order: dict[str, list[int]] = {name: [] for name in sizes}
    for index in sorted(range(len(paths)), key=lambda index: paths[index]):
        for tile in blocks.parameters[index].tiles:
            shapes[tile.stack] = tile.block
            bytes_each[tile.stack] = 4 if itemsizes is None else itemsizes[index]
            order[tile.stack].extend(range(tile.row, tile.row + tile.count))
    costs = {name: price.of(shapes[name], bytes_each[name]) for name in sizes}
    dearest = sorted(sizes, key=lambda name: (-costs[name], shapes[name], name))
    owners: dict[str, tuple[int, ...]] = {}
    assigned = ASSIGNMENTS[assignment]([(costs[name], sizes[name]) for name in dearest], world)
    for name, own in zip(dearest, assigned, strict=True):
        by_row = dict(zip(order[name], own, strict=True))
        owners[name] = tuple(by_row[row] for row in range(sizes[name]))
    return ShardPlan(
        blocks,
        tuple(paths),
        world,
        tuple(sizes),
        tuple(shapes[name] for name in sizes),
        tuple(costs[name] for name in sizes),
        tuple(owners[name] for name in sizes),
    )


def balance(loads: Sequence[float]) -> float:
    """Return the largest load over the mean: 1 is perfect.

    Args:
        loads: One per rank.

    Example:
        >>> balance([3.0, 1.0])
        1.5
    """
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0
