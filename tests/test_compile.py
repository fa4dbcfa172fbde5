"""Whole steps under torch.compile: one graph, two graphs, donated, and equal to eager."""

from __future__ import annotations

import contextlib
import copy
import gc
from typing import Any

import pytest
import torch
from catalogue import CASES, Case
from compiling import fresh_compiler, graph_count, whole_graph
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import shampoo_func as sf
from shampoo_func import tree

pytestmark = pytest.mark.slow


def random_tree(seed: int, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return random tensors shaped as `like`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        for name, leaf in like.items()
    }


def assert_close(one: Any, other: Any) -> None:
    """Assert that two trees agree to float64 rounding."""
    for a, b in zip(tree.leaves(one), tree.leaves(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_equals_compiled_and_donated(case: Case) -> None:
    """Inductor's donated step, with the automatic refresh, is one graph and equals eager."""
    tx = case.make()
    # blocks of few shapes: every one is compiled on its own
    params = {"w": torch.randn(6, 3, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}
    state = tx.init(params)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return sf.apply_updates(params, updates), state

    own_params, own_state = copy.deepcopy((params, state))
    addresses = [leaf.data_ptr() for leaf in tree.leaves((own_params, own_state))]
    with fresh_compiler() as counter:
        compiled = whole_graph(sf.donate(step), counter)
        for seed in range(5):
            grads = random_tree(seed, params)
            params, state = step(params, state, grads)
            own_params, own_state = compiled(own_params, own_state, grads)
            assert_close((own_params, own_state), (params, state))
        assert graph_count(compiled) == 1
    assert [leaf.data_ptr() for leaf in tree.leaves((own_params, own_state))] == addresses


def test_none_gradients_compile() -> None:
    """A pattern of None gradients is static: one graph per pattern, equal to eager."""
    tx = sf.shampoo(0.1, beta2=0.9, epsilon=1e-3, block_size=4, refresh_every=1)
    params = {
        "w": torch.randn(6, 4, dtype=torch.float64),
        "v": torch.randn(4, 4, dtype=torch.float64),
    }

    def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return tx.update(grads, state, params, refresh=True)

    with fresh_compiler("aot_eager") as counter:
        compiled = whole_graph(step, counter)
        state = tx.init(params)
        for seed in range(4):
            grads: dict[str, Any] = random_tree(seed, params)
            if seed % 2:
                grads["v"] = None
            expected, after = step(grads, state, params)
            found, own = compiled(grads, state, params)
            assert found["v"] is None or not seed % 2
            assert_close((found, own), (expected, after))
            state = after
        assert graph_count(compiled) == 2


class Problem:
    """A two-layer network on random data, and the whole training step."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.params = {
            "first.weight": torch.randn(8, 12, generator=generator) / 4,
            "first.bias": torch.zeros(12),
            "second.weight": torch.randn(12, 8, generator=generator) / 4,
        }
        self.tx = sf.chain(
            sf.clip_by_global_norm(1.0),
            sf.blocked(
                sf.precondition(
                    sf.graft(
                        direction=sf.kronecker(0.95, root=sf.eigh_root(1e-4)),
                        magnitude=sf.second_moment(0.95),
                    ),
                    filter=sf.ema(0.9),
                    refresh_every=7,
                ),
                block_size=8,
            ),
            sf.trace(0.5, nesterov=True),
            sf.add_decayed_weights(0.1),
            sf.scale_by_learning_rate(sf.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 100)),
        )

    def batch(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets."""
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
        return x, x.roll(1, 1).sin()

    @staticmethod
    def loss(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean squared error."""
        x, y = batch
        hidden = torch.tanh(x @ params["first.weight"] + params["first.bias"])
        return (hidden @ params["second.weight"] - y).square().mean()

    def step(
        self, params: Any, state: Any, batch: Any, *, refresh: bool | None = None
    ) -> tuple[Any, Any, Tensor]:
        """Forward, gradients, optimizer, new parameters."""
        grads, loss = torch.func.grad_and_value(self.loss)(params, batch)
        updates, state = self.tx.update(grads, state, params, refresh=refresh)
        return sf.apply_updates(params, updates), state, loss


def test_training_step_is_two_graphs() -> None:
    """100 donated steps with refreshes and a new learning rate each: two graphs, fixed memory."""
    problem = Problem()
    params, state = copy.deepcopy((problem.params, problem.tx.init(problem.params)))
    addresses = [leaf.data_ptr() for leaf in tree.leaves((params, state))]
    losses = []
    with fresh_compiler() as counter:
        step = whole_graph(sf.donate(problem.step), counter)
        for t in range(1, 101):
            refresh = sf.refresh_due(problem.tx, t)
            params, state, loss = step(params, state, problem.batch(t), refresh=refresh)
            losses.append(loss.item())
        assert graph_count(step) == 2
        assert [leaf.data_ptr() for leaf in tree.leaves((params, state))] == addresses
        assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
        for refresh in (False, True):
            _assert_nothing_stays(step, params, state, problem.batch(0), refresh)


def _assert_nothing_stays(step: Any, params: Any, state: Any, batch: Any, refresh: bool) -> None:
    """Assert that a step, but for the loss it returns, frees all that it allocates."""
    gc.collect()
    before = _live_storages()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step(params, state, batch, refresh=refresh)
        loss_bytes = result[2].untyped_storage().nbytes()
        del result
    gc.collect()
    assert _live_storages() <= before
    net = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    assert net <= loss_bytes


def _live_storages() -> set[int]:
    """Return the addresses of all tensors that are alive, but for those of transforms."""
    found = set()
    for item in gc.get_objects():
        if type(item) is Tensor and item.device.type == "cpu":
            with contextlib.suppress(NotImplementedError):
                found.add(item.untyped_storage().data_ptr())
    return found


def test_donated_graph_serves_other_tensors() -> None:
    """A donated step that was compiled on copies does not compile again for the originals."""
    tx, params = sf.adamw(0.1), {"w": torch.randn(4, 3)}
    state, grads = tx.init(params), random_tree(1, params)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return sf.apply_updates(params, updates), state

    with fresh_compiler("aot_eager") as counter:
        compiled = whole_graph(sf.donate(step), counter)
        for _ in range(3):
            compiled(*copy.deepcopy((params, state)), grads)
        compiled(params, state, grads)
        assert graph_count(compiled) == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_each_set_of_shapes_has_its_own_graph(dynamic: bool | None) -> None:
    """A step that was compiled for one model serves the next, also where sizes are left open."""
    tx = sf.shampoo(0.1, block_size=4)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params, refresh=False)
        return sf.apply_updates(params, updates), state

    with fresh_compiler("eager") as counter:
        compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=dynamic)
        for rows in (6, 8, 10):
            params = {"w": torch.randn(rows, 5, dtype=torch.float64)}
            state, grads = tx.init(params), random_tree(rows, params)
            assert_close(compiled(params, state, grads), step(params, state, grads))
        assert graph_count(compiled) == 3


def test_compiled_training_equals_eager() -> None:
    """In float64 the compiled two-graph loop and the one-graph loop equal the eager one."""
    problem = Problem()
    start = {name: leaf.double() for name, leaf in problem.params.items()}
    batches = [tuple(part.double() for part in problem.batch(t)) for t in range(15)]

    def train(step: Any, static: bool) -> Any:
        params, state = copy.deepcopy(start), problem.tx.init(start)
        for t, batch in enumerate(batches, 1):
            refresh = sf.refresh_due(problem.tx, t) if static else None
            params, state, _ = step(params, state, batch, refresh=refresh)
        return params

    eager = train(problem.step, static=False)
    assert_close(train(problem.step, static=True), eager)
    with fresh_compiler() as counter:
        step = whole_graph(sf.donate(problem.step), counter)
        assert_close(train(step, static=False), eager)
        assert graph_count(step) == 1
    with fresh_compiler("aot_eager") as counter:
        step = whole_graph(sf.donate(problem.step), counter)
        assert_close(train(step, static=True), eager)
        assert graph_count(step) == 2


def test_hyperparams_change_without_recompiling() -> None:
    """A learning rate in the state may change at every step: still one graph per refresh flag."""
    tx = sf.with_hyperparams(
        sf.shampoo, learning_rate=0.1, beta2=0.9, block_size=4, refresh_every=2, epsilon=1e-3
    )
    params = {"w": torch.randn(6, 4, dtype=torch.float64)}
    state = tx.init(params)

    def step(params: Any, state: Any, grads: Any, *, refresh: bool) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params, refresh=refresh)
        return sf.apply_updates(params, updates), state

    with fresh_compiler("aot_eager") as counter:
        compiled = whole_graph(sf.donate(step), counter)
        own_params, own_state = copy.deepcopy((params, state))
        for t in range(1, 7):
            rate = torch.tensor(0.1 / t, dtype=torch.float64)
            state.hyperparams["learning_rate"] = rate
            own_state.hyperparams["learning_rate"].copy_(rate)
            grads, refresh = random_tree(t, params), sf.refresh_due(tx, t)
            params, state = step(params, state, grads, refresh=refresh)
            own_params, own_state = compiled(own_params, own_state, grads, refresh=refresh)
            assert_close(own_params, params)
        assert graph_count(compiled) == 2


def test_equal_stages_share_a_graph() -> None:
    """Equal optimizers, built apart, do not compile twice."""
    params = {"w": torch.randn(4, 3)}

    def update(tx: sf.Transformation, grads: Any, state: Any) -> Any:
        return tx.update(grads, state, params)

    with fresh_compiler("eager") as counter:
        compiled = whole_graph(update, counter)
        for _ in range(3):
            tx = sf.adamw(0.1)
            compiled(tx, params, tx.init(params))
        assert graph_count(compiled) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("make", "refresh"), [(sf.soap, True), (sf.soap, None)])
def test_blocks_with_a_dimension_of_one(make: Any, refresh: bool | None) -> None:
    """The rest of a cut may be a 1 x 1 factor, whose strides say nothing."""
    tx, params = make(0.1, block_size=4, refresh_every=1), {"w": torch.ones(5, 3)}
    state = tx.init(params)
    with fresh_compiler("aot_eager") as counter:
        step = whole_graph(tx.update, counter)
        found, after = step(params, state, params, refresh=refresh)
    wanted, expected = tx.update(params, state, params, refresh=refresh)
    torch.testing.assert_close((found, after), (wanted, expected), equal_nan=True)
