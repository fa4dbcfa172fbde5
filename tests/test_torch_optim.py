"""The first-order recipes take the steps of torch.optim, to float64 rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import shampoo_func as sf

STEPS = 50
SHAPES = ((), (1,), (5,), (4, 3), (2, 3, 2, 2), (0, 3))
Parameters = dict[str, Tensor]
MakeTorch = Callable[[list[Tensor], float], torch.optim.Optimizer]
MakeOurs = Callable[[Any], sf.Transformation]


@dataclass(frozen=True)
class Pair:
    """The same optimizer twice: from torch, and as a sentence of ours."""

    torch: MakeTorch
    ours: MakeOurs


PAIRS = {
    "Adam": Pair(
        lambda params, rate: torch.optim.Adam(params, rate),
        lambda rate: sf.adamw(rate, weight_decay=0.0),
    ),
    "Adam with L2": Pair(
        lambda params, rate: torch.optim.Adam(params, rate, weight_decay=0.1),
        lambda rate: sf.chain(
            sf.add_decayed_weights(0.1), sf.scale_by_adam(), sf.scale_by_learning_rate(rate)
        ),
    ),
    "AdamW": Pair(
        lambda params, rate: torch.optim.AdamW(params, rate),
        lambda rate: sf.adamw(rate),
    ),
    "AdamW with other numbers": Pair(
        lambda params, rate: torch.optim.AdamW(
            params, rate, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3
        ),
        lambda rate: sf.adamw(rate, beta1=0.8, beta2=0.95, epsilon=1e-3, weight_decay=0.3),
    ),
    "SGD": Pair(
        lambda params, rate: torch.optim.SGD(params, rate),
        lambda rate: sf.sgd(rate),
    ),
    "SGD with L2": Pair(
        lambda params, rate: torch.optim.SGD(params, rate, weight_decay=0.1),
        lambda rate: sf.sgd(rate, weight_decay=0.1),
    ),
    "SGD with momentum": Pair(
        lambda params, rate: torch.optim.SGD(params, rate, momentum=0.9, weight_decay=0.1),
        lambda rate: sf.sgd(rate, momentum=0.9, weight_decay=0.1),
    ),
    "SGD with Nesterov's momentum": Pair(
        lambda params, rate: torch.optim.SGD(
            params, rate, momentum=0.9, nesterov=True, weight_decay=0.1
        ),
        lambda rate: sf.sgd(rate, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "Adagrad": Pair(
        lambda params, rate: torch.optim.Adagrad(params, rate),
        lambda rate: sf.adagrad(rate),
    ),
    "Adagrad with L2": Pair(
        lambda params, rate: torch.optim.Adagrad(params, rate, weight_decay=0.1, eps=1e-3),
        lambda rate: sf.adagrad(rate, weight_decay=0.1, epsilon=1e-3),
    ),
    "RMSprop": Pair(
        lambda params, rate: torch.optim.RMSprop(params, rate),
        lambda rate: sf.rmsprop(rate),
    ),
    "RMSprop with momentum": Pair(
        lambda params, rate: torch.optim.RMSprop(
            params, rate, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=0.1
        ),
        lambda rate: sf.rmsprop(rate, beta2=0.9, epsilon=1e-3, momentum=0.9, weight_decay=0.1),
    ),
}
every_pair = pytest.mark.parametrize("name", PAIRS)


def parameters() -> Parameters:
    return {
        "x".join(map(str, shape)) or "scalar": torch.randn(shape, dtype=torch.float64)
        for shape in SHAPES
    }


def gradients(params: Parameters) -> list[Parameters]:
    """A gradient per step that does not depend on the trajectory."""
    return [{name: torch.randn_like(leaf) for name, leaf in params.items()} for _ in range(STEPS)]


def with_gaps(steps: list[Parameters]) -> list[dict[str, Tensor | None]]:
    """Leave gradients out: one parameter's early ones, everybody's now and then, one step's all."""
    return [
        {
            name: None
            if step == 30 or (index == 3 and step < 7) or (step + 2 * index) % 5 == 0
            else leaf
            for index, (name, leaf) in enumerate(gradient.items())
        }
        for step, gradient in enumerate(steps)
    ]


