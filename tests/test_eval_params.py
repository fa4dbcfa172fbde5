"""`eval_params` finds the averages wherever in an optimizer they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compiling import fresh_compiler, whole_graph

import shampoo_func as sf
from shampoo_func import tree
from shampoo_func.errors import (
    ChainError,
    HyperparameterError,
    ParameterError,
    TreeMismatchError,
)

Tensor = torch.Tensor
F64 = torch.float64


def make_params() -> dict[str, Any]:
    """Return a matrix and a vector."""
    generator = torch.Generator().manual_seed(1)
    return {
        "deep": {"w": torch.randn(4, 3, generator=generator, dtype=F64)},
        "b": torch.randn(3, generator=generator, dtype=F64),
    }


def make_grads(steps: int) -> list[Any]:
    """Return one tree of gradients per step."""
    generator = torch.Generator().manual_seed(2)

    def random(leaf: Tensor) -> Tensor:
        return torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)

    return [tree.map(random, make_params()) for _ in range(steps)]


def train(tx: sf.Transformation, steps: int = 4, state: Any = None) -> tuple[Any, Any]:
    """Return parameters and state after some steps."""
    params = make_params()
    state = tx.init(params) if state is None else state
    for grads in make_grads(steps):
        updates, state = tx.update(grads, state, params)
        params = sf.apply_updates(params, updates)
    return params, state


def is_matrix(path: str, leaf: Tensor) -> bool:
    """Choose matrices."""
    return leaf.ndim == 2


def base() -> sf.Transformation:
    """Return an optimizer that averages."""
    return sf.chain(sf.trace(0.5), sf.schedule_free(0.1))


def assert_same(one: Any, other: Any) -> None:
    """Assert that two trees are equal to rounding."""
    for a, b in zip(tree.leaves(one), tree.leaves(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def hyper_base(learning_rate: Any, train_interpolation: Any = 0.8) -> sf.Transformation:
    """Return `base` from its hyper-parameters."""
    return sf.chain(sf.trace(0.5), sf.schedule_free(learning_rate, train_interpolation))


@pytest.mark.parametrize(
    "wrap",
    [
        sf.chain,
        lambda tx: sf.chain(sf.identity(), nested=sf.chain(tx)),
        sf.apply_if_finite,
        lambda tx: sf.accumulate(tx, every=1),
        lambda tx: sf.masked(tx, where=lambda path, leaf: True),
        lambda tx: sf.partition({"all": tx}, [(".*", "all")]),
        lambda tx: sf.blocked(tx, block_size=2),
        lambda tx: sf.with_hyperparams(hyper_base, learning_rate=0.1),
        lambda tx: sf.apply_if_finite(sf.accumulate(sf.chain(tx), every=1)),
    ],
)
def test_every_wrapper(wrap: Callable[[Any], sf.Transformation]) -> None:
    """The averages are those of the optimizer inside."""
    expected = sf.eval_params(base(), train(base())[1], train(base())[0])
    params, state = train(wrap(base()))
    assert_same(sf.eval_params(wrap(base()), state, params), expected)
    assert_same(params, train(base())[0])


@pytest.mark.parametrize(
    "make", [lambda: sf.adamw(0.1), lambda: sf.shampoo(0.1, start=float("inf")), sf.identity]
)
def test_without_averaging(make: Callable[[], sf.Transformation]) -> None:
    """An optimizer that does not average returns the very parameters."""
    tx = make()
    params = make_params()
    found = sf.eval_params(tx, tx.init(params), params)
    assert all(a is b for a, b in zip(tree.leaves(found), tree.leaves(params), strict=True))


def test_parts() -> None:
    """Each group has its own average; a group without one keeps its parameters."""
    matrices, rest = base(), sf.chain(sf.sgd(0.1), sf.weight_lawa(2))
    tx: sf.Transformation = sf.partition(
        {"m": matrices, "r": rest}, lambda p, leaf: "m" if is_matrix(p, leaf) else "r"
    )
    params, state = train(tx)
    found = sf.eval_params(tx, state, params)
    expected = sf.eval_params(matrices, *reversed(train(matrices)))["deep"]["w"]
    torch.testing.assert_close(found["deep"]["w"], expected, rtol=1e-12, atol=0.0)
    expected = sf.eval_params(rest, *reversed(train(rest)))["b"]
    torch.testing.assert_close(found["b"], expected, rtol=1e-12, atol=0.0)

    tx = sf.chain(sf.sgd(0.1), sf.masked(sf.weight_ema(0.5), where=is_matrix))
    params, state = train(tx)
    found = sf.eval_params(tx, state, params)
    assert found["b"] is params["b"]
    assert not torch.equal(found["deep"]["w"], params["deep"]["w"])
    # two stages for different parameters do not collide
    both = sf.chain(
        sf.sgd(0.1),
        sf.masked(sf.weight_ema(0.5), where=is_matrix),
        rest=sf.masked(sf.weight_lawa(3), where=lambda p, leaf: not is_matrix(p, leaf)),
    )
    params, state = train(both)
    again = sf.eval_params(both, state, params)
    assert torch.equal(again["deep"]["w"], found["deep"]["w"])
    assert not torch.equal(again["b"], params["b"])


def test_two_averages_of_one_parameter() -> None:
    """Which of two is meant is for the user to say; asking either stage works."""
    tx = sf.chain(sf.sgd(0.1), sf.weight_ema(0.5), sf.weight_lawa(2))
    params, state = train(tx)
    with pytest.raises(HyperparameterError, match=r"'b' has two.*'weight_ema'.*'weight_lawa'"):
        sf.eval_params(tx, state, params)
    stage = dict(tx.stages)["weight_lawa"]
    alone = sf.chain(sf.sgd(0.1), sf.weight_lawa(2))
    expected = sf.eval_params(alone, *reversed(train(alone)))
    assert_same(sf.eval_params(stage, state["weight_lawa"], params), expected)


def test_hyperparams_of_the_state_count() -> None:
    """A coefficient that was changed in the state is the one that x is computed with."""
    tx = sf.with_hyperparams(hyper_base, learning_rate=0.1, train_interpolation=0.8)
    state = tx.init(make_params())
    state.hyperparams["train_interpolation"] = torch.tensor(0.5, dtype=F64)
    params, state = train(tx, state=state)
    other = hyper_base(0.1, 0.5)
    expected = sf.eval_params(other, *reversed(train(other)))
    assert_same(sf.eval_params(tx, state, params), expected)


def masked_average(learning_rate: Any) -> sf.Transformation:
    """Return an optimizer that averages matrices only."""
    return sf.chain(
        sf.scale_by_learning_rate(learning_rate), sf.masked(sf.weight_ema(0.5), where=is_matrix)
    )


@pytest.mark.parametrize("factory", [hyper_base, masked_average, sf.sgd])
def test_sweep(factory: Callable[..., sf.Transformation]) -> None:
    """Every member of a sweep has its own averages; what none averages is passed through."""
    rates = torch.tensor([0.1, 0.3], dtype=F64)
    many = sf.sweep(factory, learning_rate=rates)
    params = sf.stack_copies(make_params(), 2)
    state = many.init(params)
    for grads in make_grads(4):
        updates, state = many.update(sf.stack_copies(grads, 2), state, params)
        params = sf.apply_updates(params, updates)
    found = sf.eval_params(many, state, params)
    assert (found["b"] is params["b"]) == (factory is not hyper_base)
    for index, rate in enumerate(rates):
        tx = factory(learning_rate=rate)
        expected = sf.eval_params(tx, *reversed(train(tx)))
        assert_same(tree.map(lambda leaf, index=index: leaf[index], found), expected)


def test_accumulated() -> None:
    """Between two updates of the inner optimizer the average stays."""
    tx = sf.accumulate(sf.chain(sf.sgd(0.1), sf.weight_lawa(2)), every=2)
    params, state = train(tx, 4)
    more, later = train(tx, 5)
    assert_same(more, params)
    assert_same(sf.eval_params(tx, later, more), sf.eval_params(tx, state, params))


@dataclass(frozen=True, slots=True)
class Pair(sf.Transformation):
    """A user's wrapper around two stages, with a state of its own."""

    first: sf.Transformation
    second: sf.Transformation

    @property
    def children(self) -> tuple[sf.Transformation, ...]:
        """Both."""
        return self.first, self.second

    def init(self, params: Any) -> Any:
        """Return both states."""
        return self.first.init(params), self.second.init(params)

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        """Apply one after the other."""
        updates, first = self.first.update(updates, state[0], params)
        updates, second = self.second.update(updates, state[1], params)
        return updates, (first, second)


