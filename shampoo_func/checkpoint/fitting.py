"""Whether saved tensors fit those that are to take them: names, shapes, dtypes, before any copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from shampoo_func.checkpoint import packing
from shampoo_func.checkpoint.entries import Entry
from shampoo_func.errors import CheckpointError
from shampoo_func.sharding import stored_like

__all__ = ["UPPER", "check_fit", "fill", "find", "fits", "put"]

UPPER = "/upper"


def check_fit(
    wanted: Mapping[str, Tensor], saved: Mapping[str, Any], *, elsewhere: Iterable[str] = ()
) -> None:
    """Check that there is a fitting saved tensor for each that is wanted, and nothing else.

    Args:
        wanted: Tensors of the shapes and dtypes that are wanted.
        saved: The values, which may be on the meta device; each under the name of what it is
            for, with `/upper` if packed.
        elsewhere: Names of what other ranks want, which `saved` may hold too.

    Raises:
        CheckpointError: If names, shapes or dtypes differ.
    """
    problems: list[str] = []
    missing = [key for key in wanted if key not in saved and key + UPPER not in saved]
    names = {*wanted, *elsewhere}
    known = {*names, *(key + UPPER for key in names)}
    problems += _listed("missing", missing)
    problems += _listed("unexpected", [key for key in saved if key not in known])
    different = [
        f"{key!r} is {_kind(value, packed)}, expected {_kind(tensor)}"
        for key, tensor in wanted.items()
        for value, packed in (find(key, saved),)
        if value is not None and not fits(value, packed, tensor)
    ]
    problems += different[:3]
    problems += [f"and {len(different) - 3} more"] if len(different) > 3 else []
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit: {'; '.join(problems)}. Build the optimizer with the "
            "settings, and for the parameters, that it was saved with."
        )


def fill(
    entries: Mapping[str, Entry], saved: Mapping[str, Tensor], *, elsewhere: Iterable[str] = ()
) -> None:
    """Copy saved tensors into the entries of the same names, after checking them all.

    Args:
        entries: What is to be written.
        saved: See `check_fit`.
        elsewhere: See `check_fit`.

    Raises:
        CheckpointError: If names, shapes or dtypes differ.
    """
    wanted = {key: entry.tensor for key, entry in entries.items()}
    check_fit(wanted, saved, elsewhere=elsewhere)
    for key, tensor in wanted.items():
        put(*find(key, saved), tensor)


def put(value: Any, packed: bool, tensor: Tensor) -> None:
    """Copy one saved value into a tensor of its shape and dtype."""
    with torch.no_grad():
        if packed:
            value = packing.unpack(value, tensor.shape[-1])
        tensor.copy_(stored_like(value, tensor))


def find(key: str, saved: Mapping[str, Any]) -> tuple[Any, bool]:
    """Return what is saved under a name, and whether it is packed."""
    if key in saved:
        return saved[key], False
    return saved.get(key + UPPER), True


def fits(value: Any, packed: bool, wanted: Tensor) -> bool:
    """Whether a saved value has the shape and dtype that are wanted."""
    shape = tuple(wanted.shape)
    if packed:
        size = shape[-1] if shape else 0
        square = len(shape) >= 2 and shape[-2] == size
        shape = (*shape[:-2], size * (size + 1) // 2) if square else (-1,)
    return isinstance(value, Tensor) and value.dtype == wanted.dtype and value.shape == shape


def _kind(value: Any, packed: bool = False) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    kind = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"{kind} (packed)" if packed else kind


def _listed(what: str, keys: Iterable[str]) -> list[str]:
    """Say which keys are missing or unexpected."""
    found = sorted(keys)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return [f"{what}: {', '.join(map(repr, found[:3]))}{more}"] if found else []
