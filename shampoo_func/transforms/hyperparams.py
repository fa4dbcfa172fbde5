"""Hyper-parameters as leaves of the state, to be changed, swept and differentiated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_func import linalg, tree
from shampoo_func.errors import HyperparameterError
from shampoo_func.transforms.scaling import first_step
from shampoo_func.types import Transformation, Tree

__all__ = ["WithHyperparams", "WithHyperparamsState", "with_hyperparams"]


class WithHyperparamsState(NamedTuple):
    """hyperparams: a 0-d tensor per name; replace one to change it. inner: the state inside."""

    hyperparams: dict[str, Tensor]
    inner: Any


@dataclass(frozen=True, slots=True)
class WithHyperparams(Transformation):
    """See `with_hyperparams`."""

    factory: Callable[..., Transformation]
    hyperparams: tuple[tuple[str, Any], ...]
    static: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """The name of the stage inside."""
        return self._build(dict(self.hyperparams)).name

    @property
    def children(self) -> tuple[Transformation, ...]:
        """The stage inside, with the first values."""
        return (self._build(dict(self.hyperparams)),)

    def _build(self, hyperparams: dict[str, Any]) -> Transformation:
        return self.factory(**hyperparams, **dict(self.static))

    def init(self, params: Tree) -> WithHyperparamsState:
        """Return the hyper-parameters as tensors, and the inner state."""
        device = first_step(params).step.device
        values = {
            name: value.clone()
            if isinstance(value, Tensor)
            else torch.tensor(value, dtype=linalg.scalar_dtype(device), device=device)
            for name, value in self.hyperparams
        }
        return WithHyperparamsState(values, self._build(values).init(params))

    def update(
        self, updates: Tree, state: WithHyperparamsState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, WithHyperparamsState]:
        """Update with the hyper-parameters that the state holds now."""
        self.check_call(params, extra)
        tree.check_updates(updates, params, what="the parameter")
        values = self._values(state)
        out, inner = self._build(values).update(updates, state.inner, params, **extra)
        return out, WithHyperparamsState(values, inner)

    def build_from(self, state: WithHyperparamsState) -> Transformation:
        """Return the stage inside, with the hyper-parameters that the state holds now."""
        return self._build(self._values(state))

    def _values(self, state: WithHyperparamsState) -> dict[str, Tensor]:
        """Return the hyper-parameters of a state in the order of this transformation."""
        names = [name for name, _ in self.hyperparams]
        if sorted(state.hyperparams) != sorted(names):
            raise HyperparameterError(
                f"the state holds the hyper-parameters {sorted(state.hyperparams)}, but this "
                f"transformation has {sorted(names)}; change values, not names."
            )
        return {name: state.hyperparams[name] for name in names}


def _becomes_leaf(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, float) and math.isfinite(value))


def with_hyperparams(
    factory: Callable[..., Transformation], /, **arguments: Any
) -> WithHyperparams:
    """Build a transformation whose float arguments live in the state as 0-d tensors.

    Finite floats and 0-d tensors become leaves of `state.hyperparams`; every other argument
    (ints, bools, strings, schedules, dtypes, infinity) stays as it is. Changing a leaf does not
    recompile, and `vmap` and `grad` see it like any other input.

    Args:
        factory: A recipe or constructor, e.g. `shampoo`; a module-level function keeps the
            result picklable.
        **arguments: Its arguments, by name.

    Raises:
        HyperparameterError: If no argument is a float or tensor, or one is out of range.

    Example:
        >>> from shampoo_func.transforms import scale_by_learning_rate
        >>> tx = with_hyperparams(scale_by_learning_rate, learning_rate=0.1)
        >>> state = tx.init(torch.zeros(1))
        >>> state.hyperparams["learning_rate"] = torch.tensor(0.5)
        >>> tx.update(torch.ones(1), state)[0]
        tensor([-0.5000])
    """
    if not callable(factory):
        raise HyperparameterError(f"with_hyperparams needs a constructor, got {factory!r}.")
    factory(**arguments)  # numbers are validated here; as tensors they no longer can be
    leaves = tuple((name, value) for name, value in arguments.items() if _becomes_leaf(value))
    if not leaves:
        raise HyperparameterError(
            f"none of the arguments {sorted(arguments)} is a float or a tensor; write 1.0 for 1."
        )
    taken = {name for name, _ in leaves}
    static = tuple((name, value) for name, value in arguments.items() if name not in taken)
    return WithHyperparams(factory, leaves, static)
