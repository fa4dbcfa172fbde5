"""Sharded training equals that of one process: real gloo processes, every storage."""

from __future__ import annotations

import pytest
import sharding_cases as cases
import workers

from shampoo_func.sharding import all_gather, all_to_all, reduce_scatter

ONE_DIM = [name for name, (shape, _, _) in cases.STORAGES.items() if len(shape) == 1]
TWO_DIMS = [name for name in cases.STORAGES if name not in ONE_DIM]


@pytest.mark.parametrize(
    ("world", "storage"),
    [(2, name) for name in ONE_DIM] + [(4, name) for name in cases.STORAGES],
)
def test_every_storage_gives_the_numbers_of_one_process(world: int, storage: str) -> None:
    """Ten steps, every rank: Shampoo to 1e-9, and the routes alone in every bit."""
    answers = workers.pool(world).run(cases.compare, storage, {})
    assert max(shampoo for shampoo, _ in answers) < 1e-9
    exact = 1e-13 if "partial" in storage else 0.0  # sums over ranks round
    assert max(route for _, route in answers) <= exact
