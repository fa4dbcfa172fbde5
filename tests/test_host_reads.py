"""No step reads from its device, unless it says so: on a GPU each reading is a wait.

Tensors on the device "meta" have no values: what would wait for a GPU raises there, on any
machine. tests/test_cuda.py asks a GPU itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalogue import CASES, Case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import shampoo_func as sf

Tensor = torch.Tensor

SHAPES = {"kernel": (6, 4), "bias": (4,)}
# What decides on the device whether there is work to do, and does the work only then.
READ_WHEN_PLAIN = {"accumulate", "subsampled"}
# What decomposes (LAPACK and cuSOLVER look at the values), or asks which matrices need work.
READ_WHEN_REFRESHING = READ_WHEN_PLAIN | {
    "adaptive",
    "apply_if_finite",
    "kl_shampoo",
    "kl_soap",
    "partition",
    "precondition",
    "scale_by_shampoo",
    "shampoo",
    "shampoo_options",
    "shampoo_packed",
    "soap",
    "staggered",
}


class OneDevice(TorchDispatchMode):
    """Refuse operations between devices; numbers and 0-d tensors of the host are none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.ndim}
        assert len(devices) <= 1, f"{func} copies between {devices}"
        return result


def step_on_meta(tx: sf.Transformation, *, refresh: bool, steps: int = 2) -> None:
    """Take steps on tensors that have no values."""
    params = {name: torch.empty(shape, device="meta") for name, shape in SHAPES.items()}
    extra = {"refresh": refresh} if "refresh" in tx.extras else {}
    state = tx.init(params)
    with OneDevice():
        for _ in range(steps):
            updates, state = tx.update(params, state, params, **extra)
            params = sf.apply_updates(params, updates)


def reads(tx: sf.Transformation, *, refresh: bool) -> bool:
    """Whether a step asks for a value."""
    try:
        step_on_meta(tx, refresh=refresh)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        return True
    return False


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_steps_read_nothing(case: Case) -> None:
    """A step without a refresh waits for nothing, whatever the stage."""
    assert reads(case.make(), refresh=False) is (case.name in READ_WHEN_PLAIN)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_refreshes_read_nothing_but_for_decompositions(case: Case) -> None:
    """A refresh waits only where it decomposes, or where it does not do all of the work."""
    assert reads(case.make(), refresh=True) is (case.name in READ_WHEN_REFRESHING)


@pytest.mark.parametrize("policy", [None, sf.every(3), sf.staggered(2)], ids=str)
@pytest.mark.parametrize(
    "root",
    [
        sf.newton_root(1e-6, iterations=20),
        sf.higher_order_newton_root(1e-6, iterations=10),
        sf.newton_db_root(1e-6, iterations=20),
        sf.newton_schulz_root(1e-6),
        sf.chebyshev_root(1e-6),
    ],
    ids=lambda root: type(root).__name__,
)
def test_roots_by_products_read_nothing(root: Any, policy: Any) -> None:
    """A refresh by a fixed number of matrix products needs no answer from the device."""
    options = {"policy": policy} if policy else {"refresh_every": 3}
    step_on_meta(sf.shampoo(0.1, block_size=4, beta2=0.9, root=root, **options), refresh=True)


def test_readings_and_copies_are_seen() -> None:
    """What the tests above rely on."""
    with pytest.raises(AssertionError, match="copies between"), OneDevice():
        torch.ones(2).to("meta")
    until_converged = sf.newton_root(1e-6)
    assert reads(sf.shampoo(0.1, block_size=4, root=until_converged), refresh=True)