def test_foreign_wrapper() -> None:
    """A wrapper that nobody knows is an error only if there is an average inside."""
    tx = Pair(sf.sgd(0.1), sf.weight_ema(0.5))
    params, state = train(tx)
    with pytest.raises(HyperparameterError, match="pair holds a stage that averages"):
        sf.eval_params(tx, state, params)
    plain = Pair(sf.sgd(0.1), sf.identity())
    assert sf.eval_params(plain, plain.init(params), params) is params


def test_wrong_trees() -> None:
    """Parameters that the state was not made for, and states of others, are named."""
    for tx in (base(), sf.chain(sf.weight_ema(0.5)), sf.chain(sf.weight_lawa(2))):
        state = tx.init(make_params())
        wrong = make_params()
        wrong["b"] = torch.ones(7, dtype=F64)
        with pytest.raises(TreeMismatchError, match=r"'b' has shape \(7,\)"):
            sf.eval_params(tx, state, wrong)
        with pytest.raises(TreeMismatchError):
            sf.eval_params(tx, state, {"other": torch.ones(1)})
    with pytest.raises(ChainError, match="the state has the stages"):
        sf.eval_params(base(), {"trace": ()}, make_params())
    with pytest.raises(ParameterError, match="'b'"):
        sf.eval_params(base(), base().init(make_params()), {**make_params(), "b": None})


