"""On a GPU: no step waits for the device, and both graphs are captured as CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import shampoo_func as sf

Tensor = torch.Tensor

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

SHAPES = {"embed": (96, 64), "weight": (64, 128), "bias": (64,)}


def tree_on_gpu(seed: int) -> dict[str, Tensor]:
    """Return a tree of random tensors."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, device="cuda")
        for name, shape in SHAPES.items()
    }


def optimizer(**options: Any) -> sf.Transformation:
    """Return Shampoo with the roots that need no answer from the host."""
    settings = {"policy": None, "refresh_every": 3, **options}
    return sf.shampoo(
        1e-2, beta2=0.9, block_size=64, root=sf.newton_root(1e-6, iterations=20), **settings
    )


def step_of(tx: sf.Transformation) -> Any:
    """Return a pure step."""

    def step(params: Any, state: Any, grads: Any, **extra: Any) -> Any:
        updates, state = tx.update(grads, state, params, **extra)
        return sf.apply_updates(params, updates), state

    return step


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make every synchronisation an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("refresh", [True, False])
def test_a_step_does_not_wait_for_the_device(refresh: bool) -> None:
    """Neither a plain step nor one with Newton roots asks the device for a value."""
    tx, params = optimizer(), tree_on_gpu(0)
    grads, state = tree_on_gpu(1), tx.init(params)
    with no_waiting():
        for _ in range(2):
            params, state = step_of(tx)(params, state, grads, refresh=refresh)


def test_staggered_refreshes_do_not_wait_either() -> None:
    """Which blocks are due is decided on the device."""
    tx = optimizer(policy=sf.staggered(3))
    params, grads = tree_on_gpu(0), tree_on_gpu(1)
    state = tx.init(params)
    with no_waiting():
        step_of(tx)(params, state, grads, refresh=False)


@pytest.mark.slow
def test_both_graphs_are_captured() -> None:
    """mode="reduce-overhead" gives the numbers of eager code, with and without a refresh."""
    tx = optimizer()
    compiled = torch.compile(sf.donate(step_of(tx)), fullgraph=True, mode="reduce-overhead")
    params, wanted = tree_on_gpu(0), tree_on_gpu(0)
    state, wanted_state = tx.init(params), tx.init(wanted)
    for number in range(1, 10):
        grads, refresh = tree_on_gpu(number), sf.refresh_due(tx, number)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        params, state = compiled(params, state, grads, refresh=refresh)
        wanted, wanted_state = step_of(tx)(wanted, wanted_state, grads, refresh=refresh)
    for name, leaf in params.items():
        torch.testing.assert_close(leaf, wanted[name], rtol=1e-3, atol=1e-4)


def test_gpu_equals_cpu() -> None:
    """In float64 the numbers are those of a CPU."""
    tx = sf.shampoo(1e-2, beta2=0.9, block_size=64, refresh_every=3, epsilon=1e-3)
    results = []
    for device in ("cpu", "cuda"):
        params = {name: leaf.to(device, torch.float64) for name, leaf in tree_on_gpu(0).items()}
        state = tx.init(params)
        for number in range(1, 8):
            grads = {n: leaf.to(device, torch.float64) for n, leaf in tree_on_gpu(number).items()}
            params, state = step_of(tx)(params, state, grads)
        results.append(params)
    for name, leaf in results[0].items():
        torch.testing.assert_close(leaf, results[1][name].cpu(), rtol=1e-8, atol=1e-10)
