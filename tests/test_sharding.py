"""Sharded training equals that of one process: real gloo processes, every storage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import sharding_cases as cases
import torch
import workers
from hypothesis import given, settings

import shampoo_func as sf

ONE_DIM = [name for name, (shape, _, _) in cases.STORAGES.items() if len(shape) == 1]


@pytest.mark.parametrize(
    ("world", "storage"),
    [(2, name) for name in ONE_DIM] + [(4, name) for name in cases.STORAGES],
)
def test_every_storage_gives_the_numbers_of_one_process(world: int, storage: str) -> None:
    """Ten steps, every rank: Shampoo to 1e-9, and the routes alone in every bit."""
    answers = workers.pool(world).run(cases.compare, storage, {})
    assert max(shampoo for shampoo, _ in answers) < 1e-9
    exact = 1e-12 if "partial" in storage else 0.0  # sums over ranks round
    assert max(route for _, route in answers) <= exact


@pytest.mark.slow
def test_every_storage_on_eight_ranks() -> None:
    """The same with more ranks than some stacks have blocks, and than some shards have rows."""
    pool = workers.Pool(8, patience=120.0)
    try:
        for storage in cases.STORAGES:
            answers = pool.run(cases.compare, storage, {}, seconds=300.0)
            assert max(shampoo for shampoo, _ in answers) < 1e-9, storage
            exact = 1e-12 if "partial" in storage else 0.0
            assert max(route for _, route in answers) <= exact, storage
    finally:
        pool.close()


@pytest.mark.parametrize("assignment", ["bucket_lpt", "lpt", "chunk"])
@pytest.mark.parametrize(
    ("storage", "transport"),
    [
        ("plain", sf.all_to_all()),
        ("plain", sf.all_gather()),
        ("partial", sf.all_to_all()),
        ("partial", sf.reduce_scatter()),
        ("shard0", sf.all_to_all()),
    ],
    ids=str,
)
def test_chosen_transports_and_assignments(
    storage: str, transport: sf.Transport, assignment: str
) -> None:
    """The numbers are the same whichever way blocks travel, and whoever owns them."""
    options = {"transport": transport, "assignment": assignment, "cost": sf.byte_cost()}
    answers = workers.pool(2).run(cases.compare, storage, options, cases.SHAPES, 4)
    assert max(max(pair) for pair in answers) < 1e-9


shapes = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=4)


@settings(max_examples=12)
@given(shapes=shapes, storage=st.sampled_from(sorted(cases.STORAGES)), size=st.integers(1, 6))
def test_random_trees_are_routed_bit_for_bit(
    shapes: list[tuple[int, ...]], storage: str, size: int
) -> None:
    """Any shapes, block sizes and storages, four ranks; many shards are empty or uneven."""
    named = {f"p{index}": shape for index, shape in enumerate(shapes)}
    answers = workers.pool(4).run(cases.compare, storage, {}, named, 2, size)
    assert max(shampoo for shampoo, _ in answers) < 1e-9
    assert max(route for _, route in answers) <= (1e-12 if "partial" in storage else 0.0)


@pytest.mark.parametrize(
    ("storage", "transport"),
    [("plain", None), ("shard0", None), ("partial", None), ("partial", sf.all_to_all())],
)
def test_missing_gradients(storage: str, transport: sf.Transport | None) -> None:
    """None on all ranks for some parameters: their blocks stay as they are."""
    options = {"transport": transport}
    assert max(workers.pool(2).run(cases.compare_masked, storage, options)) < 1e-9


@pytest.mark.parametrize("world", [2, 4])
def test_mixed_storages_and_dtypes(world: int) -> None:
    """Every parameter stored in another way, in three dtypes: one buffer for each."""
    assert max(workers.pool(world).run(cases.compare_mixed, {})) == 0.0


@pytest.mark.parametrize("storage", ["plain", "partial", "shard0"])
def test_communication_dtype(storage: str) -> None:
    """Values sent in bfloat16 are off by its rounding, and by the same on every rank."""
    answers = workers.pool(2).run(cases.communicate_in, storage, torch.bfloat16)
    assert all(1e-5 < error < 0.1 for error, _ in answers)
    assert all(apart == 0.0 for _, apart in answers)


def test_groups_share_blocks_within_and_repeat_them_across() -> None:
    """Two groups of two: every group has all blocks, every rank half of them."""
    answers = workers.pool(4).run(cases.share_in_groups)
    assert all(error == 0.0 for error, _, _ in answers)
    held = [own for _, own, _ in answers]
    whole = answers[0][2]
    assert [held[0] + held[1], held[2] + held[3]] == [whole, whole]
    assert max(held) < whole


def test_shard_local_is_exact_where_blocks_are_aligned() -> None:
    """No communication, the same numbers."""
    assert max(workers.pool(2).run(cases.stay_local, True, True)) < 1e-9


def test_shard_local_elsewhere_must_be_asked_for() -> None:
    """Shards that end within a block: refused, or other numbers."""
    refused = workers.pool(2).outcomes(cases.stay_local, True, False)
    assert [own.kind for own in refused] == ["ShardingError"] * 2
    assert "'w'" in refused[0].message
    assert max(workers.pool(2).run(cases.stay_local, False, False)) > 1e-6


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("storage", ["plain", "partial", "shard0", "hsdp", "two_dims"])
def test_bytes_sent_follow_the_formulas(world: int, storage: str) -> None:
    """P (W - 1) / W elements for replicated tensors, P / W (W - 1) / W a way for shards."""
    named = {f"w{index}": (32, 32) for index in range(8)}  # every shard is a part of a block
    total = sum(math.prod(shape) for shape in named.values())
    answers = workers.pool(world).run(cases.count_sent, storage, named, 32)
    share = (world - 1) / world
    shards = world // 2  # of a parameter, in hsdp
    wanted = {
        "plain": total * share,
        "partial": 2 * total * share,
        "shard0": 2 * total / world * share,
        "two_dims": 2 * total / world * share,
        # in from the owner's own replica, out to both
        "hsdp": total / world * (1 - 1 / shards) + total / shards * share,
    }[storage]
    assert sum(own for own, _ in answers) / world == pytest.approx(wanted, rel=0.05)
    whole = storage == "plain" or (shards == 1 and storage == "hsdp")
    assert {count for _, count in answers} == {1 if whole else 2}


@pytest.mark.parametrize(
    "kind", ["block_size", "order", "names", "shape", "dtype", "transport", "placement"]
)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_disagree_get_an_error_each(world: int, kind: str) -> None:
    """A typed error on every rank, at init, and the group still works afterwards."""
    answers = workers.pool(world).outcomes(cases.misuse, kind)
    assert all(isinstance(own, workers.Failure) for own in answers), answers
    kinds = {own.kind for own in answers}
    wanted = {"PlanMismatchError"} | ({"ShardingError"} if kind == "placement" else set())
    assert kinds == wanted
    if kind == "placement":
        assert "'row'" in answers[0].message
    assert max(workers.pool(world).run(cases.compare_mixed, {})) == 0.0


@pytest.mark.parametrize("kind", ["mesh", "gather_of_shards"])
def test_storage_that_cannot_be_served_names_the_parameter(kind: str) -> None:
    """The parameter is not stored by the ranks that share the blocks."""
    answers = workers.pool(4).outcomes(cases.misuse, kind)
    assert {own.kind for own in answers} == {"ShardingError"}
    assert all("'embedding'" in own.message for own in answers)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["partial", "shard0"])
def test_whole_step_compiles_in_two_graphs(storage: str) -> None:
    """Collectives, linear algebra and all, without a break; refresh is static."""
    answers = workers.pool(2).run(cases.compiled, storage)
    assert max(error for error, _ in answers) < 1e-12
    assert {graphs for _, graphs in answers} == {2}


@pytest.mark.slow
def test_whole_step_by_inductor_donated() -> None:
    """Two ranks, DTensors in and out: two graphs, the same numbers, nothing moves in memory."""
    answers = workers.pool(2).run(cases.compiled_and_donated, seconds=400.0)
    assert max(error for error, _ in answers) < 1e-12
    assert {graphs for _, graphs in answers} == {2}


@pytest.mark.parametrize(("world", "storage"), [(2, "plain"), (4, "shard0"), (4, "hsdp")])
def test_states_as_dtensors_are_whole_and_come_back(world: int, storage: str) -> None:
    """Every rank gathers the same rows, those of one process, and its own state back."""
    assert all(workers.pool(world).run(cases.as_dtensors, storage))


def test_states_that_no_rank_owns_are_no_dtensors() -> None:
    """Local blocks have no global tensor."""
    answers = workers.pool(2).outcomes(cases.as_dtensors, "plain", sf.refresh_sharded())
    assert [own.kind for own in answers] == ["ShardingError"] * 2


def test_vmap_is_refused() -> None:
    """Collectives under vmap would return wrong values."""
    answers = workers.pool(2).outcomes(cases.batched)
    assert [own.kind for own in answers] == ["ShardingError"] * 2
    assert "vmap" in answers[0].message


def test_named_states_of_all_ranks_are_that_of_one_process() -> None:
    """Each block's state is under its canonical name on its owner, and nowhere else."""
    answers: list[Any] = workers.pool(4).run(cases.named)
    union: dict[str, Any] = {}
    for own, _ in answers:
        assert not union.keys() & own.keys()
        union |= own
    assert union == answers[0][1]


