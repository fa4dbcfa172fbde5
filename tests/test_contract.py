"""One contract for every public transformation: what a stage may and may not do."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from catalogue import CASES, Case, makes_a_stage

import shampoo_func as sf
from shampoo_func import tree

Tensor = torch.Tensor
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def make_params(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Return a small nested tree with a matrix, a vector, a scalar and an order-3 tensor."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {"w": random(5, 3), "deep": {"b": random(3), "s": random(), "k": random(2, 2, 3)}}


def make_grads(params: Any, step: int) -> Any:
    """Return gradients for one step, as the parameters in shape and dtype."""
    generator = torch.Generator().manual_seed(100 + step)
    return tree.map(
        lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype), params
    )


def run(
    tx: sf.Transformation, params: Any, grads: list[Any], state: Any = None
) -> tuple[Any, Any, list[Any]]:
    """Return parameters and state after the given gradients, and every update."""
    state = tx.init(params) if state is None else state
    seen = []
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = sf.apply_updates(params, updates)
        seen.append(updates)
    return params, state, seen


def assert_same(one: Any, other: Any, **tolerance: float) -> None:
    """Assert that two trees have equal structure and (to tolerance) equal leaves."""
    left, structure = tree.flatten(one)
    right = tree.flatten_up_to(structure, other, one)
    for a, b in zip(left, right, strict=True):
        if a is None:
            assert b is None
        else:
            rtol, atol = tolerance.get("rtol", 0.0), tolerance.get("atol", 0.0)
            torch.testing.assert_close(a, b, equal_nan=True, rtol=rtol, atol=atol)


def layout(value: Any) -> list[Any]:
    """Return shape, dtype and stride of every leaf."""
    return [(leaf.shape, leaf.dtype, leaf.stride()) for leaf in tree.leaves(value)]


def test_catalogue_is_complete() -> None:
    """Every public constructor of a transformation is in the catalogue."""
    covered = {case.covers for case in CASES}
    # a sweep's parameters are stacked, so it has tests of its own
    assert {name for name in sf.__all__ if makes_a_stage(getattr(sf, name))} - {"sweep"} == covered


@every_case
def test_pure(case: Case) -> None:
    """Neither init nor update writes to what it is given."""
    tx, params, grads = case.make(), make_params(), make_grads(make_params(), 1)
    _, state, _ = run(tx, params, [make_grads(params, step) for step in range(3)])
    given = (params, grads, state)
    before = copy.deepcopy(given)
    versions = [leaf._version for leaf in tree.leaves(given)]
    tx.init(params)
    tx.update(grads, state, params)
    assert_same(given, before)
    assert [leaf._version for leaf in tree.leaves(given)] == versions


@every_case
@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "transposed_grads"])
def test_layout_is_stable(case: Case, memory: str) -> None:
    """State and updates keep structure, shape, dtype and strides from step to step."""
    params: Any = {"w": torch.randn(4, 3, 2, 2), "b": torch.randn(3)}
    if memory == "channels_last":
        params["w"] = params["w"].to(memory_format=torch.channels_last)
    tx = case.make()
    state = tx.init(params)
    first = layout(state)
    for step in range(4):
        grads = {name: torch.randn_like(leaf) for name, leaf in params.items()}
        if memory == "transposed_grads":
            grads["w"] = torch.randn(2, 2, 3, 4).permute(3, 2, 1, 0)
        updates, state = tx.update(grads, state, params)
        assert layout(state) == first, step
        assert [leaf.shape for leaf in tree.leaves(updates)] == [
            leaf.shape for leaf in tree.leaves(params)
        ]
        after = sf.apply_updates(params, updates)
        if memory != "transposed_grads":
            assert layout(updates) == layout(grads)
        assert layout(after) == layout(params)
        params = after


@every_case
def test_vmap_equals_loop(case: Case) -> None:
    """Vmap over stacked parameters equals one call per member."""
    tx = case.make()
    members = [make_params(), tree.map(lambda p: 2 * p + 1, make_params())]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *members)
    grads = [make_grads(members[0], step) for step in range(3)]

    def three_steps(params: Any) -> Any:
        return run(tx, params, grads)[:2]

    together = torch.func.vmap(three_steps)(stacked)
    apart = [three_steps(member) for member in members]
    again = tree.map(lambda *leaves: torch.stack(leaves), *apart)
    assert_same(together, again, rtol=1e-9, atol=1e-11)


@every_case
def test_vmap_over_state(case: Case) -> None:
    """One update vmapped over state, gradients and parameters equals the updates apart."""
    tx, params = case.make(), make_params()
    runs = [
        run(tx, params, [make_grads(params, 10 * member + step) for step in range(3)])[:2]
        for member in range(2)
    ]
    grads = [make_grads(params, 50 + member) for member in range(2)]
    apart = [tx.update(grad, state, own) for grad, (own, state) in zip(grads, runs, strict=True)]

    def stack(*trees: Any) -> Any:
        return tree.map(lambda *leaves: torch.stack(leaves), *trees)

    together = torch.func.vmap(tx.update)(
        stack(*grads), stack(*(state for _, state in runs)), stack(*(own for own, _ in runs))
    )
    assert_same(together, stack(*apart), rtol=1e-9, atol=1e-11)


@every_case
def test_differentiable(case: Case) -> None:
    """The derivative through three steps agrees with finite differences."""
    tx, params = case.make(), make_params()
    grads = [make_grads(params, step) for step in range(3)]
    direction = make_grads(params, 77)

    def final(params: Any) -> Tensor:
        # gradients that depend on the parameters: of |w|^2 plus a linear term
        state = tx.init(params)
        for grad in grads:
            own = tree.map(lambda p, g: 0.3 * p + g, params, grad)
            updates, state = tx.update(own, state, params)
            params = sf.apply_updates(params, updates)
        return sum((leaf.square().sum() for leaf in tree.leaves(params)), torch.zeros(()))

    def at(size: float) -> Tensor:
        return final(tree.map(lambda p, d: p + size * d, params, direction))

    gradient = torch.func.grad(final)(params)
    products = tree.map(lambda g, d: (g * d).sum(), gradient, direction)
    slope = float(sum(tree.leaves(products)))
    numeric = float((at(1e-5) - at(-1e-5)) / 2e-5)
    assert slope == pytest.approx(numeric, rel=1e-5, abs=1e-7)
    tangent = torch.func.jvp(final, (params,), (direction,))[1]
    assert float(tangent) == pytest.approx(slope, rel=1e-8, abs=1e-10)


@every_case
def test_pickles_prints_and_compares(case: Case) -> None:
    """Equal settings make equal, equally printed stages; a pickled one behaves the same."""
    tx, params = case.make(), make_params()
    grads = [make_grads(params, step) for step in range(3)]
    if "lambda" not in repr(tx):
        again = pickle.loads(pickle.dumps(tx))
        assert again == tx
        assert_same(run(again, params, grads)[0], run(tx, params, grads)[0])
    assert case.make() == tx
    assert repr(case.make()) == repr(tx)
    assert hash(case.make()) == hash(tx)
    assert type(tx).__name__ in repr(tx)


@every_case
def test_state_round_trip(case: Case) -> None:
    """A state that was saved and loaded continues bit for bit."""
    tx, params = case.make(), make_params()
    grads = [make_grads(params, step) for step in range(5)]
    params, state, _ = run(tx, params, grads[:3])
    file = io.BytesIO()
    flat = {str(index): leaf for index, leaf in enumerate(tree.leaves(state))}
    torch.save(flat, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    restored = tree.unflatten(tree.flatten(state)[1], [loaded[str(i)] for i in range(len(loaded))])
    assert_same(run(tx, params, grads[3:], restored)[:2], run(tx, params, grads[3:], state)[:2])


@every_case
@pytest.mark.parametrize("packed", [False, True])
def test_named_round_trip(case: Case, packed: bool) -> None:
    """A state saved by name, parameter and block continues bit for bit."""
    tx, params = case.make(), make_params()
    grads = [make_grads(params, step) for step in range(5)]
    params, state, _ = run(tx, params, grads[:3])
    file = io.BytesIO()
    torch.save(sf.to_state_dict(tx, state, params, pack_symmetric=packed), file)
    file.seek(0)
    restored = sf.from_state_dict(tx, params, torch.load(file, weights_only=True))
    assert_same(restored, state)
    assert layout(restored) == layout(state)
    assert_same(run(tx, params, grads[3:], restored)[:2], run(tx, params, grads[3:], state)[:2])


@every_case
def test_none_gradient(case: Case) -> None:
    """A parameter without a gradient is passed over, and what is kept for it stays."""
    tx, params = case.make(), make_params()
    params, state, _ = run(tx, params, [make_grads(params, step) for step in range(3)])
    grads = make_grads(params, 9)
    grads["deep"]["b"] = None
    updates, after = tx.update(grads, state, params)
    assert updates["deep"]["b"] is None
    moved = sf.apply_updates(params, updates)
    assert moved["deep"]["b"] is params["deep"]["b"]
    before_view = sf.parameter_state(tx, state, params, "deep.b")
    after_view = sf.parameter_state(tx, after, params, "deep.b")
    for old, new in zip(_tensors(before_view), _tensors(after_view), strict=True):
        if case.counts_calls and old.ndim == 0 and old.dtype == torch.int64:
            continue
        assert torch.equal(old, new)
    # another parameter moves as it would have moved with all gradients there
    if case.name not in ("global_norm", "chain"):
        full, _ = tx.update(make_grads(params, 9), state, params)
        assert_same(full["w"], updates["w"], rtol=1e-12, atol=1e-14)


def _tensors(view: Any) -> list[Tensor]:
    """Return every tensor in a parameter's view, blocks included."""
    if isinstance(view, Tensor):
        return [view]
    if isinstance(view, sf.transforms.BlockView):
        return _tensors(view.state)
    parts = view.values() if isinstance(view, dict) else view
    return [found for part in parts for found in _tensors(part)]


