"""The torch.optim shell: a plain loop equals the functional one, and every option holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shell_loops import (
    SETTINGS,
    Net,
    batches,
    check_equal,
    fixed_run,
    functional,
    mlp,
    names_of,
    random_grads,
    train,
    two_groups,
    two_params,
)
from torch import nn
from torch.optim import lr_scheduler

import shampoo_func as sf
from shampoo_func.errors import HyperparameterError, OptimizerError

# --- the plain loop equals the functional loop ---


@pytest.mark.parametrize("make_model", [mlp, Net])
def test_plain_loop_equals_functional_loop(make_model: Callable[[], nn.Module]) -> None:
    """Thirty steps of shampoo with grafting, decay and momentum, bit for bit."""
    model = make_model()
    data = batches(30, model)
    expected = functional(model, [(lambda _: sf.shampoo(0.02, **SETTINGS), names_of(model))], data)
    optimizer = sf.ShampooOptimizer(model.named_parameters(), lr=0.02, **SETTINGS)
    check_equal(train(model, optimizer, data), expected)


def test_with_a_scheduler() -> None:
    """A scheduler of torch.optim gives the rates that a new transformation each step has."""
    model = Net()
    data = batches(30, model)
    optimizer = sf.ShampooOptimizer(model.named_parameters(), lr=0.02, **SETTINGS)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: step / 10 if step < 10 else 1 / step)

    def make(step: int) -> sf.Transformation:
        return sf.shampoo(0.02 * (step / 10 if step < 10 else 1 / step), **SETTINGS)

    expected = functional(model, [(make, names_of(model))], data)
    check_equal(train(model, optimizer, data, scheduler), expected)


def test_with_groups_and_a_scheduler() -> None:
    """Every group has its own options, clock and rate."""
    model = Net()
    data = batches(30, model)
    groups = two_groups(model)
    names = [[name for name, _ in group["params"]] for group in groups]
    optimizer = sf.ShampooOptimizer(groups, lr=0.02, **SETTINGS)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)

    def first(step: int) -> sf.Transformation:
        return sf.shampoo(rates[0][step], **SETTINGS)

    def second(step: int) -> sf.Transformation:
        options = {**SETTINGS, "weight_decay": 0.0, "beta1": 0.5, "refresh_every": 3}
        return sf.shampoo(rates[1][step], **options)

    rates = [[0.05], [0.02]]
    for rate in rates:
        for _ in data:
            rate.append(rate[-1] * 0.9)
    expected = functional(model, [(first, names[0]), (second, names[1])], data)
    check_equal(train(model, optimizer, data, scheduler), expected)


@pytest.mark.parametrize("kind", ["corrected", "independent"])
def test_rate_enters_decay_too(kind: str) -> None:
    """Defect 6: with corrected decay the rate enters twice, relative to the group's own peak."""
    model = mlp()
    data = batches(12, model)
    settings = {**SETTINGS, "weight_decay_kind": kind}
    named = list(model.named_parameters())
    groups = [{"params": named[:2], "lr": 0.05}, {"params": named[2:]}]
    optimizer = sf.ShampooOptimizer(groups, lr=0.02, **settings)
    assert [group["peak_learning_rate"] for group in optimizer.param_groups] == [0.05, 0.02]
    scheduler = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)

    def make(peak: float) -> Callable[[int], sf.Transformation]:
        def at(step: int) -> sf.Transformation:
            rate = torch.tensor(rates[peak][step], dtype=torch.float64)
            return sf.shampoo(rate, peak_learning_rate=peak, **settings)

        return at

    reference = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in (0.05, 0.02)])
    other = lr_scheduler.LinearLR(reference, 0.1, total_iters=10)
    rates: dict[float, list[float]] = {0.05: [], 0.02: []}
    for _ in data:
        for peak, group in zip(rates, reference.param_groups, strict=True):
            rates[peak].append(group["lr"])
        reference.step()
        other.step()
    names = names_of(model)
    expected = functional(model, [(make(0.05), names[:2]), (make(0.02), names[2:])], data)
    check_equal(train(model, optimizer, data, scheduler), expected)


