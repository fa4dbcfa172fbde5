"""Plans of blocks, owners and storages: pure Python, up to 512 ranks, no processes."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.distributed.tensor import Placement, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

import shampoo_func as sf
from benchmarks.shapes import MODELS, Shapes, llama, resnet50
from shampoo_func.blocks import BlockPlan, LeafSpec, plan_blocks
from shampoo_func.errors import HyperparameterError
from shampoo_func.sharding import balance, plan_shards
from shampoo_func.sharding.owners import bucket_lpt, chunk, lpt
from shampoo_func.sharding.storage import _merge, local_indices, local_shape


def blocks_of(shapes: Shapes, size: int) -> BlockPlan:
    specs = [LeafSpec(shape, torch.float32, torch.device("meta")) for shape in shapes.values()]
    return plan_blocks(specs, block_size=size)


@pytest.mark.parametrize("world", [2, 4, 8, 64, 512])
@pytest.mark.parametrize("size", [256, 512, 1024, 2048])
@pytest.mark.parametrize("shapes", [own() for own in MODELS.values()], ids=list(MODELS))
@pytest.mark.parametrize("cost", [sf.cubic_cost(), sf.byte_cost()], ids=str)
def test_balance_is_that_of_lpt(shapes: Shapes, size: int, world: int, cost: sf.Cost) -> None:
    """The largest load is that of LPT + 5%, and every rank has its share of every shape."""
    blocks = blocks_of(shapes, size)
    plan = plan_shards(blocks, list(shapes), world, cost=cost)
    greedy = plan_shards(blocks, list(shapes), world, assignment="lpt", cost=cost)
    assert balance(plan.loads()) <= 1.05 * balance(greedy.loads())
    for name, counts in plan.counts().items():
        assert sum(counts) == dict(blocks.stacks)[name]
        assert min(counts) >= dict(blocks.stacks)[name] // world - 1


def test_planning_7b_for_512_ranks_is_fast() -> None:
    """Under 5 s, from shapes to owners, with 100,000 blocks."""
    shapes = llama()
    start = time.perf_counter()
    plan = plan_shards(blocks_of(shapes, 250), list(shapes), 512)
    plan.fingerprint()
    assert sum(map(len, plan.owners)) > 100_000
    assert time.perf_counter() - start < 5


def test_reporting_7b_for_512_ranks_allocates_nothing() -> None:
    """State bytes per rank from meta tensors, quickly."""
    params: Any = {name: torch.empty(shape, device="meta") for name, shape in llama().items()}
    start = time.perf_counter()
    report = sf.state_report(sf.shampoo(1e-3, block_size=1024), params, 512)
    assert time.perf_counter() - start < 5
    assert len(report.bytes) == 512
    assert report.byte_balance < 1.05
    assert "512 rank(s): 6660 blocks" in str(report)


def test_report_counts_the_bytes_that_are_there() -> None:
    """On one rank, the bytes of the very state."""
    params: Any = {"w": torch.zeros(10, 7), "b": torch.zeros(3)}
    tx = sf.shampoo(0.1, block_size=4, momentum=0.9)
    whole = sum(leaf.nbytes for leaf in sf.tree.leaves(tx.init(params)))
    report = sf.state_report(tx, params)
    assert report.bytes == (whole,)
    shared = sf.state_report(tx, params, 3)
    assert sum(shared.block_bytes) == sum(report.block_bytes)
    assert shared.other_bytes == report.other_bytes > 0


def test_owners_do_not_depend_on_order_or_nesting() -> None:
    """The same parameters in another order: the same owner for every block."""
    shapes: Shapes = resnet50()
    turned: Shapes = dict(reversed(shapes.items()))

    def owners(own: Shapes) -> dict[tuple[str, tuple[int, ...]], int]:
        blocks = blocks_of(own, 200)
        plan = plan_shards(blocks, list(own), 7)
        by_stack = dict(zip(plan.stacks, plan.owners, strict=True))
        return {
            (name, start): by_stack[stack][row]
            for name, parameter in zip(own, blocks.parameters, strict=True)
            for start, _, stack, row in parameter.blocks()
        }

    assert owners(shapes) == owners(turned)


def test_fingerprints_tell_plans_apart() -> None:
    """World, block size, names, shapes, owners: each changes it; nothing else does."""
    shapes: Shapes = {"a": (8, 8), "b": (6, 4)}
    renamed: Shapes = {"a": (8, 8), "c": (6, 4)}
    turned: Shapes = {"a": (8, 8), "b": (4, 6)}
    seen = {
        plan_shards(blocks_of(own, size), list(own), world, assignment=how).fingerprint(extra)
        for own, size, world, how, extra in [
            (shapes, 4, 2, "bucket_lpt", 0),
            (shapes, 4, 2, "bucket_lpt", 1),
            (shapes, 3, 2, "bucket_lpt", 0),
            (shapes, 4, 3, "bucket_lpt", 0),
            (shapes, 4, 2, "lpt", 0),
            (renamed, 4, 2, "bucket_lpt", 0),
            (turned, 4, 2, "bucket_lpt", 0),
            (dict(reversed(shapes.items())), 4, 2, "bucket_lpt", 0),
        ]
    }
    assert len(seen) == 8
    assert all(0 <= own < 2**62 for own in seen)
    again = plan_shards(blocks_of(shapes, 4), list(shapes), 2).fingerprint(0)
    assert again in seen


buckets = st.lists(st.tuples(st.floats(1, 1e6), st.integers(1, 40)), min_size=1, max_size=8)


@given(buckets=buckets, world=st.integers(1, 17))
def test_every_block_has_one_owner(buckets: list[tuple[float, int]], world: int) -> None:
    """All assignments own every block; LPT is within 4/3 of the best."""
    buckets = sorted(buckets, reverse=True)
    for assign in (bucket_lpt, lpt, chunk):
        owners = assign(buckets, world)
        assert [len(own) for own in owners] == [count for _, count in buckets]
        assert all(0 <= rank < world for own in owners for rank in own)
    loads = [0.0] * world
    for (cost, _), own in zip(buckets, lpt(buckets, world), strict=True):
        for rank in own:
            loads[rank] += cost
    total = sum(cost * count for cost, count in buckets)
    best = max(total / world, buckets[0][0])
    assert max(loads) <= best * 2


@pytest.mark.parametrize(
    "options", [{"assignment": "random"}, {"cost": "cubic"}, {"world": 0}], ids=str
)
def test_bad_plans_are_refused(options: dict[str, object]) -> None:
    """Typed errors that say what is allowed."""
    with pytest.raises(HyperparameterError):
        plan_shards(blocks_of({"w": (4, 4)}, 2), ["w"], **{"world": 2, **options})  # type: ignore[arg-type]


placements = st.sampled_from(
    [
        (Shard(0),),
        (Shard(1),),
        (Shard(0), Shard(1)),
        (Shard(0), Shard(0)),
        (_StridedShard(0, split_factor=2), Shard(0)),
        (_StridedShard(1, split_factor=3), Shard(1)),
        (Shard(1), _StridedShard(1, split_factor=2)),
        (Shard(2), Shard(0), Shard(1)),
    ]
)


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    sizes=st.tuples(*[st.integers(1, 4)] * 3),
    placements=placements,
    merge=st.integers(1, 100),
)
def test_index_sets_are_those_of_dtensor(
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    placements: tuple[Placement, ...],
    merge: int,
) -> None:
    """Local shapes are torch's; the merged sets cover every element exactly once."""
    mesh = sizes[: len(placements)]
    merged = sf.blocks.merge_small_dims(shape, merge)
    numbers = torch.arange(math.prod(shape)).reshape(merged)
    seen: Counter[int] = Counter()
    for place in itertools.product(*(range(size) for size in mesh)):
        rows = local_indices(shape, mesh, place, placements)
        local, _ = _compute_local_shape_and_global_offset(shape, mesh, list(place), placements)
        assert tuple(sum(b - a for a, b in own) for own in rows) == tuple(local)
        part = torch.arange(math.prod(shape)).reshape(shape)
        for dim, own in enumerate(rows):
            part = part[_indexed(dim, own)]
        region = _merge(rows, shape, merged)
        assert math.prod(local_shape(region)) == part.numel()
        found = numbers
        for dim, own in enumerate(region):
            found = found[_indexed(dim, own)]
        assert torch.equal(found.flatten(), part.flatten())
        seen.update(part.flatten().tolist())
    assert seen == Counter(range(math.prod(shape)))


def _indexed(dim: int, own: tuple[tuple[int, int], ...]) -> tuple[Any, ...]:
    return (slice(None),) * dim + ([i for a, b in own for i in range(a, b)],)