@every_case
def test_all_gradients_none(case: Case) -> None:
    """With no gradient at all, nothing moves."""
    tx, params = case.make(), make_params()
    state = tx.init(params)
    updates, _ = tx.update(tree.map(lambda _: None, params), state, params)
    assert all(leaf is None for leaf in tree.leaves(updates))
    assert_same(sf.apply_updates(params, updates), params)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(case: Case, dtype: torch.dtype) -> None:
    """Updates and parameters keep their dtype, and stay finite."""
    params = make_params(dtype)
    after, _, seen = run(case.make(), params, [make_grads(params, step) for step in range(4)])
    for leaf in tree.leaves((after, seen)):
        assert leaf.dtype == dtype
        assert torch.isfinite(leaf).all()


@every_case
def test_zero_gradients(case: Case) -> None:
    """Zero gradients from the first step on give finite updates and a finite derivative."""
    tx, params = case.make(), make_params()
    zeros = tree.map(torch.zeros_like, params)
    after, _, _ = run(tx, params, [zeros] * 4)
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(after))

    def final(grads: Any) -> Tensor:
        return sum(
            (leaf.sum() for leaf in tree.leaves(run(tx, params, [grads] * 2)[0])), torch.zeros(())
        )

    gradient = torch.func.grad(final)(zeros)
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(gradient))