def test_any_transformation() -> None:
    """`as_optimizer` runs any transformation; lr is that of its learning-rate stages."""
    model = Net()
    data = batches(12, model)

    def make(factor: float) -> sf.Transformation:
        return sf.apply_if_finite(
            sf.partition(
                {
                    "matrix": sf.shampoo(0.04 * factor, **SETTINGS),
                    "rest": sf.accumulate(sf.adamw(0.01 * factor), every=2),
                },
                [("weight", "matrix"), (".*", "rest")],
            )
        )

    optimizer = sf.as_optimizer(model.named_parameters(), make(1.0))
    assert optimizer.param_groups[0]["lr"] == 0.04
    scheduler = lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    expected = functional(model, [(lambda step: make(0.5 ** (step // 3)), names_of(model))], data)
    check_equal(train(model, optimizer, data, scheduler), expected)


def test_with_hyperparams_is_opened() -> None:
    """The arguments of a recipe in `with_hyperparams` are options, and the values are the same."""
    model = mlp()
    data = batches(8, model)
    make = sf.with_hyperparams(
        sf.shampoo, learning_rate=0.02, **{**SETTINGS, "momentum": 0.5, "beta2": 0.8}
    )
    expected = functional(model, [(lambda _: make, names_of(model))], data)
    optimizer = sf.as_optimizer(model.named_parameters(), make)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["beta2"], group["refresh_every"]) == (0.02, 0.8, 4)
    check_equal(train(model, optimizer, data), expected)


def test_matches_torch() -> None:
    """Against torch.optim itself: AdamW with warm restarts, in float64."""
    model = mlp().double()
    other = copy.deepcopy(model)
    data = [(x.double(), y.double()) for x, y in batches(20, model)]
    ours = sf.as_optimizer(model.parameters(), sf.adamw(0.05))
    theirs = torch.optim.AdamW(other.parameters(), 0.05)
    mine = train(model, ours, data, lr_scheduler.CosineAnnealingWarmRestarts(ours, 6))
    expected = train(other, theirs, data, lr_scheduler.CosineAnnealingWarmRestarts(theirs, 6))
    for one, two in zip(mine, expected, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-11, atol=1e-12)


# --- options ---


def without_filter(state: dict[str, Any]) -> dict[str, Any]:
    stacks = state["precondition"].items()
    bare = {name: stack._replace(filter=sf.types.EmptyState()) for name, stack in stacks}
    return {**state, "precondition": bare}


def with_filter(state: dict[str, Any]) -> dict[str, Any]:
    stacks = state["precondition"].items()

    def fresh(stack: Any) -> Any:
        moment = stack.preconditioner.magnitude.second_moment
        zeros = torch.zeros(len(moment), dtype=torch.int64)
        return sf.transforms.EmaState(zeros, torch.zeros_like(moment))

    full = {name: stack._replace(filter=fresh(stack)) for name, stack in stacks}
    return {**state, "precondition": full}


def with_trace(state: dict[str, Any]) -> dict[str, Any]:
    zeros = {name: torch.zeros(5, 3).double() for name in ("a", "b")}
    return {**state, "trace": sf.transforms.TraceState(zeros)}


def no_change(state: Any) -> Any:
    return state


EDITS: list[tuple[str, Any, Any, Callable[[Any], Any]]] = [
    ("lr", 0.02, 0.5, no_change),
    ("lr", 0.02, 0.0, no_change),
    ("lr", 0.0, 1, no_change),
    ("beta1", 0.9, 0.5, no_change),
    ("beta1", 0.9, 0.0, without_filter),
    ("beta1", 0.0, 0.5, with_filter),
    ("beta2", 0.9, 0.5, no_change),
    ("beta2", 0.9, 1.0, no_change),
    ("beta2", 1.0, 0.9, no_change),
    ("beta3", None, 0.3, no_change),
    ("epsilon", 1e-4, 1e-2, no_change),
    ("weight_decay", 0.05, 0.7, no_change),
    ("weight_decay", 0.0, 0.7, lambda state: {**state, "add_decayed_weights": ()}),
    ("momentum", 0.6, 0.1, no_change),
    ("momentum", 0.6, 0, lambda state: {k: v for k, v in state.items() if k != "trace"}),
    ("momentum", 0.0, 0.6, with_trace),
    ("dampening", 0.0, 0.3, no_change),
    ("grafting_epsilon", None, 0.1, no_change),
    ("trace_scaling", None, 0.5, no_change),
    ("trace_scaling", 0.25, 0.5, no_change),
    ("nesterov", False, True, no_change),
    ("refresh_every", 4, 2, no_change),
    ("bias_correction", True, False, no_change),
    ("weight_decay_kind", "decoupled", "l2", no_change),
]


@pytest.mark.parametrize(("name", "old", "new", "migrated"), EDITS)
def test_edits_take_effect(name: str, old: Any, new: Any, migrated: Callable[[Any], Any]) -> None:
    """Defect 7: an option that is edited in the group holds from the next step on, entirely."""
    params = two_params()
    grads = random_grads(params, 12)
    own = {key: p.detach().clone() for key, p in params.items()}
    before = {"lr": 0.02, **SETTINGS, name: old}
    optimizer = sf.ShampooOptimizer(params.items(), **before)
    group = optimizer.param_groups[0]
    fixed_run(optimizer, params, grads[:5])
    group[name] = new
    fixed_run(optimizer, params, grads[5:8])
    if isinstance(new, float):
        group[name] = new * 0.9 + 0.01  # once more, now that it may live as a tensor
    got = fixed_run(optimizer, params, grads[8:])

    options = dict(before)
    tx = sf.shampoo(options.pop("lr"), **options)
    state = tx.init(own)
    for step, grad in enumerate(grads):
        if step == 5 or (step == 8 and isinstance(new, float)):
            value = new if step == 5 else new * 0.9 + 0.01
            options = {**before, name: value}
            tx = sf.shampoo(options.pop("lr"), **options)
            if step == 5:
                state = migrated(state)
            elif new == 0.0:
                state = with_filter(state) if name == "beta1" else state
        due = sf.refresh_due(tx, step + 1)
        updates, state = tx.update(grad, state, own, refresh=due)
        own = sf.apply_updates(own, updates)
    for key in own:
        torch.testing.assert_close(got[key], own[key], rtol=1e-7, atol=1e-9)


def test_rates_change_without_a_new_state() -> None:
    """A change of a number that lives as a tensor is a write, nothing more."""
    params = two_params()
    optimizer = sf.ShampooOptimizer(params.items(), lr=0.1, **SETTINGS)
    fixed_run(optimizer, params, random_grads(params, 1))
    member = optimizer._members[0]
    assert member is not None
    for rate in (0.5, 0.0, 1.0, 2, 1e-3):
        optimizer.param_groups[0]["lr"] = rate
        fixed_run(optimizer, params, random_grads(params, 1))
        assert optimizer._members[0] is member
        assert member.tensors["lr"] == rate


def test_rate_as_a_tensor() -> None:
    """A 0-d tensor as lr is read where it is; schedulers write into it."""
    params = two_params()
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = sf.as_optimizer(params.items(), sf.with_hyperparams(sf.sgd, learning_rate=0.1))
    optimizer.param_groups[0]["lr"] = rate
    before = {name: p.detach().clone() for name, p in params.items()}
    (grad,) = random_grads(params, 1)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    fixed_run(optimizer, params, [grad])
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate
    got = fixed_run(optimizer, params, [grad])
    for name in got:
        torch.testing.assert_close(got[name], before[name] - 0.15 * grad[name])


def test_momentum_of_one_cycle() -> None:
    """OneCycleLR finds the momentum and moves it."""
    params = two_params()
    optimizer = sf.ShampooOptimizer(params.items(), lr=0.1, **SETTINGS)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    for grad in random_grads(params, 8):
        fixed_run(optimizer, params, [grad])
        scheduler.step()
    member = optimizer._members[0]
    assert member is not None
    assert 0.85 <= float(member.tensors["momentum"]) <= 0.95
    assert member.tensors["momentum"] != optimizer.param_groups[0]["momentum"]  # not yet stepped


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", -1.0, "learning_rate must lie in"),
        ("lr", float("nan"), "learning_rate must lie in"),
        ("beta1", 1.5, "decay must lie in"),
        ("momentum", -0.5, "decay must lie in"),
        ("refresh_every", 0, "an int of at least 1, got 0"),
        ("block_size", 3, "'block_size' cannot become 3 after the first step"),
        ("grafting", None, "'grafting' cannot become None after the first step"),
    ],
)
def test_bad_edits_are_refused(name: str, value: Any, message: str) -> None:
    """An option out of range, or one that the state cannot follow, raises and changes nothing."""
    params = two_params()
    optimizer = sf.ShampooOptimizer(params.items(), lr=0.1, **SETTINGS)
    twin = copy.deepcopy((params, optimizer))
    grads = random_grads(params, 4)
    fixed_run(optimizer, params, grads[:2])
    good = optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with pytest.raises(HyperparameterError, match=message):
        fixed_run(optimizer, params, grads[2:])
    optimizer.param_groups[0][name] = good
    got = fixed_run(optimizer, params, grads[2:])
    expected = fixed_run(twin[1], twin[0], grads)
    assert all(torch.equal(got[key], expected[key]) for key in got)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("betas", "beta1 and beta2"),
        ("eps", "epsilon"),
        ("learning_rate", "lr"),
        ("weigth_decay", "weight_decay"),
    ],
)
def test_misspelt_options_are_refused(key: str, hint: str) -> None:
    """A key of a group that looks like an option is not silently kept."""
    with pytest.raises(HyperparameterError, match=f"'{key}'; did you mean {hint}"):
        sf.ShampooOptimizer([{"params": [torch.ones(1)], key: 0.1}])


