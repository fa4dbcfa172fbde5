"""What the ranks of a pool do in `test_sharding_refresh.py`: functions of `(rank, world, ...)`."""

from __future__ import annotations

from typing import Any

import sharding_cases as cases
import torch
import torch.distributed as dist
from compiling import graph_count
from torch import Tensor
from torch.distributed.tensor import Shard

import shampoo_func as sf
from shampoo_func import tree
from shampoo_func.sharding import CountCollectives

METHODS: dict[str, Any] = {
    "kronecker": lambda: sf.kronecker(0.9, root=sf.eigh_root(1e-3)),
    "grafted": lambda: sf.graft(
        direction=sf.kronecker(0.9, root=sf.eigh_root(1e-3)), magnitude=sf.second_moment(0.9)
    ),
    "iterated": lambda: sf.kronecker(0.9, root=sf.newton_root(1e-3)),
    "eigendecomposed": lambda: sf.eigendecomposed(0.9),
    "in_eigenbasis": lambda: sf.in_eigenbasis(sf.second_moment(0.9), beta2=0.9),
    "quantized": lambda: sf.quantized(
        sf.kronecker(0.9, root=sf.eigh_root(1e-3)), sf.symmetric_packing()
    ),
}


def shared(method: str, **options: Any) -> sf.Transformation:
    """A method on blocks with momentum behind; `policy` is that of the refreshes."""
    policy = options.pop("policy", None) or sf.every(2)
    return sf.chain(
        sf.blocked(
            sf.precondition(METHODS[method](), filter=sf.ema(0.9), policy=policy),
            block_size=4,
            **options,
        ),
        sf.trace(0.9),
        sf.scale_by_learning_rate(0.05),
    )


def compare(
    rank: int, world: int, storage: str, method: str, static: bool, missing: bool, policy: Any
) -> tuple[float, float]:
    """Return how far the parameters are from one process, and how far states are apart."""
    shape, own, grad = cases.STORAGES[storage]
    mesh = cases.mesh_of(shape, world)
    alone, tx = shared(method, policy=policy), on_mesh(method, mesh, policy=policy)
    wanted = cases.random_tree(cases.SHAPES, 0)
    found: Any = {name: cases.stored(leaf, mesh, own) for name, leaf in wanted.items()}
    states = [alone.init(wanted), tx.init(found)]
    for step in range(1, 7):
        grads: Any = cases.random_tree(cases.SHAPES, step)
        if missing and step % 2:
            grads["embedding"] = grads["gain"] = None
        due = {"refresh": sf.refresh_due(tx, step)} if static else {}
        updates, states[0] = alone.update(grads, states[0], wanted, **due)
        wanted = sf.apply_updates(wanted, updates)
        local = {
            name: None if leaf is None else cases.stored(leaf, mesh, grad)
            for name, leaf in grads.items()
        }
        updates, states[1] = tx.update(local, states[1], found, **due)
        found = sf.apply_updates(found, updates)
    blocks = tree.leaves(states[1]["precondition"])
    return cases.difference(found, wanted, mesh, own), max(map(spread, blocks))


def on_mesh(method: str, mesh: Any, **options: Any) -> sf.Transformation:
    return shared(method, mesh=mesh, transport=sf.refresh_sharded(), **options)


def spread(leaf: Tensor) -> float:
    """The largest difference of a tensor between ranks."""
    high = leaf.double().clone()
    low = high.clone()
    dist.all_reduce(high, dist.ReduceOp.MAX)
    dist.all_reduce(low, dist.ReduceOp.MIN)
    return (high - low).abs().max().item() if leaf.numel() else 0.0


def count_sent(rank: int, world: int) -> tuple[list[int], list[int], int]:
    """Bytes and collectives of a plain step and of a refresh, and the bytes of all roots."""
    mesh = cases.mesh_of((-1,), world)
    params: Any = {f"w{index}": torch.ones(32, 32) for index in range(8)}
    tx = sf.blocked(
        sf.precondition(sf.kronecker(0.9)), block_size=32, mesh=mesh, transport=sf.refresh_sharded()
    )
    state = tx.init(params)
    sent, calls = [], []
    for refresh in (False, True):
        with CountCollectives() as counted:
            _, state = tx.update(params, state, params, refresh=refresh)
        sent.append(counted.sent)
        calls.append(counted.calls)
    (stack,) = state.values()
    return sent, calls, sum(root.nbytes for root in stack.preconditioner.roots)


def refuse(rank: int, world: int, kind: str) -> str:
    """Ask for what it cannot do."""
    mesh = cases.mesh_of((-1,), world)
    params: Any = cases.random_tree(cases.SHAPES, 0)
    if kind == "storage":
        placements: Any = [Shard(0)]
        params["embedding"] = cases.stored(params["embedding"], mesh, placements)
        return str(on_mesh("kronecker", mesh).init(params))
    if kind == "staggered":
        return str(on_mesh("kronecker", mesh, policy=sf.staggered(2)).init(params))
    if kind == "dtype":
        tx = on_mesh("kronecker", mesh, communication_dtype=torch.bfloat16)
        return str(tx.init(params))
    return str(cases.elementwise(mesh=mesh, transport=sf.refresh_sharded()).init(params))


def compiled(rank: int, world: int, static: bool) -> tuple[float, int]:
    """Return how far a compiled step is from the eager one, and how many graphs it took."""
    mesh = cases.mesh_of((-1,), world)
    params = cases.random_tree({"w": (8, 4)}, 0)
    tx = on_mesh("kronecker", mesh)
    torch.compiler.reset()
    step = torch.compile(tx.update, fullgraph=True, backend="aot_eager")
    eager = quick = params
    state = after = tx.init(params)
    for number in range(1, 5):
        one = cases.random_tree({"w": (8, 4)}, number)
        due = {"refresh": sf.refresh_due(tx, number)} if static else {}
        updates, state = tx.update(one, state, eager, **due)
        eager = sf.apply_updates(eager, updates)
        updates, after = step(one, after, quick, **due)
        quick = sf.apply_updates(quick, updates)
    return (eager["w"] - quick["w"]).abs().max().item(), graph_count(step)


def named(rank: int, world: int) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Return the named state of this rank and of one process, and what is reported of it."""
    mesh = cases.mesh_of((-1,), world)
    params = cases.random_tree(cases.SHAPES, 0)
    grads: Any = [cases.random_tree(cases.SHAPES, 1 + step) for step in range(3)]
    alone, tx = shared("kronecker"), on_mesh("kronecker", mesh)
    _, whole = cases.train(alone, params, grads)
    _, state = cases.train(tx, params, grads)
    report = sf.state_report(tx, params)
    saved = sf.to_state_dict(tx, state, params)
    again = sf.from_state_dict(tx, params, saved)
    for a, b in zip(tree.leaves(again), tree.leaves(state), strict=True):
        assert torch.equal(a, b)
    held = sum(leaf.nbytes for leaf in tree.leaves(state))
    return saved, sf.to_state_dict(alone, whole, params), (report.bytes, held)
