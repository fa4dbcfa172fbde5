"""The state of param groups by parameter, as torch.optim saves it, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from shampoo_func.checkpoint import Entry, fill, named_entries
from shampoo_func.errors import CheckpointError
from shampoo_func.torch_optim.member import Member, Params
from shampoo_func.torch_optim.options import (
    Group,
    Recipe,
    check_rate,
    is_object_text,
    options_of,
    shown_rate,
)

__all__ = ["by_name", "loaded_group", "loaded_member", "named_groups"]

Named = dict[str, dict[str, Tensor]]
SHARED = "shared:"


def by_name(member: Member, params: Params) -> Named:
    """Return views of a group's state by parameter and name.

    What belongs to no parameter (the step of a schedule) is with the group's first, under a
    name that begins with `shared:`.
    """
    found: Named = {name: {} for name in params}
    if member.names:
        for (owner, name), entry in _located(member, params).items():
            found[owner or member.names[0]][name] = entry.tensor
    return found


def loaded_group(recipe: Recipe, group: Group, saved: Mapping[str, Any]) -> Group:
    """Return a group with the saved options, for its own parameters.

    An option that is an object was saved as its text, and keeps the value that it has.
    """
    loaded = dict(group)
    for key, value in saved.items():
        if key not in ("params", "param_names", "lr_schedule") and not is_object_text(value):
            loaded[key] = copy.deepcopy(value)
    shown = shown_rate(recipe, loaded)
    if shown is not None:
        loaded["lr"] = shown
    check_rate(recipe, loaded)
    recipe.build(options_of(recipe, loaded))
    return loaded


def loaded_member(member: Member, params: Params, saved: Mapping[str, Any]) -> None:
    """Fill a new member with saved state.

    Args:
        member: Made of the loaded options; gets a state.
        params: The group's parameters.
        saved: By parameter what `by_name` returned; a frozen parameter may be left out.

    Raises:
        CheckpointError: If it does not fit; the message names parameter and leaf.
    """
    absent = [name for name, param in params.items() if param.requires_grad and name not in saved]
    if absent:
        raise CheckpointError(
            f"there is no state for the parameter {absent[0]!r} ({len(absent)} are missing); load "
            "a state of the same parameters."
        )
    values: dict[str, Tensor] = {}
    for owner, own in saved.items():
        for name, value in own.items():
            shared = name.startswith(SHARED)
            values[name if shared else f"{owner}: {name}"] = value
    known = [name for name in params if any(key.startswith(f"{name}: ") for key in values)]
    trained = [name for name, param in params.items() if param.requires_grad]
    chosen = known or trained
    member.admit({name: params[name] for name in chosen}, frozen=True)
    entries = {
        name if owner is None else f"{owner}: {name}": entry
        for (owner, name), entry in _located(member, params).items()
    }
    fill(entries, values)


def named_groups(state_dict: Mapping[str, Any], groups: list[Params]) -> list[dict[str, Any]]:
    """Return a state dict's state by group and parameter name.

    Args:
        state_dict: In the shape of torch.optim; parameters are numbers or names in it.
        groups: The parameters of every group of the optimizer.

    Raises:
        CheckpointError: If the groups or their sizes differ.
    """
    saved_groups = state_dict["param_groups"]
    seen = [len(saved["params"]) for saved in saved_groups]
    wanted = [len(params) for params in groups]
    if seen != wanted:
        raise CheckpointError(
            f"the state has param groups of {seen} parameters, the optimizer of {wanted}; make the "
            "same groups first."
        )
    found = []
    for saved, params in zip(saved_groups, groups, strict=True):
        names = saved.get("param_names")
        # torch.optim goes by the order; names are better where both have the same
        order = names if names and set(names) == set(params) else list(params)
        pairs = zip(order, saved["params"], strict=True)
        states = state_dict["state"]
        found.append({name: states[key] for name, key in pairs if key in states})
    return found


def _located(member: Member, params: Params) -> dict[tuple[str | None, str], Entry]:
    """Return the entries of a member by the parameter, if any, and the name without it."""
    chosen = {name: params[name] for name in member.names}
    return {
        (entry.place.path, entry.local)
        if entry.place.path
        else (None, f"{SHARED}{entry.local}"): entry
        for entry in named_entries(member.tx, member.state, chosen).values()
    }
