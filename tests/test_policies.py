"""Refresh policies: which blocks are refreshed when, on the host, in a graph, and under vmap."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compiling import fresh_compiler, graph_count, whole_graph
from hypothesis import given
from hypothesis import strategies as st

import shampoo_func as sf
from shampoo_func import tree

Tensor = torch.Tensor


def grads_of(step: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def run(tx: sf.Transformation, shape: tuple[int, ...], steps: int, **extra: Any) -> Iterator[Any]:
    """Yield update and state after every step."""
    params = torch.zeros(shape, dtype=torch.float64)
    state = tx.init(params)
    for step in range(1, steps + 1):
        update, state = tx.update(grads_of(step, *shape), state, params, **extra)
        yield update, state


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 4))
def test_every_answers_ints_and_tensors_alike(period: int, start: int, calls: int) -> None:
    """The rule of the paper, for a loop on the host and for counters in the state."""
    policy = sf.transforms.Every(period, start, calls + 1)
    for step in range(1, 60):
        inner = step // (calls + 1)
        rule = step % (calls + 1) == 0 and (
            (inner % period == 0 and inner > start) or inner == start
        )
        assert policy.due(step) == rule
        assert bool(policy.due(torch.tensor(step))) == rule


def test_never() -> None:
    """With start at infinity no policy ever refreshes."""
    policies = [sf.every(2, start=math.inf), sf.staggered(2, start=math.inf)]
    policies.append(sf.probabilistic(0.9, start=math.inf))
    for policy in policies:
        assert not any(policy.due(step) for step in range(1, 50))
        tx = sf.blocked(sf.precondition(sf.kronecker(0.9), policy=policy), block_size=2)
        for step, (update, _) in enumerate(run(tx, (4, 4), 4), 1):
            assert torch.equal(update, grads_of(step, 4, 4))


def test_probabilistic_is_the_same_everywhere() -> None:
    """Host, tensor and compiled graph draw the same; seeds differ; the frequency is right."""
    policy = sf.probabilistic(0.3, seed=5)
    steps = torch.arange(1, 5001)
    host = [bool(policy.due(step)) for step in range(1, 5001)]
    assert policy.due(steps).tolist() == host
    compiled = torch.compile(policy.due, fullgraph=True, backend="aot_eager")
    assert compiled(steps).tolist() == host
    assert 0.28 < sum(host) / 5000 < 0.32
    other = sf.probabilistic(0.3, seed=6).due(steps).tolist()
    assert 0.3 < sum(a != b for a, b in zip(host, other, strict=True)) / 5000 < 0.54
    runs = Counter(a and b for a, b in itertools.pairwise(host))
    assert 0.07 < runs[True] / 5000 < 0.11  # consecutive draws are independent: 0.3^2


def test_probabilistic_follows_a_schedule() -> None:
    """The probability may fall with the step: 1 at first, 0 later."""
    policy = sf.probabilistic(sf.linear_schedule(1.0, 0.0, 10))
    due = [bool(policy.due(step)) for step in range(1, 40)]
    assert due[0]
    assert any(due[1:10])
    assert not any(due[10:])


def test_probabilistic_state_follows_its_own_clock() -> None:
    """Roots change exactly at the drawn steps."""
    policy = sf.probabilistic(0.4, seed=1)
    tx = sf.precondition(sf.kronecker(0.9, root=sf.eigh_root(1e-4)), policy=policy)
    before = None
    for step, (_, state) in enumerate(run(tx, (3, 3), 20), 1):
        roots = state.preconditioner.roots[0]
        if before is not None:
            assert torch.equal(before, roots) != policy.due(step)
        before = roots


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5))
def test_staggered_refreshes_every_block_once_per_period(
    blocks: int, period: int, start: int
) -> None:
    """Every block has its turn in every period, in shares that differ by at most one."""
    policy = sf.staggered(period, start=start)
    clock = torch.zeros(blocks, dtype=torch.int64)
    counts = []
    for step in range(1, start + 3 * period):
        steps = torch.full((blocks,), step)
        _, after = policy.refresh(sf.second_moment(), (), clock, steps, static=False)
        assert after is not None
        turned = after != clock
        counts.append(int(turned.sum()))
        assert (clock[turned] == 0).logical_or(step - clock[turned] == period).all()
        clock = after
    assert sum(counts[: start - 1]) == 0
    for first in range(start - 1, start - 1 + 2 * period + 1):
        assert sum(counts[first : first + period]) == blocks
    assert max(counts) <= -(-blocks // period)
    assert min(counts[start - 1 :]) >= blocks // period


def test_staggered_with_one_block_per_turn_is_every() -> None:
    """A single block under `staggered(k, start)` is refreshed as under a clock of its own."""
    root = sf.eigh_root(1e-4)
    one = sf.blocked(
        sf.precondition(sf.kronecker(0.9, root=root), policy=sf.staggered(3, start=3)), block_size=4
    )
    other = sf.blocked(sf.precondition(sf.kronecker(0.9, root=root), refresh_every=3), block_size=4)
    for (a, _), (b, _) in zip(run(one, (4, 4), 12), run(other, (4, 4), 12), strict=True):
        assert torch.equal(a, b)
    bare = sf.precondition(sf.kronecker(0.9, root=root), policy=sf.staggered(3, start=3))
    for (a, _), (b, _) in zip(run(bare, (4, 4), 12), run(other, (4, 4), 12), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_staggered_blocks_equal_blocks_refreshed_alone() -> None:
    """Block i of n has the roots that its own `every` would give it, shifted by its phase."""
    root = sf.eigh_root(1e-4)
    tx = sf.blocked(
        sf.precondition(sf.kronecker(0.9, root=root), policy=sf.staggered(4)), block_size=2
    )
    states = [state for _, state in run(tx, (8, 2), 13)]
    single = sf.kronecker(0.9, root=root)
    for block in range(4):
        own = single.init(torch.zeros(2, 2, dtype=torch.float64))
        for step in range(1, 14):
            grad = grads_of(step, 8, 2)[2 * block : 2 * block + 2]
            own = single.accumulate(own, grad)
            if step % 4 == (1 + block) % 4:
                own = single.refresh(own)
            seen = states[step - 1]["2x2"].preconditioner.roots[0][block]
            torch.testing.assert_close(seen, own.roots[0], rtol=1e-9, atol=1e-11)


def test_staggered_gives_the_longest_waiting_their_turn() -> None:
    """Blocks whose gradients come late are refreshed as soon as there is room for them."""
    tx = sf.blocked(sf.precondition(sf.kronecker(0.9), policy=sf.staggered(2)), block_size=2)
    params = {name: torch.zeros(2, 2, dtype=torch.float64) for name in "abcd"}
    state = tx.init(params)
    for step in range(1, 12):
        present = "abcd" if step > 6 else "ab"
        grads = {name: grads_of(step, 2, 2) if name in present else None for name in params}
        _, state = tx.update(grads, state, params)
    clock, steps = state["2x2"].clock, state["2x2"].step
    assert steps.tolist() == [11, 11, 5, 5]
    assert (clock > 0).all()
    assert (steps - clock <= 2).all()


@pytest.mark.parametrize("static", [True, None])
def test_staggered_is_one_graph(static: bool | None) -> None:
    """A compiled loop that staggers needs one graph, and equals eager."""
    tx = sf.blocked(
        sf.precondition(
            sf.graft(
                direction=sf.kronecker(0.9, root=sf.eigh_root(1e-4)),
                magnitude=sf.second_moment(0.9),
            ),
            filter=sf.ema(0.9),
            policy=sf.staggered(3),
        ),
        block_size=2,
    )
    params = torch.zeros(8, 4, dtype=torch.float64)

    def step(grads: Any, state: Any) -> Any:
        return tx.update(grads, state, params, refresh=static)

    eager = compiled = tx.init(params)
    with fresh_compiler("aot_eager") as counter:
        fast = whole_graph(step, counter)
        for number in range(1, 9):
            grads = grads_of(number, 8, 4)
            expected, eager = tx.update(grads, eager, params)
            found, compiled = fast(grads, compiled)
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
        assert graph_count(fast) == 1
    for a, b in zip(tree.leaves(eager), tree.leaves(compiled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_host_clock_follows_each_policy() -> None:
    """`refresh_due` asks the policy; two policies in one chain have no common answer."""
    kronecker = sf.kronecker(0.9)
    tx = sf.chain(sf.precondition(kronecker, policy=sf.staggered(5, start=3)))
    assert [sf.refresh_due(tx, step) for step in range(1, 6)] == [False, False, True, True, True]
    random = sf.precondition(kronecker, policy=sf.probabilistic(0.5, seed=2))
    due = sf.probabilistic(0.5, seed=2)
    assert [sf.refresh_due(random, t) for t in range(1, 20)] == [
        bool(due.due(t)) for t in range(1, 20)
    ]
    twice = sf.accumulate(sf.precondition(kronecker, policy=sf.every(3)), every=2)
    assert [t for t in range(1, 13) if sf.refresh_due(twice, t)] == [6, 12]
    both = sf.chain(first=tx, second=random)
    with pytest.raises(sf.ShampooFuncError, match="different policies"):
        sf.refresh_due(both, 1)


def test_adaptive_needs_a_basis() -> None:
    """`adaptive` sets the tolerance in whatever keeps a basis, and refuses what keeps none."""
    graft = sf.graft(
        direction=sf.in_eigenbasis(sf.second_moment(0.9)), magnitude=sf.second_moment(0.9)
    )
    tx = sf.precondition(graft, policy=sf.adaptive(0.2, period=3))
    assert tx.preconditioner.direction.basis.tolerance == 0.2  # type: ignore[attr-defined]
    for wrong in (sf.kronecker(0.9), sf.second_moment(0.9)):
        with pytest.raises(sf.ShampooFuncError, match="keeps an eigenbasis"):
            sf.precondition(wrong, policy=sf.adaptive(0.2))


def test_adaptive_refreshes_less_and_stays_close() -> None:
    """On stationary gradients a tolerance keeps most bases, and the updates near the exact ones."""
    exact = sf.precondition(sf.in_eigenbasis(sf.second_moment(0.99), beta2=0.99))
    adaptive = sf.precondition(
        sf.in_eigenbasis(sf.second_moment(0.99), beta2=0.99), policy=sf.adaptive(0.2)
    )
    kept, bases = 0, None
    for (one, _), (other, state) in zip(
        run(exact, (6, 4), 150), run(adaptive, (6, 4), 150), strict=True
    ):
        new = state.preconditioner.bases[0]
        kept += bases is not None and torch.equal(new, bases)
        bases = new
        last = torch.linalg.matrix_norm(one - other) / torch.linalg.matrix_norm(one)
    assert kept > 100
    assert last < 0.5


def test_statistics_after_use_are_one_step_late() -> None:
    """With "after", each update is what "before" gives without the current gradient."""
    root = sf.eigh_root(1e-4)
    late = sf.precondition(sf.kronecker(0.9, root=root), statistics="after")
    single = sf.kronecker(0.9, root=root)
    own = single.init(torch.zeros(4, 3, dtype=torch.float64))
    for step, (update, _) in enumerate(run(late, (4, 3), 10), 1):
        grad = grads_of(step, 4, 3)
        torch.testing.assert_close(update, single.apply(own, grad), rtol=1e-9, atol=1e-11)
        own = single.refresh(single.accumulate(own, grad))


def test_failures_are_counted_and_raised_with_the_path() -> None:
    """Failures in a row are counted per block; the host check names parameter and block."""
    tx = sf.chain(
        sf.blocked(sf.precondition(sf.kronecker(0.9)), block_size=2),
        sf.scale_by_learning_rate(0.1),
    )
    params = {"deep": {"good": torch.zeros(2, 2), "bad": torch.zeros(2, 4)}}
    state = tx.init(params)
    for step in range(1, 6):
        grads = tree.map(lambda p, step=step: grads_of(step, *p.shape).float(), params)
        grads["deep"]["bad"][0, 3] = math.nan
        _, state = tx.update(grads, state, params)
        sf.check_failures(tx, state, params, limit=step)
    for options in ({}, {"limit": 4}):
        with pytest.raises(sf.errors.RootFailureError) as raised:
            sf.check_failures(tx, state, params, **options)
        assert "'deep.bad', block of shape (2, 2) from (0, 2)" in str(raised.value)
        assert "5 refreshes" in str(raised.value)
        assert "tensor" not in str(raised.value)
    assert state["precondition"]["2x2"].preconditioner.failures.tolist() == [0, 5, 0]
    # the factor itself is poisoned for good; a block that recovers is forgiven
    healed = state["precondition"]["2x2"]._replace()
    inner = healed.preconditioner
    factors = tuple(torch.nan_to_num(factor) for factor in inner.factors)
    healed = healed._replace(preconditioner=inner._replace(factors=factors))
    good = tree.map(lambda p: grads_of(9, *p.shape).float(), params)
    state["precondition"]["2x2"] = healed
    _, state = tx.update(good, state, params)
    sf.check_failures(tx, state, params, limit=0)


def test_guard_asks_for_a_small_residual() -> None:
    """A root that is worse than asked for is kept out, per matrix, and the old one stays."""

    class Rough(sf.linalg.RootSolver):
        epsilon = 0.0

        def __call__(self, matrix: Tensor, exponent: float) -> sf.linalg.Root:
            residual = torch.tensor([0.5, 1e-6], dtype=matrix.dtype)
            ok = torch.ones(2, dtype=torch.bool)
            return sf.linalg.Root(2 * torch.ones_like(matrix), residual, ok)

    matrices = torch.zeros(2, 3, 3)
    kept = sf.guarded(Rough(), max_residual=1e-3)(matrices, 0.5, matrices)
    assert kept.ok.tolist() == [False, True]
    assert kept.value[0].sum() == 0
    assert (kept.value[1] == 2).all()
    tx = sf.kronecker(0.9, root=sf.guarded(Rough(), max_residual=1e-3), sides="left")
    state = torch.func.vmap(tx.init)(torch.zeros(2, 3, 4))
    after = tx.refresh(tx.accumulate(state, torch.ones(2, 3, 4)))
    assert torch.equal(after.roots[0][0], torch.eye(3))
    assert after.failures.tolist() == [1, 0]
