"""Weight decay as a stage: where it stands in the chain decides what kind it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo_func import linalg, tree
from shampoo_func.errors import check_number
from shampoo_func.transforms.scaling import ScheduleState, first_step
from shampoo_func.types import EmptyState, Scalar, Schedule, Transformation, Tree

__all__ = ["AddDecayedWeights", "add_decayed_weights"]


@dataclass(frozen=True, slots=True)
class AddDecayedWeights(Transformation):
    """See `add_decayed_weights`."""

    weight_decay: Scalar | Schedule

    @property
    def needs_params(self) -> bool:
        """Decay is proportional to the parameters."""
        return True

    @property
    def _scheduled(self) -> bool:
        return callable(self.weight_decay) and not isinstance(self.weight_decay, Tensor)

    def init(self, params: Tree) -> EmptyState | ScheduleState:
        """Return a counter if the decay is a schedule, else the empty state."""
        tree.check_params(params)
        return first_step(params) if self._scheduled else EmptyState()

    def update(
        self, updates: Tree, state: Any, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, Any]:
        """Add `weight_decay * params` to the updates."""
        self.check_call(params, extra)
        tree.check_updates(updates, params, what="the parameter")
        decay: Any = self.weight_decay
        if self._scheduled:
            decay, state = decay(state.step), ScheduleState(state.step + 1)

        def decayed(update: Tensor, param: Tensor) -> Tensor:
            return (update + linalg.scaled(param, decay)).to(update.dtype)

        return tree.map(decayed, updates, params), state


def add_decayed_weights(weight_decay: Scalar | Schedule) -> AddDecayedWeights:
    """Add `weight_decay * params` to the updates.

    Before the preconditioner this is L2 regularisation; after it, decoupled decay (arXiv
    1711.05101); wrap it in `masked` to decay only some parameters.

    Args:
        weight_decay: A number >= 0, a 0-d tensor, or a schedule of the step.

    Raises:
        HyperparameterError: If it is a negative or NaN number.

    Example:
        >>> tx, params = add_decayed_weights(0.1), torch.tensor([10.0])
        >>> tx.update(torch.tensor([1.0]), tx.init(params), params)[0]
        tensor([2.])
    """
    if not callable(weight_decay) or isinstance(weight_decay, torch.Tensor):
        check_number("weight_decay", weight_decay)
    return AddDecayedWeights(weight_decay)
