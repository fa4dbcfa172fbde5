"""Powers of the second moment other than the root."""

from __future__ import annotations

import pytest
import torch

import shampoo_func as sf
from shampoo_func.errors import HyperparameterError


@pytest.mark.parametrize(("shape", "power"), [((3,), 1.0), ((3, 2), 0.25), ((3, 2, 2), 0.5)])
def test_power_goes_by_the_order_of_the_block(shape: tuple[int, ...], power: float) -> None:
    """U / (V^p + epsilon), for one block and for a stack of them; 1/2 where nothing is said."""
    tx = sf.second_moment(0.8, epsilon=0.1, exponents={1: 1.0, 2: 0.25})
    stack = torch.randn(4, *shape, dtype=torch.float64)
    average = torch.zeros_like(stack)
    state = torch.func.vmap(tx.init)(stack)
    for step in range(1, 4):
        state = tx.accumulate(state, stack * step)
        average = 0.8 * average + 0.2 * (stack * step) ** 2
    expected = stack / ((average / (1 - 0.8**3)) ** power + 0.1)
    torch.testing.assert_close(tx.apply(state, stack), expected, rtol=1e-12, atol=0)
    one = type(state)(*(leaf[1] for leaf in state))
    torch.testing.assert_close(tx.apply(one, stack[1]), expected[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("exponents", [{0: 0.5}, {1: 0.0}, {1: -1.0}, {"1": 0.5}, 0.25])
def test_powers_are_checked(exponents: object) -> None:
    """Orders are positive ints, powers positive numbers."""
    with pytest.raises(HyperparameterError, match="exponents"):
        sf.second_moment(exponents=exponents)  # type: ignore[arg-type]
