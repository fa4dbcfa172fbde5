"""Refreshes shared by ranks that have everything: the numbers of one process, few bytes."""

from __future__ import annotations

from typing import Any

import pytest
import sharding_refresh_cases as cases
import torch
import workers

import shampoo_func as sf


@pytest.mark.parametrize(
    ("world", "storage", "method", "static", "missing"),
    [
        (2, "plain", "kronecker", True, False),
        (2, "plain", "grafted", False, True),
        (2, "replicated", "eigendecomposed", True, True),
        (2, "plain", "iterated", False, False),
        (4, "replicated", "grafted", False, False),
        (4, "plain", "in_eigenbasis", True, False),
        (4, "plain", "quantized", True, True),
    ],
)
def test_shared_refreshes_give_the_numbers_of_one_process(
    world: int, storage: str, method: str, static: bool, missing: bool
) -> None:
    """Six steps to 1e-9, and every leaf of the state has the same bits on all ranks."""
    answers = workers.pool(world).run(cases.compare, storage, method, static, missing, None)
    assert max(error for error, _ in answers) < 1e-9
    assert max(spread for _, spread in answers) == 0.0


@pytest.mark.parametrize(
    ("method", "policy"),
    [
        ("eigendecomposed", sf.adaptive(0.1, period=2)),
        ("kronecker", sf.probabilistic(0.5, seed=3)),
    ],
    ids=["adaptive", "probabilistic"],
)
def test_policies_of_whole_stacks(method: str, policy: Any) -> None:
    """What is due follows from the step, so all ranks agree."""
    answers = workers.pool(2).run(cases.compare, "plain", method, False, False, policy)
    assert max(error for error, _ in answers) < 1e-9
    assert max(spread for _, spread in answers) == 0.0


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_sent_are_those_of_the_roots_of_a_refresh(world: int) -> None:
    """Nothing in a plain step; the own blocks' roots, and their counts, to all in a refresh."""
    for sent, calls, roots in workers.pool(world).run(cases.count_sent):
        assert sent[0] == calls[0] == 0
        assert sent[1] == pytest.approx(roots * (world - 1) / world, rel=0.01)
        assert calls[1] == 1


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("storage", "'embedding'"),
        ("staggered", "Staggered"),
        ("dtype", "bfloat16"),
        ("nothing", "has none"),
    ],
)
def test_what_cannot_be_shared_is_refused(kind: str, told: str) -> None:
    """A typed error on every rank, at init."""
    answers = workers.pool(2).outcomes(cases.refuse, kind)
    assert {own.kind for own in answers} == {"ShardingError"}
    assert all(told in own.message for own in answers)


@pytest.mark.slow
@pytest.mark.parametrize(("static", "graphs"), [(True, 2), (False, 1)])
def test_whole_step_compiles(static: bool, graphs: int) -> None:
    """The gather is a part of the graph, in a branch of it if the state says when."""
    answers = workers.pool(2).run(cases.compiled, static)
    assert max(error for error, _ in answers) < 1e-12
    assert {count for _, count in answers} == {graphs}


def test_every_rank_has_the_state_of_one_process() -> None:
    """Named, restored and reported as it is there: whole, on every rank."""
    for own, whole, (reported, held) in workers.pool(2).run(cases.named):
        assert own.keys() == whole.keys()
        for key, value in own.items():
            torch.testing.assert_close(value, whole[key], rtol=1e-9, atol=1e-9)
        assert reported == (held, held)