def test_unknown_options() -> None:
    """An unknown argument is an error; a foreign key of a group is kept, as torch.optim does."""
    with pytest.raises(HyperparameterError, match="no option 'colour'"):
        sf.ShampooOptimizer([torch.ones(1)], colour=3)
    optimizer = sf.ShampooOptimizer([{"params": [torch.ones(1)], "lr_scale": 0.5, "name": "x"}])
    assert optimizer.param_groups[0]["lr_scale"] == 0.5


def test_two_schedules_are_one_too_many() -> None:
    """A schedule inside and a scheduler outside: an error, not a product."""
    schedule = sf.linear_schedule(0.1, 0.0, 10)
    for optimizer in (
        sf.as_optimizer([torch.ones(1)], sf.adamw(schedule)),
        sf.ShampooOptimizer([torch.ones(1)], lr=schedule),
    ):
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.09)
        scheduler.step()
        with pytest.raises(OptimizerError, match=r"lr was changed from .* a schedule inside"):
            optimizer.step()


def test_without_a_rate() -> None:
    """A transformation that has no learning rate cannot be given one by a scheduler."""
    optimizer = sf.as_optimizer([torch.ones(1)], sf.scale(-0.1))
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(OptimizerError, match="has no learning rate"):
        optimizer.step()


def test_schedule_inside_is_shown() -> None:
    """With a schedule inside, the loop is the functional one, and lr shows the next rate."""
    model = mlp()
    data = batches(8, model)
    schedule = sf.cosine_decay_schedule(0.1, 10)
    expected = functional(
        model, [(lambda _: sf.shampoo(schedule, **SETTINGS), names_of(model))], data
    )
    optimizer = sf.ShampooOptimizer(model.named_parameters(), lr=schedule, **SETTINGS)
    check_equal(train(model, optimizer, data), expected)
    assert optimizer.param_groups[0]["lr"] == float(schedule(8))


def test_maximize() -> None:
    """Going up is going down with the opposite gradient."""
    params = two_params()
    other = copy.deepcopy(params)
    grads = random_grads(params, 3)
    up = sf.ShampooOptimizer(params.items(), maximize=True, **SETTINGS)
    down = sf.ShampooOptimizer(other.items(), **SETTINGS)
    minus = [{name: -leaf for name, leaf in grad.items()} for grad in grads]
    one, two = fixed_run(up, params, grads), fixed_run(down, other, minus)
    assert all(torch.equal(one[name], two[name]) for name in one)
