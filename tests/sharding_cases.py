"""What the ranks of a pool do in `test_sharding.py`: functions of `(rank, world, ...)`."""

from __future__ import annotations

import copy
import functools
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from compiling import fresh_compiler, graph_count, whole_graph
from torch._dynamo import lookup_backend
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

import shampoo_func as sf
from shampoo_func import tree
from shampoo_func.sharding import CountCollectives

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


def storage_of(name: str, world: int) -> tuple[tuple[int, ...], list[Placement], list[Placement]]:
    """Return a storage; FSDP2's strides are as many as there are ranks in the other dimension."""
    if name == "strided":
        placements: list[Placement] = [_StridedShard(0, split_factor=world // 2), Shard(0)]
        return (2, -1), placements, placements
    return STORAGES[name]


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
    # objects of its own, as every parameter of an FSDP2 module has: dynamo guards shared ones
    placements = copy.deepcopy(fitting(placements, whole.ndim))
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


@functools.lru_cache(maxsize=8)  # the same for every storage
def alone(
    make: Callable[[int], sf.Transformation],
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    steps: int,
    block_size: int,
) -> Params:
    """Return the parameters of one process after some steps of `compare`."""
    grads = [random_tree(dict(shapes), 1 + step) for step in range(steps)]
    return train(make(block_size), random_tree(dict(shapes), 0), list(grads))[0]


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
    shape, own, grad = storage_of(storage, world)
    mesh = mesh_of(shape, world)
    params = random_tree(shapes, 0)
    grads = [random_tree(shapes, 1 + step) for step in range(steps)]
    worst = []
    for make in (grafted, elementwise):
        wanted = alone(make, tuple(shapes.items()), steps, block_size)
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


def compare_masked(rank: int, world: int, storage: str, options: dict[str, Any]) -> float:
    """As `compare`, with gradients that are None now and then."""
    shape, own, grad = STORAGES[storage]
    mesh = mesh_of(shape, world)
    params = random_tree(SHAPES, 0)
    grads: list[dict[str, Any]] = [random_tree(SHAPES, 1 + step) for step in range(6)]
    for step, one in enumerate(grads):
        for index, name in enumerate(sorted(SHAPES)):
            if (step + index) % 3 == 0:
                one[name] = None
    wanted, _ = train(grafted(), params, grads)
    found, _ = train(
        grafted(mesh=mesh, **options),
        {name: stored(leaf, mesh, own) for name, leaf in params.items()},
        [
            {name: None if leaf is None else stored(leaf, mesh, grad) for name, leaf in one.items()}
            for one in grads
        ],
    )
    return difference(found, wanted, mesh, own)


def compare_mixed(rank: int, world: int, options: dict[str, Any]) -> float:
    """As `compare`, elementwise, with a storage and a dtype of its own for every parameter."""
    mesh = mesh_of((-1,), world)
    ways: list[list[Placement]] = [[Shard(0)], [], [Replicate()], [Shard(1)], [Shard(0)], []]
    kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float32]
    names = sorted(SHAPES)
    storage = dict(zip(names, ways, strict=True))
    dtypes = dict(zip(names, [*kinds, torch.bfloat16], strict=True))
    params = random_tree(SHAPES, 0, dtypes)
    grads = [random_tree(SHAPES, 1 + step, dtypes) for step in range(4)]
    wanted, _ = train(elementwise(), params, list(grads))
    found, _ = train(
        elementwise(mesh=mesh, **options),
        {name: stored(leaf, mesh, storage[name]) for name, leaf in params.items()},
        [{name: stored(leaf, mesh, storage[name]) for name, leaf in g.items()} for g in grads],
    )
    return max(
        difference({name: found[name]}, {name: wanted[name]}, mesh, storage[name]) for name in names
    )


def communicate_in(rank: int, world: int, storage: str, dtype: torch.dtype) -> tuple[float, float]:
    """Return how far values sent in a narrow dtype are off, and how far ranks are apart."""
    shape, own, grad = STORAGES[storage]
    mesh = mesh_of(shape, world)
    params = random_tree(SHAPES, 0)
    grads = [random_tree(SHAPES, 1 + step) for step in range(3)]
    wanted, _ = train(elementwise(), params, list(grads))
    found, _ = train(
        elementwise(mesh=mesh, communication_dtype=dtype),
        {name: stored(leaf, mesh, own) for name, leaf in params.items()},
        [{name: stored(leaf, mesh, grad) for name, leaf in one.items()} for one in grads],
    )
    apart = 0.0
    if not any(isinstance(placement, Shard) for placement in own):
        for name in sorted(found):
            leaf = found[name]
            mine = leaf.to_local() if isinstance(leaf, DTensor) else leaf
            high, low = mine.clone(), mine.clone()
            dist.all_reduce(high, dist.ReduceOp.MAX)
            dist.all_reduce(low, dist.ReduceOp.MIN)
            apart = max(apart, (high - low).abs().max().item())
    return difference(found, wanted, mesh, own), apart


def share_in_groups(rank: int, world: int) -> tuple[float, int, int]:
    """Share blocks within groups of two: the error, the blocks here, and of all."""
    mesh = mesh_of((2, -1), world, "replica", "blocks")
    params = random_tree(SHAPES, 0)
    grads = [random_tree(SHAPES, 1 + step) for step in range(4)]
    wanted, whole = train(elementwise(), params, list(grads))
    found, state = train(elementwise(mesh=mesh["blocks"]), params, list(grads))
    return difference(found, wanted, mesh, []), held_blocks(state), held_blocks(whole)


def stay_local(rank: int, world: int, exact: bool, aligned: bool) -> float:
    """Blocks of local shards, without communication: the error against one process."""
    mesh = mesh_of((-1,), world)
    rows = 4 * world if aligned else 4 * world + 1
    shapes: dict[str, tuple[int, ...]] = {"w": (rows, 6), "b": (4 * world,), "whole": (3, 3)}
    params = random_tree(shapes, 0)
    grads = [random_tree(shapes, 1 + step) for step in range(6)]
    ways: dict[str, list[Placement]] = {"w": [Shard(0)], "b": [Shard(0)], "whole": [Replicate()]}
    wanted, _ = train(grafted(), params, list(grads))
    with CountCollectives() as counted:
        tx = grafted(mesh=mesh, transport=sf.shard_local(exact=exact))
        own = {name: stored(leaf, mesh, ways[name]) for name, leaf in params.items()}
        state = tx.init(own)
        before = counted.calls
        for grad in grads:
            local = {name: stored(leaf, mesh, ways[name]) for name, leaf in grad.items()}
            updates, state = tx.update(local, state, own)
            own = sf.apply_updates(own, updates)
        assert counted.calls == before, "shard_local has called a collective"
    return max(
        difference({name: own[name]}, {name: wanted[name]}, mesh, ways[name]) for name in shapes
    )


def count_sent(
    rank: int, world: int, storage: str, shapes: dict[str, tuple[int, ...]], block_size: int
) -> tuple[int, int]:
    """Return how many elements one update sends from this rank, and in how many collectives."""
    shape, own, grad = STORAGES[storage]
    mesh = mesh_of(shape, world)
    params = {k: stored(v, mesh, own) for k, v in random_tree(shapes, 0).items()}
    grads = {k: stored(v, mesh, grad) for k, v in random_tree(shapes, 1).items()}
    tx = elementwise(block_size, mesh=mesh)
    state = tx.init(params)
    with CountCollectives() as counted:
        tx.update(grads, state, params)
    return counted.sent, counted.calls


def misuse(rank: int, world: int, kind: str) -> str:
    """Do something wrong on one rank or on all."""
    mesh = mesh_of((-1,), world)
    params: dict[str, Any] = random_tree(SHAPES, 0)
    size = 4
    if kind == "block_size":
        size += rank == 0
    elif kind == "order" and rank == 0:
        params = OrderedDict(reversed(params.items()))
    elif kind == "order":
        params = OrderedDict(params)
    elif kind == "names":
        params[f"own{rank}"] = torch.ones(2, dtype=torch.float64)
    elif kind == "shape":
        params["row"] = torch.ones(1, 9 + rank, dtype=torch.float64)
    elif kind == "dtype" and rank == 0:
        params["row"] = params["row"].float()
    elif kind == "transport":
        return str(
            elementwise(mesh=mesh, transport=(sf.all_to_all(), sf.all_gather())[rank % 2]).init(
                params
            )
        )
    elif kind == "placement":
        params["row"] = DTensor.from_local(
            torch.ones(1, 9), mesh, [Partial("max") if rank == 0 else Replicate()], run_check=False
        )
    elif kind == "mesh":  # stored on two ranks by two, blocks shared by one line of them
        whole = mesh_of((2, -1), world)
        params["embedding"] = stored(params["embedding"], whole, [Shard(0), Shard(1)])
        return str(elementwise(mesh=whole["b"]).init(params))
    elif kind == "gather_of_shards":
        params["embedding"] = stored(params["embedding"], mesh, [Shard(0)])
        return str(elementwise(mesh=mesh, transport=sf.all_gather()).init(params))
    return str(elementwise(size, mesh=mesh).init(params))


def compiled(rank: int, world: int, storage: str) -> tuple[float, int]:
    """Return how far a compiled step is from the eager one, and how many graphs it took."""
    shape, own, grad = STORAGES[storage]
    mesh = mesh_of(shape, world)
    shapes: dict[str, tuple[int, ...]] = {"v": (5, 4), "w": (10, 4)}
    params = {k: stored(v, mesh, own) for k, v in random_tree(shapes, 0).items()}
    tx = grafted(5, mesh=mesh)
    eager = quick = params
    state = after = tx.init(params)
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return lookup_backend("aot_eager")(module, inputs)

    step = torch.compile(tx.update, fullgraph=True, backend=backend)
    for number in range(6):
        one = {k: stored(v, mesh, grad) for k, v in random_tree(shapes, 1 + number).items()}
        refresh = number % 2 == 1
        updates, state = tx.update(one, state, eager, refresh=refresh)
        eager = sf.apply_updates(eager, updates)
        updates, after = step(one, after, quick, refresh=refresh)
        quick = sf.apply_updates(quick, updates)
    locals_of = [
        (a.to_local(), b.to_local())
        if isinstance(a, DTensor) and isinstance(b, DTensor)
        else (a, b)
        for a, b in zip(eager.values(), quick.values(), strict=True)
    ]
    return max(_apart(a, b) for a, b in locals_of), len(graphs)


def compiled_and_donated(rank: int, world: int) -> tuple[float, int]:
    """Return how far Inductor's donated step is from the eager one, and how many graphs it took."""
    mesh = mesh_of((-1,), world)
    shapes: dict[str, tuple[int, ...]] = {"w": (8, 4)}
    placements: list[Placement] = [Shard(0)]
    tx = grafted(mesh=mesh)

    def step(params: Any, state: Any, grads: Any, refresh: bool) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params, refresh=refresh)
        return sf.apply_updates(params, updates), state

    params = {k: stored(v, mesh, placements) for k, v in random_tree(shapes, 0).items()}
    state = tx.init(params)
    own: Any = {k: stored(v.clone(), mesh, placements) for k, v in random_tree(shapes, 0).items()}
    held = tx.init(own)
    addresses = [_local(leaf).data_ptr() for leaf in tree.leaves((own, held))]
    with fresh_compiler() as counter:
        quick = whole_graph(sf.donate(step), counter)
        for number in range(1, 5):
            grads = {k: stored(v, mesh, placements) for k, v in random_tree(shapes, number).items()}
            params, state = step(params, state, grads, number % 2 == 0)
            own, held = quick(own, held, grads, number % 2 == 0)
        graphs = graph_count(quick)
    assert addresses == [_local(leaf).data_ptr() for leaf in tree.leaves((own, held))]
    pairs = zip(tree.leaves((own, held)), tree.leaves((params, state)), strict=True)
    return max(_apart(_local(a).double(), _local(b).double()) for a, b in pairs), graphs