def ours(tx: sf.Transformation, params: Parameters, steps: list[Any]) -> list[Parameters]:
    """The parameters after every step."""
    state, trajectory = tx.init(params), []
    for gradient in steps:
        updates, state = tx.update(gradient, state, params)
        params = sf.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory


def theirs(
    make: MakeTorch,
    rate: float,
    params: Parameters,
    steps: list[Any],
    decay: Callable[[int], float] | None = None,
) -> list[Parameters]:
    """The same with torch.optim, and LambdaLR if the rate decays."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    optimizer = make(list(leaves.values()), rate)
    scheduler = None if decay is None else LambdaLR(optimizer, decay)
    trajectory = []
    for gradient in steps:
        for name, leaf in leaves.items():
            leaf.grad = gradient[name]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        trajectory.append({name: leaf.detach().clone() for name, leaf in leaves.items()})
    return trajectory


def check_equal(one: list[Parameters], other: list[Parameters]) -> None:
    """Every parameter after every step, to float64 rounding of its largest values on the way."""
    assert len(one) == len(other) == STEPS
    for name in one[0]:
        mine = torch.stack([params[name].flatten() for params in one])
        their = torch.stack([params[name].flatten() for params in other])
        error = torch.linalg.vector_norm(mine - their, dim=1)
        assert torch.all(error <= 1e-12 * torch.linalg.vector_norm(their, dim=1).max()), name


@every_pair
def test_recipe_takes_the_steps_of_torch(name: str) -> None:
    """Fifty steps from parameters of many shapes are the same."""
    params = parameters()
    steps = gradients(params)
    pair = PAIRS[name]
    check_equal(ours(pair.ours(0.1), params, steps), theirs(pair.torch, 0.1, params, steps))


@every_pair
def test_recipe_takes_the_steps_of_torch_without_some_gradients(name: str) -> None:
    """A parameter without a gradient stands still, and its own steps are counted, as in torch."""
    params = parameters()
    steps = with_gaps(gradients(params))
    pair = PAIRS[name]
    check_equal(ours(pair.ours(0.1), params, steps), theirs(pair.torch, 0.1, params, steps))


@every_pair
def test_schedule_is_torchs_lambda(name: str) -> None:
    """A schedule of the step gives the rates of LambdaLR, also while gradients are missing."""
    params = parameters()
    steps = with_gaps(gradients(params))
    schedule = sf.warmup_cosine_decay_schedule(0.01, 0.1, warmup_steps=10, decay_steps=40)
    pair = PAIRS[name]
    rates = [schedule(step).item() for step in range(STEPS + 1)]
    expected = theirs(pair.torch, 1.0, params, steps, rates.__getitem__)
    check_equal(ours(pair.ours(schedule), params, steps), expected)


@every_pair
def test_learning_rate_in_the_state_is_changed_as_in_torch(name: str) -> None:
    """Putting a new rate into the state is changing it in torch's param group."""
    params = parameters()
    steps = gradients(params)
    pair = PAIRS[name]
    tx = sf.with_hyperparams(lambda learning_rate: pair.ours(learning_rate), learning_rate=0.1)
    state, own, trajectory = tx.init(params), params, []
    for step, gradient in enumerate(steps):
        if step == 25:
            rate = torch.full_like(state.hyperparams["learning_rate"], 0.03)
            state = state._replace(hyperparams={"learning_rate": rate})
        updates, state = tx.update(gradient, state, own)
        own = sf.apply_updates(own, updates)
        trajectory.append(own)

    def rate_of(step: int) -> float:
        return 0.1 if step < 25 else 0.03

    check_equal(trajectory, theirs(pair.torch, 1.0, params, steps, rate_of))
