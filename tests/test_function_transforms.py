"""vmap, grad and jvp of whole optimizer runs, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import fresh_compiler, graph_count, whole_graph
from torch import Tensor

import shampoo_func as sf
from shampoo_func import tree

STEPS = 4
RATES = torch.tensor([0.01, 0.03, 0.1], dtype=torch.float64)
DECAYS = torch.tensor([0.8, 0.9, 0.99], dtype=torch.float64)


_GENERATOR = torch.Generator().manual_seed(0)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_GENERATOR, dtype=torch.float64)


START, INPUTS = {"w": _random(5, 4), "b": _random(4)}, _random(12, 5)


def start() -> dict[str, Tensor]:
    """Return the initial parameters of a small regression."""
    return dict(START)


def loss(params: dict[str, Tensor]) -> Tensor:
    """Return a smooth loss."""
    return (torch.tanh(INPUTS @ params["w"] + params["b"]) - 0.3).square().mean()


GRADS = torch.func.grad(loss)


def shampoo(rate: Any, decay: Any, refresh: int = 2) -> sf.Transformation:
    """Return Shampoo as these tests use it: damped enough for finite differences."""
    return sf.shampoo(
        rate, beta2=decay, epsilon=1e-2, block_size=4, refresh_every=refresh, weight_decay=0.1
    )


def adamw(rate: Any, decay: Any) -> sf.Transformation:
    """Return AdamW with two hyper-parameters."""
    return sf.adamw(rate, beta2=decay)


def train(tx: sf.Transformation, params: Any, *, static: bool = True) -> Any:
    """Return the parameters after a few steps."""
    state = tx.init(params)
    for t in range(1, STEPS + 1):
        extra = {"refresh": sf.refresh_due(tx, t) if static else None} if tx.extras else {}
        updates, state = tx.update(GRADS(params), state, params, **extra)
        params = sf.apply_updates(params, updates)
    return params


both = pytest.mark.parametrize("make", [shampoo, adamw])
Make = Callable[..., sf.Transformation]


@both
@pytest.mark.parametrize("static", [True, False])
def test_sweep_by_vmap_equals_separate_runs(make: Make, static: bool) -> None:
    """A vmap over learning rates and beta2 is the separate runs."""
    together = torch.func.vmap(lambda r, d: train(make(r, d), start(), static=static))(
        RATES, DECAYS
    )
    for index, (rate, decay) in enumerate(zip(RATES, DECAYS, strict=True)):
        alone = train(make(float(rate), float(decay)), start())
        for name, leaf in alone.items():
            torch.testing.assert_close(together[name][index], leaf, rtol=1e-9, atol=1e-11)


@both
def test_sweep_stage_equals_separate_runs(make: Make) -> None:
    """`sf.sweep` is that vmap as a transformation, refresh automatic or static."""
    tx = sf.sweep(make, rate=RATES, decay=DECAYS)
    for refresh in (True, None):
        params = sf.stack_copies(start(), 3)
        state = tx.init(params)
        for t in range(1, STEPS + 1):
            flag = sf.refresh_due(tx, t) if refresh else None
            extra = {"refresh": flag} if tx.extras else {}
            grads = torch.func.vmap(GRADS)(params)
            updates, state = tx.update(grads, state, params, **extra)
            params = sf.apply_updates(params, updates)
        for index, (rate, decay) in enumerate(zip(RATES, DECAYS, strict=True)):
            alone = train(make(float(rate), float(decay)), start())
            for name, leaf in alone.items():
                torch.testing.assert_close(params[name][index], leaf, rtol=1e-9, atol=1e-11)


def final_loss(make: Make) -> Callable[[Tensor, Any], Tensor]:
    """Return the loss after training as a function of learning rate and initial parameters."""
    return lambda rate, params: loss(train(make(rate, 0.9), params))


@both
def test_gradient_through_training(make: Make) -> None:
    """D loss / d learning rate and d loss / d initial parameters match finite differences."""
    function = final_loss(make)
    rate, params = RATES[1], start()
    by_rate, by_params = torch.func.grad(function, argnums=(0, 1))(rate, params)
    h = 1e-6
    numeric = (function(rate + h, params) - function(rate - h, params)) / (2 * h)
    torch.testing.assert_close(by_rate, numeric, rtol=1e-6, atol=1e-9)
    direction = tree.map(
        lambda p: torch.cos(torch.arange(p.numel()).reshape(p.shape)).double(), params
    )
    up = function(rate, tree.map(lambda p, d: p + h * d, params, direction))
    down = function(rate, tree.map(lambda p, d: p - h * d, params, direction))
    slope = sum((by_params[name] * direction[name]).sum() for name in params)
    torch.testing.assert_close(slope, (up - down) / (2 * h), rtol=1e-6, atol=1e-9)


@both
def test_jvp_equals_gradient(make: Make) -> None:
    """The forward-mode derivative by the learning rate is the reverse-mode one."""
    function = final_loss(make)
    one = torch.ones_like(RATES[1])
    value, tangent = torch.func.jvp(lambda rate: function(rate, start()), (RATES[1],), (one,))[:2]
    torch.testing.assert_close(value, function(RATES[1], start()))
    torch.testing.assert_close(
        tangent, torch.func.grad(function)(RATES[1], start()), rtol=1e-9, atol=1e-12
    )


def test_gradient_with_rank_deficient_factors() -> None:
    """Repeated eigenvalues (a factor of rank 1) do not spoil the derivative of a root."""
    vector = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    root = sf.eigh_root(1e-3)

    def function(v: Tensor) -> Tensor:
        return (root(torch.outer(v, v), 0.25).value @ v).square().sum()

    gradient, h = torch.func.grad(function)(vector), 1e-6
    for index in range(4):
        e = torch.eye(4, dtype=torch.float64)[index] * h
        numeric = (function(vector + e) - function(vector - e)) / (2 * h)
        torch.testing.assert_close(gradient[index], numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@both
def test_compiled_transforms(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep, the gradient and the jvp are the same when compiled as one graph."""
    monkeypatch.setitem(globals(), "STEPS", 2)
    function = final_loss(make)
    one = torch.ones_like(RATES[1])
    programs: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (
            lambda r, d: torch.func.vmap(lambda a, b: train(make(a, b), start()))(r, d),
            (RATES, DECAYS),
        ),
        (lambda r: torch.func.grad(function, argnums=(0, 1))(r, start()), (RATES[1],)),
        (lambda r: torch.func.jvp(lambda s: function(s, start()), (r,), (one,)), (RATES[1],)),
    ]
    for program, arguments in programs:
        expected = program(*arguments)
        with fresh_compiler("aot_eager") as counter:
            compiled = whole_graph(program, counter)
            found = compiled(*arguments)
            assert graph_count(compiled) == 1
        for a, b in zip(tree.leaves(found), tree.leaves(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