@every_case
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_not_finite(case: Case, poison: float) -> None:
    """Under apply_if_finite a poisoned gradient changes nothing but the count."""
    tx, params = sf.apply_if_finite(case.make()), make_params()
    params, state, _ = run(tx, params, [make_grads(params, step) for step in range(3)])
    grads = make_grads(params, 9)
    grads["deep"]["b"][1] = poison
    updates, after = tx.update(grads, state, params)
    assert_same(sf.apply_updates(params, updates), params)
    assert_same(after.inner, state.inner)
    assert (int(after.skipped), int(after.in_a_row)) == (1, 1)
    _, after = tx.update(make_grads(params, 10), after, params)
    assert (int(after.skipped), int(after.in_a_row)) == (1, 0)


@every_case
def test_empty(case: Case) -> None:
    """Empty trees and parameters without elements are fine."""
    tx = case.make()
    trees: list[Any] = [{}, [], {"w": torch.zeros(0, 3), "v": torch.zeros(0)}]
    for params in trees:
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(params, state, params)
            assert_same(updates, params)


class Pair(NamedTuple):
    """A user's own container."""

    left: Any
    right: Any


@every_case
def test_containers(case: Case) -> None:
    """Dicts, lists, tuples, NamedTuples and OrderedDicts nest freely and come back."""
    tx = case.make()
    flat = {
        "w": torch.randn(5, 3),
        "b": torch.randn(3),
        "c": torch.randn(3),
        "d": torch.randn(4, 2),
    }

    def nest(leaves: dict[str, Any]) -> Any:
        inner = OrderedDict(z=leaves["c"], a=(leaves["d"],))
        return {"w": leaves["w"], "rest": [Pair(leaves["b"], inner)]}

    grads = [{name: torch.randn_like(leaf) for name, leaf in flat.items()} for _ in range(3)]
    expected = nest(run(tx, flat, grads)[0])
    found = run(tx, nest(flat), [nest(grad) for grad in grads])[0]
    assert type(found["rest"][0]) is Pair
    assert list(found["rest"][0].right) == ["z", "a"]
    assert_same(found, expected, rtol=1e-5, atol=1e-6)


@every_case
def test_bare_tensor(case: Case) -> None:
    """A single tensor is a tree."""
    params = torch.randn(4, 3)
    after, _, _ = run(case.make(), params, [torch.randn(4, 3) for _ in range(3)])
    assert after.shape == params.shape


@every_case
def test_init_on_meta(case: Case) -> None:
    """The shapes of the state are known without memory."""
    params = make_params()
    real = case.make().init(params)
    meta = case.make().init(tree.map(lambda p: torch.empty_like(p, device="meta"), params))
    assert layout(meta) == layout(real)
