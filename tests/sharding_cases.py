"""What the ranks of a pool do in `test_sharding.py`: functions of `(rank, world, ...)`."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import shampoo_func as sf
from shampoo_func import tree

Tensor = torch.Tensor
Params = dict[str, Tensor]

SHAPES: dict[str, tuple[int, ...]] = {
    "conv": (6, 3, 3, 3),
    "embedding": (11, 7),
    "gain": (5,),
    "row": (1, 9),
    "scale": (),
    "wide": (3, 10),
}

# mesh shape as a function of the world size, placements of parameters and of gradients
STORAGES: dict[str, tuple[tuple[int, ...], list[Placement], list[Placement]]] = {
    "plain": ((-1,), [], []),
    "replicated": ((-1,), [Replicate()], [Replicate()]),
    "partial": ((-1,), [Replicate()], [Partial()]),
    "partial_average": ((-1,), [Replicate()], [Partial("avg")]),
    "shard0": ((-1,), [Shard(0)], [Shard(0)]),
    "shard1": ((-1,), [Shard(1)], [Shard(1)]),
    "hsdp": ((2, -1), [Replicate(), Shard(0)], [Replicate(), Shard(0)]),
    "hsdp_partial": ((2, -1), [Replicate(), Shard(0)], [Partial(), Shard(0)]),
    "two_dims": ((2, -1), [Shard(0), Shard(1)], [Shard(0), Shard(1)]),
    "strided": (
        (2, -1),
        [_StridedShard(0, split_factor=2), Shard(0)],
        [_StridedShard(0, split_factor=2), Shard(0)],
    ),
    "left_to_right": ((2, -1), [Shard(0), Shard(0)], [Shard(0), Shard(0)]),
}

_MESHES: dict[tuple[tuple[int, ...], tuple[str, ...]], DeviceMesh] = {}


def mesh_of(shape: tuple[int, ...], world: int, *names: str) -> DeviceMesh:
    """Return a mesh of all ranks, one and the same for all tasks; -1 is what remains."""
    known = -1
    for size in shape:
        known *= size
    whole = tuple(world // abs(known) if size == -1 else size for size in shape)
    names = names or ("a", "b", "c")[: len(whole)]
    if (whole, names) not in _MESHES:
        _MESHES[whole, names] = init_device_mesh("cpu", whole, mesh_dim_names=names)
    return _MESHES[whole, names]


def local_of(whole: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> Tensor:
    """Return this rank's part of a tensor, by torch.chunk; strided dimensions come last."""
    place = mesh.get_coordinate()
    assert place is not None
    steps = sorted(
        range(mesh.ndim), key=lambda dim: (isinstance(placements[dim], _StridedShard), dim)
    )
    part = whole
    for dim in steps:
        own = placements[dim]
        if isinstance(own, Shard | _StridedShard):
            size = part.shape[own.dim]
            step = -(-size // mesh.shape[dim])
            start = min(place[dim] * step, size)
            part = part.narrow(own.dim, start, min(step, size - start))
    return part.contiguous()


def fitting(placements: list[Placement], order: int) -> list[Placement]:
    """Return placements that a tensor of fewer dimensions can have."""
    found: list[Placement] = []
    for own in placements:
        if isinstance(own, Shard | _StridedShard) and own.dim >= order:
            known = [seen for seen in found if isinstance(seen, Shard)]
            found.append(Shard(0) if order and not known else Replicate())
        else:
            found.append(own)
    return found


def stored(whole: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> Tensor:
    """Return a tensor stored with some placements; none at all is a plain tensor."""
    if not placements:
        return whole
    placements = fitting(placements, whole.ndim)
    local = local_of(whole, mesh, placements)
    place = mesh.get_coordinate()
    assert place is not None
    for dim, own in enumerate(placements):
        if isinstance(own, Partial):  # summands that differ; small integers keep sums exact
            count = mesh.shape[dim]
            offset = place[dim] - (count - 1) / 2
            share = 1.0 if own.reduce_op == "avg" else 1 / count
            local = local * share + offset
    return DTensor.from_local(
        local,
        mesh,
        placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.contiguous().stride(),
    )


def random_tree(shapes: dict[str, tuple[int, ...]], seed: int, dtypes: Any = None) -> Params:
    """Return a tree that is the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(
            dtypes[name] if dtypes else torch.float64
        )
        for name, shape in shapes.items()
    }


def grafted(block_size: int = 4, **options: Any) -> sf.Transformation:
    """Grafted Shampoo with decay on the blocks and momentum outside."""
    return sf.chain(
        sf.blocked(
            sf.chain(
                sf.precondition(
                    sf.graft(
                        direction=sf.kronecker(0.9, root=sf.eigh_root(1e-3)),
                        magnitude=sf.second_moment(0.9),
                    ),
                    filter=sf.ema(0.9),
                    refresh_every=2,
                ),
                sf.add_decayed_weights(0.1),
            ),
            block_size=block_size,
            **options,
        ),
        sf.trace(0.9),
        sf.scale_by_learning_rate(0.05),
    )


def elementwise(block_size: int = 4, **options: Any) -> sf.Transformation:
    """A stage that does nothing that could round differently: it shows the routes alone."""
    return sf.blocked(sf.trace(0.5), block_size=block_size, **options)


def train(tx: sf.Transformation, params: Params, grads: list[dict[str, Any]]) -> tuple[Params, Any]:
    """Return the parameters and the state after a step for each gradient."""
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = sf.apply_updates(params, updates)
    return params, state


def difference(
    found: Params, wanted: Params, mesh: DeviceMesh, placements: list[Placement]
) -> float:
    """Return the largest difference between what is stored here and what should be."""
    worst = 0.0
    for name, whole in wanted.items():
        own = found[name]
        if placements:
            assert isinstance(own, DTensor), name
            kinds = fitting(placements, whole.ndim)
            assert list(own.placements) == kinds, (name, own.placements)
            own, whole = own.to_local(), local_of(whole, mesh, kinds)
        assert own.shape == whole.shape and own.dtype == whole.dtype, name
        if own.numel():
            worst = max(worst, (own.double() - whole.double()).abs().max().item())
    return worst


def compare(
    rank: int,
    world: int,
    storage: str,
    options: dict[str, Any],
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    steps: int = 10,
    block_size: int = 4,
) -> tuple[float, float]:
    """Return how far Shampoo, and a mere route, are from one process after some steps."""
    shape, own, grad = STORAGES[storage]
    mesh = mesh_of(shape, world)
    params = random_tree(shapes, 0)
    grads = [random_tree(shapes, 1 + step) for step in range(steps)]
    worst = []
    for make in (grafted, elementwise):
        wanted, _ = train(make(block_size), params, list(grads))
        found, _ = train(
            make(block_size, mesh=mesh, **options),
            {name: stored(leaf, mesh, own) for name, leaf in params.items()},
            [{name: stored(leaf, mesh, grad) for name, leaf in one.items()} for one in grads],
        )
        worst.append(difference(found, wanted, mesh, own))
    return worst[0], worst[1]


def held_blocks(state: Any) -> int:
    """Return how many blocks a state of `blocked` holds."""
    return sum(tree.leaves(part)[0].shape[0] for part in state.values())