@pytest.mark.parametrize(("world", "parallel"), [(2, False), (4, True)])
def test_fully_sharded_modules(world: int, parallel: bool) -> None:
    """FSDP2, alone and with tensor parallelism, through backward()."""
    assert max(workers.pool(world).run(cases.fully_sharded, parallel)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "storage", "how"),
    [(2, "plain", "ends"), (2, "partial", "ends"), (4, "shard0", "ends"), (2, "shard0", "hangs")],
)
def test_a_lost_peer_is_a_typed_error_in_time(world: int, storage: str, how: str) -> None:
    """Survivors get PeerError within the timeout and can still save the last step."""
    pool = workers.Pool(world, patience=4.0)
    try:
        answers = pool.outcomes(cases.lose_a_peer, storage, how, seconds=10.0)
        for kind, waited, intact in answers[:-1]:
            assert kind == "PeerError"
            assert waited < 8.0
            assert intact
    finally:
        pool.close()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(
    ("saved_on", "saved_as", "loaded_on", "loaded_as"),
    [
        (4, "plain", 4, "plain"),
        (4, "plain", 2, "plain"),
        (4, "shard0", 2, "shard0"),
        (4, "shard0", 4, "plain"),
        (2, "plain", 4, "shard0"),
        (4, "hsdp", 4, "two_dims"),
        (2, "partial", 4, "strided"),
    ],
)
def test_checkpoints_move_between_worlds_and_storages(
    tmp_path: Path, saved_on: int, saved_as: str, loaded_on: int, loaded_as: str
) -> None:
    """Saved on some ranks in one storage, resumed on others in another, and on one process."""
    folder = str(tmp_path / "saved")
    workers.pool(saved_on).run(cases.save_after, saved_as, folder, 3)
    errors = workers.pool(loaded_on).run(cases.resume, loaded_as, folder, 3, 6)
    assert max(errors) < 1e-9
    assert cases.resume(0, 1, "plain", folder, 3, 6, alone=True) < 1e-9


@pytest.mark.parametrize(("world", "storage"), [(2, "shard0"), (4, "hsdp"), (4, "two_dims")])
def test_stages_outside_of_blocks_work_on_stored_parameters(world: int, storage: str) -> None:
    """Clipping by the global norm, momentum and decay, in the layout of the parameters."""
    assert max(workers.pool(world).run(cases.clip_first, storage)) < 1e-9