def _apart(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() if a.numel() else 0.0


def as_dtensors(rank: int, world: int, storage: str, transport: Any = None) -> bool:
    """Whether a state as DTensors has the rows of one process, and comes back as it was."""
    shape, own, grad = STORAGES[storage]
    mesh = mesh_of(shape, world)
    tx = grafted(mesh=mesh, transport=transport)
    params = {k: stored(v, mesh, own) for k, v in random_tree(SHAPES, 0).items()}
    grads = [{k: stored(v, mesh, grad) for k, v in random_tree(SHAPES, 1).items()}]
    _, state = train(tx, params, grads)
    _, alone = train(grafted(), random_tree(SHAPES, 0), [random_tree(SHAPES, 1)])
    spread = sf.state_as_dtensors(tx, state, params)
    good = True
    stage = next(iter(alone))
    for name, stack in alone[stage].items():
        moments = spread[stage][name]["precondition"].preconditioner.magnitude.second_moment
        assert isinstance(moments, DTensor)
        whole = moments.full_tensor().flatten(1)
        rows = sorted(row.tolist() for row in whole if row.any())
        wanted = stack["precondition"].preconditioner.magnitude.second_moment.flatten(1)
        good &= rows == sorted(row.tolist() for row in wanted)
    back = sf.state_from_dtensors(tx, spread, params)
    pairs = zip(tree.leaves(back), tree.leaves(state), strict=True)
    return good and all(torch.equal(_local(a), _local(b)) for a, b in pairs)


def batched(rank: int, world: int) -> str:
    """Call a sharded transformation under vmap."""
    mesh = mesh_of((-1,), world)
    tx = elementwise(mesh=mesh)
    params = {"w": torch.ones(4, 4)}
    state = tx.init(params)
    many = {"w": torch.ones(3, 4, 4)}
    return str(torch.func.vmap(lambda grads: tx.update(grads, state)[0])(many))


def named(rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the named state of this rank, and that of one process."""
    mesh = mesh_of((-1,), world)
    params = random_tree(SHAPES, 0)
    grads = [random_tree(SHAPES, 1 + step) for step in range(3)]
    _, whole = train(elementwise(), params, list(grads))
    tx = elementwise(mesh=mesh)
    _, state = train(tx, params, list(grads))
    own, all_of_it = (
        sf.to_state_dict(tx, state, params),
        sf.to_state_dict(elementwise(), whole, params),
    )
    again = sf.from_state_dict(tx, params, own)
    for a, b in zip(tree.leaves(again), tree.leaves(state), strict=True):
        assert torch.equal(a, b)
    return _arrays(own), _arrays(all_of_it)


def _arrays(named: dict[str, Tensor]) -> dict[str, Any]:
    return {key: value.tolist() for key, value in named.items() if key.startswith("state/")}


def fully_sharded(rank: int, world: int, tensor_parallel: bool) -> float:
    """Train a real FSDP2 module (and tensor parallel), and compare with one process."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 5))
    model = model.double()
    twin = copy.deepcopy(model)
    x = torch.randn(8, 6, dtype=torch.float64)
    if tensor_parallel:
        mesh = mesh_of((2, -1), world, "dp", "tp")
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])
    else:
        mesh = mesh_of((-1,), world)
        fully_shard(model, mesh=mesh)
    tx = grafted()
    states: list[Any] = [None, None]
    txs = [sf.sharded(tx, mesh), tx]
    for _ in range(4):
        for index, net in enumerate((model, twin)):
            net(x).square().mean().backward()
            params = {k: p.detach() for k, p in net.named_parameters()}
            grads = {k: p.grad for k, p in net.named_parameters()}
            if states[index] is None:
                states[index] = txs[index].init(params)
            updates, states[index] = txs[index].update(grads, states[index], params)
            with torch.no_grad():
                for key, param in net.named_parameters():
                    param.add_(updates[key])
            net.zero_grad()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return max(_apart(own.full_tensor(), other) for own, other in pairs)  # type: ignore[attr-defined]


