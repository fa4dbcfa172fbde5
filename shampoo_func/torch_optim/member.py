"""One param group's transformation and state, kept in step with the group's options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.checkpoint import carried_over, first_state
from shampoo_func.errors import HyperparameterError, RefreshError
from shampoo_func.torch_optim.options import Group, Recipe, may_be_tensor, options_of, same
from shampoo_func.training import refresh_due
from shampoo_func.types import Transformation

__all__ = ["Member", "named_params"]

Params = dict[str, Tensor]


def named_params(group: Group, offset: int) -> Params:
    """Return the parameters of a group by name, or by their number in the optimizer.

    Args:
        group: The param group.
        offset: The number of its first parameter.
    """
    names = group.get("param_names") or [str(offset + i) for i in range(len(group["params"]))]
    return dict(zip(names, group["params"], strict=True))


@dataclass(slots=True)
class Member:
    """What a param group is made into, from its first step on.

    tx: the transformation as the options are now. values: those options. tensors: those of them
    that are 0-d tensors, to be written or passed to a compiled step. static: the others, the
    same dict as long as nothing but tensors changes. living: the options that may be tensors.
    state: the state of tx for the parameters in `names`. device: where it is.
    """

    tx: Transformation
    values: dict[str, Any]
    tensors: dict[str, Tensor]
    static: dict[str, Any]
    living: frozenset[str]
    device: torch.device
    names: tuple[str, ...] = ()
    state: Any = None

    @classmethod
    def of(
        cls, recipe: Recipe, group: Group, living: frozenset[str], device: torch.device
    ) -> Member:
        """Build the transformation of a group.

        Raises:
            HyperparameterError: If an option is out of range.
        """
        values = options_of(recipe, group)
        recipe.build(values)  # numbers are checked here; as tensors they no longer can be
        tensors = {
            name: value
            if isinstance(value, Tensor)
            else torch.tensor(value, dtype=linalg.scalar_dtype(device), device=device)
            for name, value in values.items()
            if isinstance(value, Tensor) or (name in living and may_be_tensor(name, value))
        }
        static = {name: value for name, value in values.items() if name not in tensors}
        tx = recipe.build({**static, **tensors})
        return cls(tx, values, tensors, static, living, device)

    def follow(self, recipe: Recipe, group: Group, params: Params, device: torch.device) -> Member:
        """Return the member that the group's options make now; most often this one.

        An option that changes for the first time becomes a tensor, and from then on a change
        is a write into that tensor. Another kind of change builds the member anew and carries
        the state over.

        Raises:
            HyperparameterError: If an option is out of range, or cannot be changed any more.
        """
        options = options_of(recipe, group)
        changed = [name for name, value in self.values.items() if not same(value, options[name])]
        # a tensor that the user gave is not ours to write
        ours = [name for name in self.tensors if not isinstance(self.values[name], Tensor)]
        written = {name: options[name] for name in changed if name in ours}
        moved = device != self.device or len(written) < len(changed)
        if moved or not all(may_be_tensor(name, value) for name, value in written.items()):
            return self._rebuilt(recipe, group, params, changed, device)
        if written:
            recipe.build({**self.values, **written})
        for name, value in written.items():
            self.tensors[name].fill_(value)
        self.values.update(written)
        if written or any(isinstance(value, Tensor) for value in self.values.values()):
            # stages may hold what was computed from a tensor: rate / peak
            self.tx = recipe.build({**self.static, **self.tensors})
        return self

    def _rebuilt(
        self,
        recipe: Recipe,
        group: Group,
        params: Params,
        changed: list[str],
        device: torch.device,
    ) -> Member:
        living = self.living | set(changed)
        after = Member.of(recipe, group, living, device)
        after.names = self.names
        if self.state is None:
            return after
        kept = {name: params[name] for name in self.names}
        after.state, lost = carried_over((self.tx, self.state, kept), after.tx, kept)
        fixed = [name for name in changed if not isinstance(self.values[name], float)]
        if lost and fixed:
            raise HyperparameterError(
                f"the option {fixed[0]!r} cannot become {group[fixed[0]]!r} after the first step: "
                f"the state would lose {lost[0]!r}. Set it before, or make a new optimizer."
            )
        return after

    def admit(self, params: Params, *, frozen: bool = False) -> None:
        """Make a state for the parameters that are trained, if they have none yet.

        Args:
            params: The group's parameters.
            frozen: Whether for those that need no gradients, too.
        """
        new = [
            name
            for name, param in params.items()
            if name not in self.names and (frozen or param.requires_grad or param.grad is not None)
        ]
        if self.state is not None and not new:
            return
        names = (*self.names, *new)
        known = {name: params[name] for name in self.names}
        chosen = {name: params[name] for name in params if name in names}
        if self.state is None:
            self.state = first_state(self.tx, chosen)
        else:
            self.state, _ = carried_over((self.tx, self.state, known), self.tx, chosen)
        self.names = tuple(chosen)

    def refresh(self, step: int) -> bool | None:
        """Return whether update number `step` recomputes the roots; None to let the state say."""
        if "refresh" not in self.tx.extras:
            return False
        try:
            return refresh_due(self.tx, step)
        except RefreshError:
            return None
