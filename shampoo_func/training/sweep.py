"""Many runs at once: an optimizer vmapped over its hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo_func import tree
from shampoo_func.errors import HyperparameterError, TreeMismatchError, check_count
from shampoo_func.transforms.base import Averaging
from shampoo_func.transforms.evaluate import eval_params
from shampoo_func.types import Transformation, Tree

__all__ = ["Sweep", "stack_copies", "sweep"]


@dataclass(frozen=True, slots=True)
class Sweep(Averaging):
    """See `sweep`."""

    factory: Callable[..., Transformation]
    values: tuple[tuple[str, Tensor], ...]

    @property
    def name(self) -> str:
        """The name of the transformation inside."""
        return self.children[0].name

    @property
    def children(self) -> tuple[Transformation, ...]:
        """The transformation inside, with the first values."""
        return (self._member([value[0] for _, value in self.values]),)

    def _member(self, values: list[Tensor]) -> Transformation:
        names = [name for name, _ in self.values]
        return self.factory(**dict(zip(names, values, strict=True)))

    def _check_stacked(self, stacked: Tree) -> None:
        """Check that every leaf has the runs first."""
        runs = self.values[0][1].shape[0]
        for index, leaf in enumerate(tree.leaves(stacked)):
            if leaf is not None and (leaf.ndim == 0 or leaf.shape[0] != runs):
                raise TreeMismatchError(
                    f"{tree.path_of(stacked, index)!r} has shape {tuple(leaf.shape)}, but a sweep "
                    f"of {runs} runs needs ({runs}, ...); stack the runs' tensors along a new "
                    "first dimension (stack_copies)."
                )

    def init(self, params: Tree) -> Any:
        """Return the states for stacked parameters, stacked."""
        tree.check_params(params)
        self._check_stacked(params)
        flat, structure = tree.flatten(params)

        def init(leaves: list[Tensor], *values: Tensor) -> Any:
            return self._member(list(values)).init(tree.unflatten(structure, leaves))

        state = torch.func.vmap(init)(flat, *(value for _, value in self.values))
        return tree.materialized(state)

    def update(
        self, updates: Tree, state: Any, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, Any]:
        """Update every member of the sweep with its own hyper-parameters."""
        self.check_call(params, extra)
        tree.check_updates(updates, params, what="the parameter")
        self._check_stacked(updates)
        flat, structure = tree.flatten(updates)
        present = [leaf is not None for leaf in flat]
        param_leaves, param_structure = tree.flatten(() if params is None else params)

        def update(
            own: list[Tensor], state: Any, own_params: list[Tensor], *values: Tensor
        ) -> tuple[list[Tensor], Any]:
            whole = None if params is None else tree.unflatten(param_structure, own_params)
            out, after = self._member(list(values)).update(
                tree.unflatten(structure, tree.filled(present, own)), state, whole, **extra
            )
            return _present(tree.leaves(out)), after

        out, after = torch.func.vmap(update)(
            _present(flat), state, param_leaves, *(value for _, value in self.values)
        )
        return tree.unflatten(structure, tree.filled(present, out)), after

    def averaged(self, state: Any, params: Tree) -> Tree:
        """Return every member's averaged parameters, stacked."""
        self._check_stacked(params)
        flat, structure = tree.flatten(params)
        found: list[bool] = []

        def evaluate(own: list[Tensor], state: Any, *values: Tensor) -> list[Tensor]:
            member = self._member(list(values))
            out = tree.leaves(eval_params(member, state, tree.unflatten(structure, own)))
            found.extend(new is not old for new, old in zip(out, own, strict=True))
            return [new for new, old in zip(out, own, strict=True) if new is not old]

        averages = torch.func.vmap(evaluate)(flat, state, *(value for _, value in self.values))
        whole = zip(flat, tree.filled(found, averages), strict=True)
        return tree.unflatten(structure, [old if new is None else new for old, new in whole])


def _present(leaves: list[Any]) -> list[Tensor]:
    """Return the leaves that are there."""
    return [leaf for leaf in leaves if leaf is not None]


def sweep(factory: Callable[..., Transformation], **values: Tensor) -> Sweep:
    """Run one transformation per value of its hyper-parameters, all at once (`vmap`).

    Parameters, updates and state are stacked: every leaf has the runs first. One call equals
    the separate calls to rounding. Pass `refresh` as True or False (`refresh_due`): with None
    roots are computed at every step, since each run might need them.

    Args:
        factory: Builds the transformation of one run from its hyper-parameters.
        **values: For each hyper-parameter the values, a 1-D tensor `[runs]`.

    Raises:
        HyperparameterError: If there are no values, or they are not 1-D tensors of one length.

    Example:
        >>> from shampoo_func.recipes import sgd
        >>> tx = sweep(sgd, learning_rate=torch.tensor([0.1, 1.0]))
        >>> params = stack_copies({"w": torch.ones(1)}, 2)
        >>> tx.update(params, tx.init(params), params)[0]["w"]
        tensor([[-0.1000],
                [-1.0000]])
    """
    shapes = {
        name: tuple(value.shape) if isinstance(value, Tensor) else None
        for name, value in values.items()
    }
    lengths = set(shapes.values())
    only = next(iter(lengths)) if len(lengths) == 1 else None
    if only is None or len(only) != 1:
        raise HyperparameterError(
            f"sweep needs one or more 1-D tensors of one length, got the shapes {shapes}; build "
            "a grid with torch.cartesian_prod."
        )
    return Sweep(factory, tuple(values.items()))


def stack_copies(params: Tree, runs: int) -> Tree:
    """Return `runs` copies of the parameters, stacked along a new first dimension.

    Args:
        params: The parameters of one run.
        runs: How many copies.

    Raises:
        HyperparameterError: If `runs` is no positive int.

    Example:
        >>> stack_copies({"w": torch.zeros(2)}, 3)["w"].shape
        torch.Size([3, 2])
    """
    check_count("runs", runs)
    return tree.map_params(lambda leaf: torch.stack([leaf] * runs), params)