def lose_a_peer(rank: int, world: int, storage: str, how: str) -> tuple[str, float, bool]:
    """Lose the last rank in the middle of a step: the error, the wait, whether all is intact."""
    shape, own, grad = STORAGES[storage]
    mesh = mesh_of(shape, world)
    tx = grafted(mesh=mesh)
    params = {k: stored(v, mesh, own) for k, v in random_tree(SHAPES, 0).items()}
    grads = {k: stored(v, mesh, grad) for k, v in random_tree(SHAPES, 1).items()}
    state = tx.init(params)
    start = time.perf_counter()
    before = sf.to_state_dict(tx, state, params)
    try:
        for step in range(4):
            if step == 1 and rank == world - 1:
                if how == "ends":
                    os._exit(1)
                time.sleep(60)  # hangs for longer than the group has patience
            _, state = tx.update(grads, state, params)
            before, start = sf.to_state_dict(tx, state, params), time.perf_counter()
    except sf.ShampooFuncError as error:
        waited = time.perf_counter() - start
        after = sf.to_state_dict(tx, state, params)
        same = all(torch.equal(_local(after[key]), _local(value)) for key, value in before.items())
        return type(error).__name__, waited, same
    return "", 0.0, False


def _local(leaf: Tensor) -> Tensor:
    return leaf.to_local() if isinstance(leaf, DTensor) else leaf


