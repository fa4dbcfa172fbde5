"""The options of a param group: which there are, what they may be, what is saved of them."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo_func.errors import HyperparameterError, OptimizerError
from shampoo_func.types import Schedule, Transformation

__all__ = [
    "Group",
    "Recipe",
    "check_keys",
    "check_rate",
    "complete",
    "is_object_text",
    "may_be_tensor",
    "options_of",
    "plain",
    "same",
    "shown_rate",
]

Group = dict[str, Any]

OBJECT = "object: "
# What a group may hold besides the options, and the names of torch.optim for some of those.
OWN_KEYS = ("params", "param_names", "maximize", "step", "lr", "lr_schedule")
NAMES_IN_TORCH = {
    "learning_rate": "lr",
    "betas": "beta1 and beta2",
    "eps": "epsilon",
    "alpha": "beta2",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A constructor of transformations whose arguments are the options of a param group.

    factory: called with keyword arguments. defaults: its arguments' values by their name in a
    group, where `learning_rate` is called `lr`.
    """

    factory: Callable[..., Transformation]
    defaults: tuple[tuple[str, Any], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the options."""
        return tuple(name for name, _ in self.defaults)

    def build(self, values: Mapping[str, Any]) -> Transformation:
        """Return the transformation with these options."""
        return self.factory(
            **{("learning_rate" if name == "lr" else name): values[name] for name in self.names}
        )

    @classmethod
    def of(cls, factory: Callable[..., Transformation], given: Mapping[str, Any]) -> Recipe:
        """Describe a constructor whose arguments are `given` or keep their defaults.

        Raises:
            HyperparameterError: If an argument is unknown.
        """
        values: dict[str, Any] = {}
        variadic = False
        for name, parameter in inspect.signature(factory).parameters.items():
            variadic = variadic or parameter.kind is parameter.VAR_KEYWORD
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                values[name] = parameter.default
        if not variadic:
            check_keys(given, tuple(values), strict=True)
        values = {**values, **given}
        named = {("lr" if name == "learning_rate" else name): own for name, own in values.items()}
        return cls(
            factory,
            tuple((name, own) for name, own in named.items() if own is not inspect.Parameter.empty),
        )


def check_keys(given: Mapping[str, Any], names: tuple[str, ...], *, strict: bool = False) -> None:
    """Check the keys of a param group: none that looks like an option but is none.

    Args:
        given: The group, or the arguments of an optimizer.
        names: The options that there are.
        strict: Whether keys that look like no option are refused, too; a group may have keys
            of schedulers and of trainers.

    Raises:
        HyperparameterError: If there is such a key.
    """
    known = {*names, *OWN_KEYS}
    for key in given:
        if key in known:
            continue
        meant = NAMES_IN_TORCH.get(key)
        close = difflib.get_close_matches(key, names, n=1, cutoff=0.85)
        if meant or close or strict:
            hint = f"did you mean {meant or close[0]}?" if meant or close else ""
            raise HyperparameterError(
                f"there is no option {key!r}; {hint or 'the options are ' + ', '.join(names)}"
            )


def may_be_tensor(name: str, value: Any) -> bool:
    """Whether an option can live as a 0-d tensor.

    The numbers 0 and 1 often mean another transformation (no momentum, a sum instead of an
    average), so they stay numbers; a learning rate is a tensor even at 0.
    """
    if name == "lr":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, float) and math.isfinite(value) and value not in (0.0, 1.0)


def same(one: Any, other: Any) -> bool:
    """Whether two values of an option are the same, without looking into tensors."""
    if one is other:
        return True
    simple = (bool, int, float, str, torch.dtype)
    return type(one) is type(other) and isinstance(one, simple) and bool(one == other)


def plain(value: Any) -> Any:
    """Return what `torch.load(weights_only=True)` can read: an object becomes its text."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | Tensor):
        return value
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(plain(item) for item in value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return f"{OBJECT}{value!r}"


def is_object_text(value: Any) -> bool:
    """Whether a saved value stands for an object that could not be saved."""
    return isinstance(value, str) and value.startswith(OBJECT)


def options_of(recipe: Recipe, group: Group) -> dict[str, Any]:
    """Return the options of a group; its learning rate may be a schedule."""
    options = {name: group[name] for name in recipe.names}
    if "lr" in options and "lr_schedule" in group:
        options["lr"] = group["lr_schedule"]
    return options


def complete(group: Group, recipe: Recipe, schedule: Schedule | None) -> None:
    """Fill in what a new group does not say: its step, its peak rate, the rate of a schedule.

    Args:
        group: The group, which is changed.
        recipe: What its options are for.
        schedule: The schedule of the learning rate that is inside the transformation.
    """
    group.setdefault("step", 0)
    rate = group.get("lr")
    if callable(rate) and not isinstance(rate, Tensor):
        schedule = rate
    if schedule is not None:
        group["lr_schedule"] = schedule
    corrected = group.get("weight_decay_kind") in ("corrected", "independent")
    if corrected and group.get("peak_learning_rate", 0.0) is None and schedule is None:
        # every group's decay is relative to its own first rate
        group["peak_learning_rate"] = float(group["lr"])
    shown = shown_rate(recipe, group)
    if shown is not None:
        group["lr"] = shown


def shown_rate(recipe: Recipe, group: Group) -> float | None:
    """Return what `lr` must be in a group whose rate is not its own to change, or None."""
    if "lr_schedule" in group:
        return float(group["lr_schedule"](group["step"]))
    return None if "lr" in recipe.names else 1.0


def check_rate(recipe: Recipe, group: Group) -> None:
    """Check that nobody changed a learning rate that has no effect.

    Raises:
        OptimizerError: If so.
    """
    shown = shown_rate(recipe, group)
    if shown is None or same(shown, group["lr"]):
        return
    why = (
        "the rate is a schedule inside the optimizer; use that or a scheduler of torch.optim, not "
        "both: give a number as the learning rate"
        if "lr_schedule" in group
        else "the transformation has no learning rate; add scale_by_learning_rate(...)"
    )
    raise OptimizerError(f"lr was changed from {shown} to {group['lr']!r}, but {why}.")
