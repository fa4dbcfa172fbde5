"""What makes a plain step cheap: sums inside products, fewer statistics, narrower products."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import shampoo_func as sf
from shampoo_func import linalg

Tensor = torch.Tensor


def gradients(count: int, *shape: int) -> list[Tensor]:
    """Return the same random gradients every time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@given(
    batch=st.lists(st.integers(0, 3), max_size=2),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    data=st.data(),
    decay=st.floats(0, 1),
    weight=st.floats(0, 2),
)
def test_add_gram_is_the_sum(
    batch: list[int], sizes: list[int], data: st.DataObject, decay: float, weight: float
) -> None:
    """Decay F + weight G G^T, for any batch dimensions and orders."""
    dim = data.draw(st.integers(0, len(sizes) - 1))
    blocks = torch.randn(*batch, *sizes, dtype=torch.float64)
    factor = torch.randn(*batch, sizes[dim], sizes[dim], dtype=torch.float64)
    found = linalg.add_gram(factor, blocks, dim, len(sizes), decay=decay, weight=weight)
    wanted = decay * factor + weight * linalg.gram(blocks, dim, len(sizes))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def donated_step(tx: sf.Transformation) -> Any:
    """Return a compiled step that writes over its state."""

    def step(params: Any, state: Any, grads: Any, **extra: Any) -> Any:
        updates, state = tx.update(grads, state, params, **extra)
        return sf.apply_updates(params, updates), state

    return torch.compile(sf.donate(step), fullgraph=True)


@pytest.mark.slow
def test_a_donated_step_keeps_no_stack_of_gram_matrices() -> None:
    """What a plain step allocates at once is at most 2.5 times the parameters."""
    tx = sf.shampoo(0.1, beta2=0.9, block_size=32, refresh_every=2)
    params = {"w": torch.randn(128, 128), "v": torch.randn(64, 160)}
    grads = {name: torch.randn_like(leaf) for name, leaf in params.items()}
    state, step = tx.init(params), donated_step(tx)
    for _ in range(2):
        step(params, state, grads, refresh=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        step(params, state, grads, refresh=False)
    held = peak = 0
    for event in traced.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    size = sum(leaf.nbytes for leaf in params.values())
    assert 0 < peak <= 2.5 * size


class CountProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("bmm", "baddbmm", "mm", "addmm")
        return func(*args, **(kwargs or {}))


def test_subsampled_statistics_are_those_of_every_kth_gradient() -> None:
    """Factors see the gradients 1, 4, 7; the direction is of every one; others cost nothing."""
    inner = sf.kronecker(0.9, root=sf.eigh_root(1e-3))
    tx = sf.subsampled(inner, every=3)
    state, wanted = tx.init(torch.zeros(4, 3).double()), inner.init(torch.zeros(4, 3).double())
    products = []
    for index, grad in enumerate(gradients(8, 4, 3)):
        with CountProducts() as counted:
            state = tx.accumulate(state, grad)
        products.append(counted.count)
        if index % 3 == 0:
            wanted = inner.accumulate(wanted, grad)
    assert products == [2, 0, 0, 2, 0, 0, 2, 0]
    torch.testing.assert_close(state.inner, wanted, rtol=0, atol=0)
    state, wanted = tx.refresh(state), inner.refresh(wanted)
    probe = gradients(1, 4, 3)[0]
    torch.testing.assert_close(tx.apply(state, probe), inner.apply(wanted, probe), rtol=0, atol=0)


def test_shampoo_subsamples_the_direction_only() -> None:
    """The grafted method sees every gradient."""
    tx = sf.shampoo(0.1, beta2=0.9, refresh_every=2, statistics_every=4)
    params = torch.zeros(4, 3, dtype=torch.float64)
    state = tx.init(params)
    for grad in gradients(5, 4, 3):
        _, state = tx.update(grad, state, params)
    own = state["precondition"]["12"].preconditioner
    assert (own.direction.inner.step.item(), own.magnitude.step.item()) == (2, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_the_roots_in_another_dtype(dtype: torch.dtype) -> None:
    """Only the direction is rounded, by as much as the dtype has; state and result keep theirs."""
    exact = sf.kronecker(0.9, root=sf.eigh_root(1e-3))
    rounded = sf.kronecker(0.9, root=sf.eigh_root(1e-3), apply_dtype=dtype)
    states = []
    for tx in (exact, rounded):
        state = tx.init(torch.zeros(16, 12, dtype=torch.float64))
        for grad in gradients(4, 16, 12):
            state = tx.accumulate(state, grad)
        states.append(tx.refresh(state))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    probe = gradients(1, 16, 12)[0]
    wanted, found = exact.apply(states[0], probe), rounded.apply(states[1], probe)
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert found.dtype == wanted.dtype
    assert 0 < error < 2 * torch.finfo(dtype).eps