def save_after(rank: int, world: int, storage: str, folder: str, steps: int) -> None:
    """Train for some steps and save parameters and state with torch.distributed.checkpoint."""
    shape, own, grad = STORAGES[storage]
    mesh = mesh_of(shape, world)
    tx = grafted(mesh=mesh)
    params, state = train(
        tx,
        {name: stored(leaf, mesh, own) for name, leaf in random_tree(SHAPES, 0).items()},
        [
            {k: stored(v, mesh, grad) for k, v in random_tree(SHAPES, 1 + step).items()}
            for step in range(steps)
        ],
    )
    save({**sf.to_state_dict(tx, state, params), **params}, checkpoint_id=folder)


def resume(
    rank: int, world: int, storage: str, folder: str, first: int, steps: int, alone: bool = False
) -> float:
    """Load what `save_after` has saved, train on, and compare with an uninterrupted run."""
    shape, own, grad = STORAGES[storage]
    wanted, _ = train(
        grafted(), random_tree(SHAPES, 0), [random_tree(SHAPES, 1 + i) for i in range(steps)]
    )
    mesh = None if alone else mesh_of(shape, world)
    tx = grafted() if mesh is None else grafted(mesh=mesh)

    def place(tree: Params, placements: list[Placement]) -> Params:
        return tree if mesh is None else {k: stored(v, mesh, placements) for k, v in tree.items()}

    params = place({k: torch.zeros_like(v) for k, v in random_tree(SHAPES, 0).items()}, own)
    saved = {**sf.to_state_dict(tx, tx.init(params), params), **params}
    load(saved, checkpoint_id=folder, no_dist=alone)
    params = {name: saved[name] for name in params}
    state = sf.from_state_dict(tx, params, saved)
    for step in range(first, steps):
        updates, state = tx.update(place(random_tree(SHAPES, 1 + step), grad), state, params)
        params = sf.apply_updates(params, updates)
    if mesh is None:
        return max(_apart(params[name], wanted[name]) for name in wanted)
    return difference(params, wanted, mesh, own)


