"""Faults on a mesh: bad gradients, other masks, no process group; no rank is left waiting."""

from __future__ import annotations

import pytest
import sharding_fault_cases as cases
import workers


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize(
    ("world", "storage", "shared"),
    [
        (2, "plain", False),
        (2, "partial", False),
        (2, "plain", True),
        (4, "shard0", False),
        (4, "two_dims", False),
    ],
)
def test_a_bad_block_keeps_its_roots(world: int, storage: str, shared: bool, bad: str) -> None:
    """Not finite in a step that refreshes: state and parameters are those of one process."""
    answers = workers.pool(world).run(cases.bad_block, storage, shared, float(bad))
    assert max(error for error, _ in answers) < 1e-9
    owners = [kept for _, kept in answers if kept is not None]
    assert owners == [True] * (world if shared else 1)


@pytest.mark.parametrize("world", [2, 4])
def test_failures_are_an_error_on_every_rank(world: int) -> None:
    """The owner names the block, and no rank goes on."""
    answers = workers.pool(world).outcomes(cases.failing)
    assert {own.kind for own in answers} == {"RootFailureError"}
    named = [own.message for own in answers if "'embedding', block of shape (4, 4)" in own.message]
    assert len(named) == 1
    assert max(workers.pool(world).run(cases.masks, False)) == 0


@pytest.mark.parametrize("world", [2, 4])
def test_other_gradients_missing_is_an_error_on_every_rank(world: int) -> None:
    """Checked before anything is sent; the group still works afterwards."""
    answers = workers.pool(world).outcomes(cases.masks, True)
    assert {own.kind for own in answers} == {"PlanMismatchError"}
    assert all("missing" in own.message for own in answers)
    assert max(workers.pool(world).run(cases.masks, False)) == 0


def test_without_a_process_group() -> None:
    """Destroyed, or never made: typed errors that say so."""
    pool = workers.Pool(2)
    try:
        for seen in pool.run(cases.no_group):
            assert seen == ["ShardingError"] * 3
    finally:
        pool.close()