def test_empty() -> None:
    """A tree without leaves has an average without leaves."""
    for params in ({}, {"w": torch.zeros(0, 3)}):
        tx = base()
        found = sf.eval_params(tx, tx.init(params), params)
        assert tree.paths(found) == tree.paths(params)


def test_donated_and_compiled() -> None:
    """A donated, compiled step and a compiled evaluation equal eager ones, in one graph each."""
    tx = sf.chain(
        sf.trace(0.5),
        sf.partition(
            {"m": sf.schedule_free(0.1), "r": sf.primal_averaging(0.1)},
            [("w", "m"), (".*", "r")],
        ),
    )

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return sf.apply_updates(params, updates), state

    expected, state = train(tx)
    with fresh_compiler("aot_eager") as counter:
        compiled = whole_graph(sf.donate(step), counter)
        params = make_params()
        own = tx.init(params)
        for grads in make_grads(4):
            params, own = compiled(params, own, grads)
        assert_same((params, own), (expected, state))
    with fresh_compiler("aot_eager") as counter:
        evaluate = whole_graph(lambda state, params: sf.eval_params(tx, state, params), counter)
        found = evaluate(own, params)
    assert_same(found, sf.eval_params(tx, state, expected))
    # the evaluation left the training parameters alone
    assert_same(params, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_donated_scalar_is_written(dtype: torch.dtype) -> None:
    """A compiled step writes 0-d leaves of every dtype (torch loses float64 written directly)."""

    def step(total: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        return total + 1, grads * total

    total = torch.zeros((), dtype=dtype)
    with fresh_compiler("aot_eager") as counter:
        compiled = whole_graph(sf.donate(step, donated=1), counter)
        for _ in range(3):
            compiled(total, torch.ones(2))
    assert int(total) == 3