def clip_first(rank: int, world: int, storage: str) -> float:
    """Clip by the global norm in front of sharded blocks, momentum and decay behind."""
    shape, own, _ = STORAGES[storage]
    mesh = mesh_of(shape, world)
    # DTensor itself replicates a dimension of size 1 when it broadcasts, so none here is sharded
    shapes = {name: size for name, size in SHAPES.items() if 1 not in size}
    whole: list[Placement] = [Replicate() for _ in range(mesh.ndim)]
    ways = {name: own if size else whole for name, size in shapes.items()}
    ways["gain"] = []
    params = random_tree(shapes, 0)
    grads = [random_tree(shapes, 1 + step) for step in range(4)]

    def make(**options: Any) -> sf.Transformation:
        return sf.chain(
            sf.clip_by_global_norm(1.0),
            elementwise(**options),
            sf.ema(0.9),
            sf.add_decayed_weights(0.1),
            sf.scale_by_learning_rate(0.1),
        )

    wanted, _ = train(make(), params, list(grads))
    found, _ = train(
        make(mesh=mesh),
        {name: stored(leaf, mesh, ways[name]) for name, leaf in params.items()},
        [{name: stored(leaf, mesh, ways[name]) for name, leaf in one.items()} for one in grads],
    )
    return max(
        difference({name: found[name]}, {name: wanted[name]}, mesh, ways[name]) for name in shapes
    )
