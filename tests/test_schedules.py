"""Schedules: their closed forms, whatever kind of number the step is."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import shampoo_func as sf
from shampoo_func.errors import HyperparameterError

STEPS = range(16)
Schedule = Callable[[Any], Tensor]


def cosine(done: float) -> float:
    return (1 + math.cos(math.pi * min(done, 1.0))) / 2


# schedule, and the same in Python floats
SCHEDULES: dict[str, tuple[Schedule, Callable[[int], float]]] = {
    "constant": (sf.constant_schedule(0.3), lambda step: 0.3),
    "linear": (
        sf.linear_schedule(0.2, 1.0, 8),
        lambda step: 0.2 + 0.8 * min(step / 8, 1.0),
    ),
    "linear down": (
        sf.linear_schedule(1.0, -1.0, 3),
        lambda step: 1.0 - 2.0 * min(step / 3, 1.0),
    ),
    "cosine": (sf.cosine_decay_schedule(2.0, 10), lambda step: 2.0 * cosine(step / 10)),
    "cosine to an end": (
        sf.cosine_decay_schedule(2.0, 10, 0.5),
        lambda step: 0.5 + 1.5 * cosine(step / 10),
    ),
    "warm-up and cosine": (
        sf.warmup_cosine_decay_schedule(0.1, 1.0, 4, 12, 0.2),
        lambda step: 0.1 + 0.9 * step / 4 if step < 4 else 0.2 + 0.8 * cosine((step - 4) / 8),
    ),
    "warm-up, stable, decay": (
        sf.warmup_stable_decay_schedule(0.1, 1.0, 3, 4, 5, 0.5),
        lambda step: (
            0.1 + 0.9 * step / 3 if step < 3 else 1.0 - 0.5 * min(max(step - 7, 0) / 5, 1.0)
        ),
    ),
    "piecewise constant": (
        sf.piecewise_constant_schedule(2.0, {9: 0.1, 3: 0.5}),
        lambda step: 2.0 * (0.5 if step >= 3 else 1.0) * (0.1 if step >= 9 else 1.0),
    ),
    "joined": (
        sf.join_schedules(
            [
                sf.linear_schedule(0.0, 1.0, 4),
                sf.constant_schedule(0.7),
                sf.piecewise_constant_schedule(1.0, {2: 0.5}),
            ],
            [3, 6],
        ),
        lambda step: step / 4 if step < 3 else 0.7 if step < 6 else 1.0 if step < 8 else 0.5,
    ),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def values(schedule: Schedule) -> Tensor:
    """The values at all steps, asked for with Python ints."""
    return torch.stack([schedule(step) for step in STEPS])


@every_schedule
def test_schedule_has_its_closed_form(name: str) -> None:
    """The values are those of the formula in Python floats."""
    schedule, closed_form = SCHEDULES[name]
    expected = torch.tensor([closed_form(step) for step in STEPS], dtype=torch.float64)
    torch.testing.assert_close(values(schedule), expected, rtol=1e-14, atol=1e-15)


@every_schedule
def test_value_is_a_0d_float64_tensor(name: str) -> None:
    """Whatever the step is, the value is one that stages can scale by without loss."""
    schedule, _ = SCHEDULES[name]
    for step in (3, torch.tensor(3), torch.tensor(3, dtype=torch.int32)):
        value = schedule(step)
        assert value.shape == () and value.dtype == torch.float64


@every_schedule
def test_tensor_step_is_like_an_int(name: str) -> None:
    """A 0-d int64 counter, as in the state, gives the same values."""
    schedule, _ = SCHEDULES[name]
    found = torch.stack([schedule(torch.tensor(step)) for step in STEPS])
    assert torch.equal(found, values(schedule))


@every_schedule
def test_schedule_is_vmapped_over_steps(name: str) -> None:
    """Many steps at once, as in a sweep or for a plot; plain vectors do too."""
    schedule, _ = SCHEDULES[name]
    steps = torch.tensor(list(STEPS))
    assert torch.equal(torch.func.vmap(schedule)(steps), values(schedule))
    assert torch.equal(schedule(steps), values(schedule))


@every_schedule
def test_schedule_compiles_once_for_all_steps(name: str) -> None:
    """A traced step gives the same values, in one graph that no step recompiles."""
    schedule, _ = SCHEDULES[name]
    torch._dynamo.reset()
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda step: schedule(step), backend=count, fullgraph=True)
    found = torch.stack([compiled(torch.tensor(step)) for step in STEPS])
    torch.testing.assert_close(found, values(schedule), rtol=1e-14, atol=1e-15)
    assert len(graphs) == 1


@every_schedule
def test_schedule_is_a_value(name: str) -> None:
    """Schedules compare, hash, print and pickle."""
    schedule, _ = SCHEDULES[name]
    twin = copy.deepcopy(schedule)
    again = pickle.loads(pickle.dumps(schedule))
    assert schedule == twin == again
    assert hash(schedule) == hash(twin) == hash(again)
    assert repr(schedule) == repr(again)
    assert torch.equal(values(again), values(schedule))


@every_schedule
def test_learning_rate_follows_the_schedule(name: str) -> None:
    """A chain calls it with the number of updates done before, 0 at the first."""
    schedule, _ = SCHEDULES[name]
    tx = sf.scale_by_learning_rate(schedule)
    one = torch.ones((), dtype=torch.float64)
    state, found = tx.init(one), []
    for _ in STEPS:
        update, state = tx.update(one, state)
        found.append(-update)
    assert torch.equal(torch.stack(found), values(schedule))


def test_values_are_differentiable_hyperparameters() -> None:
    """A 0-d tensor for a value is swept and differentiated like any other hyper-parameter."""

    def rate(peak: Tensor) -> Tensor:
        return sf.warmup_cosine_decay_schedule(0.0, peak, 4, 12)(torch.tensor(8))

    peaks = torch.tensor([1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(rate)(peaks), peaks / 2)
    half = torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(torch.func.grad(rate)(peaks[0]), half)


def test_step_beyond_float32_is_exact() -> None:
    """Step 2^24 + 1, which float32 does not have, is told from 2^24."""
    schedule = sf.piecewise_constant_schedule(1.0, {2**24 + 1: 0.5})
    found = [schedule(torch.tensor(step)).item() for step in (2**24, 2**24 + 1)]
    assert found == [1.0, 0.5]


NO_NUMBERS = (math.nan, "1", None, True, 1j, torch.ones(2))
NO_COUNTS = (0, -1, 2.0, math.nan, "2", True, None)
BAD: dict[str, tuple[Callable[[Any], Any], tuple[Any, ...]]] = {
    "constant value": (sf.constant_schedule, NO_NUMBERS),
    "linear init": (lambda bad: sf.linear_schedule(bad, 0.0, 2), NO_NUMBERS),
    "linear end": (lambda bad: sf.linear_schedule(0.0, bad, 2), NO_NUMBERS),
    "linear steps": (lambda bad: sf.linear_schedule(0.0, 1.0, bad), NO_COUNTS),
    "cosine init": (lambda bad: sf.cosine_decay_schedule(bad, 2), NO_NUMBERS),
    "cosine end": (lambda bad: sf.cosine_decay_schedule(1.0, 2, bad), NO_NUMBERS),
    "cosine steps": (lambda bad: sf.cosine_decay_schedule(1.0, bad), NO_COUNTS),
    "warm-up init": (lambda bad: sf.warmup_cosine_decay_schedule(bad, 1.0, 2, 4), NO_NUMBERS),
    "warm-up peak": (lambda bad: sf.warmup_cosine_decay_schedule(0.0, bad, 2, 4), NO_NUMBERS),
    "warm-up end": (lambda bad: sf.warmup_cosine_decay_schedule(0.0, 1.0, 2, 4, bad), NO_NUMBERS),
    "warm-up steps": (lambda bad: sf.warmup_cosine_decay_schedule(0.0, 1.0, bad, 4), NO_COUNTS),
    "no time to decay": (
        lambda bad: sf.warmup_cosine_decay_schedule(0.0, 1.0, 4, bad),
        (*NO_COUNTS, 3, 4),
    ),
    "WSD init": (lambda bad: sf.warmup_stable_decay_schedule(bad, 1.0, 2, 2, 2), NO_NUMBERS),
    "WSD peak": (lambda bad: sf.warmup_stable_decay_schedule(0.0, bad, 2, 2, 2), NO_NUMBERS),
    "WSD end": (lambda bad: sf.warmup_stable_decay_schedule(0.0, 1.0, 2, 2, 2, bad), NO_NUMBERS),
    "WSD warm-up": (lambda bad: sf.warmup_stable_decay_schedule(0.0, 1.0, bad, 2, 2), NO_COUNTS),
    "WSD stable": (lambda bad: sf.warmup_stable_decay_schedule(0.0, 1.0, 2, bad, 2), NO_COUNTS),
    "WSD decay": (lambda bad: sf.warmup_stable_decay_schedule(0.0, 1.0, 2, 2, bad), NO_COUNTS),
    "pieces init": (lambda bad: sf.piecewise_constant_schedule(bad, {1: 0.5}), NO_NUMBERS),
    "pieces boundary": (lambda bad: sf.piecewise_constant_schedule(1.0, {bad: 0.5}), NO_COUNTS),
    "pieces factor": (
        lambda bad: sf.piecewise_constant_schedule(1.0, {1: bad}),
        (-0.5, *NO_NUMBERS),
    ),
    "joined boundary": (
        lambda bad: sf.join_schedules([sf.constant_schedule(1.0)] * 2, [bad]),
        NO_COUNTS[1:],
    ),
    "joined boundaries": (
        lambda bad: sf.join_schedules([sf.constant_schedule(1.0)] * 3, bad),
        ([], [1], [2, 1], [2, 2], [1, 2, 3]),
    ),
    "joined schedules": (
        lambda bad: sf.join_schedules(bad, []),
        ([], [0.1], [None]),
    ),
}


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        pytest.param(make, bad, id=f"{name} {bad!r}")
        for name, (make, table) in BAD.items()
        for bad in table
    ],
)
def test_bad_argument_is_refused(make: Callable[[Any], Any], bad: Any) -> None:
    """NaN, text, fractions of steps and boundaries that do not rise are refused at once."""
    with pytest.raises(HyperparameterError):
        make(bad)


def test_refresh_clock_of_a_partition() -> None:
    """Only stages with something to refresh have a clock: Shampoo beside AdamW has one answer."""
    tx = sf.partition(
        {"matrix": sf.shampoo(1e-3, refresh_every=4), "rest": sf.adamw(1e-3)},
        lambda path, leaf: "matrix" if leaf.ndim == 2 else "rest",
    )
    assert [t for t in range(1, 13) if sf.refresh_due(tx, t)] == [4, 8, 12]
    assert sf.adamw(1e-3).refresh_policies == frozenset()
    every_other = sf.accumulate(sf.shampoo(1e-3, refresh_every=3), every=2)
    assert [t for t in range(1, 19) if sf.refresh_due(every_other, t)] == [6, 12, 18]
