"""What a checkpoint holds besides the state: parameters, and whatever else a run needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shampoo_func import tree
from shampoo_func.checkpoint import metadata
from shampoo_func.checkpoint.flat import to_state_dict
from shampoo_func.errors import CheckpointError
from shampoo_func.types import Transformation, Tree

__all__ = ["Checkpoint", "empty_extra", "gathered", "named_params", "unpacked_extra"]

EXTRA = "extra/"
PLAIN = "/json"


class Checkpoint(NamedTuple):
    """What `load_checkpoint` returns.

    params: The parameters, stored as those given. state: The state of the transformation.
    extra: What `save_checkpoint` was given as `extra`.
    """

    params: Tree
    state: Any
    extra: dict[str, Any]


def gathered(
    tx: Transformation,
    state: Any,
    params: Tree,
    extra: Mapping[str, Any],
    *,
    pack_symmetric: bool,
    copy: bool,
) -> dict[str, Tensor]:
    """Return all that is to be saved as one flat dict.

    Args:
        tx: The transformation.
        state: Its state.
        params: The parameters.
        extra: Tensors and plain data by name.
        pack_symmetric: See `to_state_dict`.
        copy: Whether nothing may share memory with what was given; the state never does.

    Raises:
        CheckpointError: If something cannot be saved, or two things have one name.
    """
    beside = {**named_params(params), **_packed_extra(extra)}
    if copy:
        beside = {key: leaf.clone() for key, leaf in beside.items()}
    return {**to_state_dict(tx, state, params, pack_symmetric=pack_symmetric), **beside}


def named_params(params: Tree) -> dict[str, Tensor]:
    """Return the parameters under `params/<path>`; a bare tensor under `params`.

    Raises:
        CheckpointError: If two have the same path.
    """
    if isinstance(params, Tensor):
        return {"params": params.detach()}
    paths = tree.paths(params)
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise CheckpointError(f"two parameters have the path {twice[0]!r}; rename one of them.")
    leaves = zip(paths, tree.leaves(params), strict=True)
    return {f"params/{path}": leaf.detach() for path, leaf in leaves}


def _packed_extra(extra: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in extra.items():
        if not isinstance(name, str) or name.endswith(PLAIN):
            raise CheckpointError(
                f"extra has the name {name!r}; a name is text that does not end in {PLAIN!r}."
            )
        if isinstance(value, Tensor):
            found[EXTRA + name] = value.detach()
        else:
            found[EXTRA + name + PLAIN] = _plain(name, value)
    return found


def _plain(name: str, value: Any) -> Tensor:
    try:
        return metadata.encode(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"extra[{name!r}] is neither a tensor nor plain data that JSON holds ({error})."
        ) from error


def unpacked_extra(saved: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the extras among saved tensors, as they were given."""
    found: dict[str, Any] = {}
    for key, value in saved.items():
        if key.startswith(EXTRA):
            name = key.removeprefix(EXTRA)
            plain = name.endswith(PLAIN)
            found[name.removesuffix(PLAIN)] = metadata.decode(value, key) if plain else value
    return found


def empty_extra(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors for the extras that a folder holds."""
    return {
        key: torch.empty(own.shape, dtype=own.dtype)
        for key, own in stored.items()
        if key.startswith(EXTRA)
    }
