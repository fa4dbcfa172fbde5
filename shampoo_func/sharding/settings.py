"""Everything that `blocked` needs to know of a mesh, as one frozen value."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shampoo_func.blocks import LeafSpec, plan_blocks
from shampoo_func.errors import (
    HyperparameterError,
    ShampooFuncError,
    ShardingError,
    check_choice,
    check_dtype,
)
from shampoo_func.linalg import constant_result
from shampoo_func.sharding import collectives
from shampoo_func.sharding.check import agree, check_started
from shampoo_func.sharding.costs import Cost, cubic_cost
from shampoo_func.sharding.exchange import Exchange, Request
from shampoo_func.sharding.owners import ASSIGNMENTS
from shampoo_func.sharding.plan import ShardPlan, plan_shards
from shampoo_func.sharding.storage import Kind, LeafStorage, store_leaf
from shampoo_func.sharding.transports import Automatic, Transport

__all__ = ["Cut", "Sharding", "sharding"]


@dataclass(frozen=True, slots=True)
class Cut:
    """How parameters are cut, and into what: their paths and specs.

    block_size, merge_dims, merge_to: those of `blocked`.
    """

    paths: tuple[str, ...]
    specs: tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]
    block_size: int | None
    merge_dims: bool
    merge_to: int | None


@dataclass(frozen=True, slots=True)
class Sharding:
    """See `sharding`.

    group: the process group's name. ranks: the global ranks in it. rank: this one's place there.
    """

    mesh: DeviceMesh
    transport: Transport
    assignment: str
    cost: Cost
    communication_dtype: torch.dtype | None
    group: str
    ranks: tuple[int, ...]
    rank: int

    def plan(self, cut: Cut) -> ShardPlan:
        """Plan blocks and owners."""
        return _plan(self, cut)

    def exchange(self, cut: Cut, kinds: tuple[Kind, ...], present: tuple[bool, ...]) -> Exchange:
        """Plan what one call sends.

        Args:
            cut: The parameters.
            kinds: How each tensor is stored.
            present: Which of them are there.

        Raises:
            ShardingError: If a tensor is stored in a way that cannot be served.
        """
        return exchange_of(
            self,
            cut.paths,
            cut.specs,
            cut.block_size,
            cut.merge_dims,
            cut.merge_to,
            kinds,
            present,
        )

    def flat_mesh(self) -> DeviceMesh:
        """Return the mesh in one dimension; every rank must call it.

        Raises:
            ShardingError: If its ranks are not in ascending order.
        """
        flat = self.mesh if self.mesh.ndim == 1 else self.mesh._flatten()
        order = tuple(flat.mesh.flatten().tolist())
        if order != self.ranks:
            raise ShardingError(
                f"the mesh has its ranks in the order {order}, blocks in the order {self.ranks}; "
                "build it by init_device_mesh."
            )
        return flat

    def largest(self, number: int) -> int:
        """Return the largest of the numbers that the ranks have; every rank must call it."""
        device = torch.device(self.mesh.device_type)
        return int(collectives.all_max(torch.tensor(number, device=device), self.group))

    def check(self, cut: Cut, kinds: tuple[Kind, ...], inner: str) -> None:
        """Check, together with all ranks, that they plan the same.

        Args:
            cut: The parameters.
            kinds: How each is stored.
            inner: What is run on the blocks, in words.

        Raises:
            ShardingError: On a rank whose parameters cannot be served.
            PlanMismatchError: On all other ranks then, and on all if plans differ.
        """
        problem: ShampooFuncError | None = None
        fingerprint = 0
        try:
            self.exchange(cut, kinds, (True,) * len(cut.paths))
            dtypes = [(shape, str(dtype)) for shape, dtype, _ in cut.specs]
            placements = [None if kind is None else str(kind[1]) for kind in kinds]
            sizes = (cut.block_size, cut.merge_dims, cut.merge_to)
            settings = (self.transport, self.communication_dtype, sizes)
            fingerprint = self.plan(cut).fingerprint(dtypes, placements, settings, inner)
        except ShampooFuncError as error:
            problem = error
        agree(fingerprint, self.group, torch.device(self.mesh.device_type), problem)


@functools.lru_cache(maxsize=128)
def _plan(own: Sharding, cut: Cut) -> ShardPlan:
    # devices have names that differ from rank to rank; those of stacks must not
    kinds = [
        LeafSpec(shape, dtype, torch.device(device.type)) for shape, dtype, device in cut.specs
    ]
    blocks = plan_blocks(
        kinds,
        block_size=cut.block_size,
        merge_dims=cut.merge_dims,
        merge_to=cut.merge_to,
    )
    return plan_shards(
        blocks,
        cut.paths,
        len(own.ranks),
        assignment=own.assignment,
        cost=own.cost,
        itemsizes=[spec.dtype.itemsize for spec in kinds],
    )


@constant_result  # a traced call is planned once, on the host
def exchange_of(
    own: Sharding,
    paths: tuple[str, ...],
    specs: tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...],
    block_size: int | None,
    merge_dims: bool,
    merge_to: int | None,
    kinds: tuple[Kind, ...],
    present: tuple[bool, ...],
) -> Exchange:
    """Plan what one call sends; the arguments are plain, so that tracing can pass them."""
    return _exchange(own, Cut(paths, specs, block_size, merge_dims, merge_to), kinds, present)


@functools.lru_cache(maxsize=128)
def _exchange(
    own: Sharding, cut: Cut, kinds: tuple[Kind, ...], present: tuple[bool, ...]
) -> Exchange:
    plan = _plan(own, cut)
    storages = tuple(
        _stored(own, name, parameter.shape, parameter.merged, kind)
        for name, parameter, kind in zip(cut.paths, plan.blocks.parameters, kinds, strict=True)
    )
    request = Request(
        plan,
        storages,
        present,
        tuple(dtype for _, dtype, _ in cut.specs),
        own.rank,
        own.group,
        own.communication_dtype,
        cut.block_size,
    )
    return own.transport.plan(request)


def _stored(
    own: Sharding, name: str, shape: tuple[int, ...], merged: tuple[int, ...], kind: Kind
) -> LeafStorage:
    try:
        return store_leaf(shape, merged, kind, own.ranks, own.mesh)
    except ShardingError as error:
        raise ShardingError(f"parameter {name!r} {error}") from None


def sharding(
    mesh: DeviceMesh,
    *,
    transport: Transport | None = None,
    assignment: str = "bucket_lpt",
    cost: Cost | None = None,
    communication_dtype: torch.dtype | None = None,
) -> Sharding:
    """Describe how blocks are shared; every rank of the mesh must call it.

    Args:
        mesh: The ranks that share the blocks: all of its ranks, whatever its dimensions.
        transport: How blocks travel; the best for the storage if not given.
        assignment: How owners are chosen, "bucket_lpt", "lpt" or "chunk".
        cost: What is balanced; `cubic_cost()` if not given.
        communication_dtype: In which values are sent; their own if not given.

    Raises:
        HyperparameterError: If an argument is of the wrong kind.
        ShardingError: If this rank is not in the mesh.
    """
    collectives.register()
    if not isinstance(mesh, DeviceMesh):
        raise HyperparameterError(
            f"mesh must be a DeviceMesh (torch.distributed.device_mesh.init_device_mesh), got "
            f"{mesh!r}."
        )
    chosen = Automatic() if transport is None else transport
    if not isinstance(chosen, Transport):
        raise HyperparameterError(
            f"transport must be None or a transport such as all_to_all(), got {transport!r}."
        )
    price = cubic_cost() if cost is None else cost
    if not isinstance(price, Cost):
        raise HyperparameterError(f"cost must be a cost such as cubic_cost(), got {cost!r}.")
    check_choice("assignment", assignment, ASSIGNMENTS)
    check_dtype("communication_dtype", communication_dtype)
    check_started()
    if mesh.get_coordinate() is None:
        raise ShardingError(
            f"rank {dist.get_rank()} is not in {mesh!r}; build the optimizer on its ranks only, or "
            "give it a mesh with this rank."
        )
    group = _group_of(mesh)
    ranks = tuple(dist.get_process_group_ranks(group))
    return Sharding(
        mesh,
        chosen,
        assignment,
        price,
        communication_dtype,
        group.group_name,
        ranks,
        ranks.index(dist.get_rank()),
    )


def _group_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Return the group of all ranks of a mesh; one that must be made is made by all, here."""
    if mesh.ndim == 1:
        return mesh.get_group()
    world = dist.group.WORLD
    if world is not None and mesh.size() == world.size():
        return world
    return mesh._flatten().get_group()
