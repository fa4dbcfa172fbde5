"""What a checkpoint says about itself, as a tensor, so that the dict stays one of tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from shampoo_func.checkpoint.entries import Walk
from shampoo_func.errors import CheckpointError

__all__ = ["FORMAT", "KEY", "check", "check_same", "decode", "describe", "encode", "fingerprint"]

KEY = "metadata"
FORMAT = 2


def encode(content: Any) -> Tensor:
    """Return plain data as the bytes of its JSON, a uint8 tensor."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def decode(tensor: Any, name: str) -> Any:
    """Undo `encode`.

    Raises:
        CheckpointError: If the tensor is none of those.
    """
    try:
        return json.loads(bytes(tensor.tolist()).decode())
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{name!r} is not what to_state_dict writes there ({error}); the checkpoint is damaged "
            "or of another program."
        ) from error


def describe(walk: Walk, *, packed: bool) -> dict[str, Any]:
    """Describe a state: its format, blocks, dtypes, names, and a fingerprint of all of it.

    `roles` has what the leaves are by their names without parameter and block, and `parameters`
    the paths, so that a reader can tell the parts of a name without the optimizer.
    """
    entries = walk.entries
    return {
        "format": FORMAT,
        "blocks": walk.blockings,
        "dtypes": sorted({_dtype_name(entry.tensor.dtype) for entry in entries}),
        "packed": packed,
        "tensors": len(entries),
        "parameters": sorted({entry.place.path for entry in entries if entry.place.path}),
        "roles": {entry.kind: entry.role for entry in entries},
        "fingerprint": fingerprint(
            (entry.key, tuple(entry.tensor.shape), entry.tensor.dtype) for entry in entries
        ),
    }


def fingerprint(leaves: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> str:
    """Return a hash of the names, shapes and dtypes of all leaves of a state."""
    lines = sorted(f"{key} {shape} {_dtype_name(dtype)}" for key, shape, dtype in leaves)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def check_same(described: Mapping[str, Any], whole: Walk) -> None:
    """Check that a description is of a state with these leaves.

    Raises:
        CheckpointError: If it is not.
    """
    if described.get("fingerprint") != describe(whole, packed=False)["fingerprint"]:
        raise CheckpointError(
            "the checkpoint's metadata is of another state than its tensors; it was put together "
            "from two checkpoints."
        )


def check(state_dict: Mapping[str, Tensor], walk: Walk) -> dict[str, Any]:
    """Check a checkpoint's own description against the state that is to be filled.

    Returns:
        The description.

    Raises:
        CheckpointError: If there is none, or format or blocks differ.
    """
    if KEY not in state_dict:
        raise CheckpointError(
            f"the checkpoint has no key {KEY!r}, so it was not written by to_state_dict; its keys "
            f"begin {sorted(state_dict)[:3]}."
        )
    saved: dict[str, Any] = decode(state_dict[KEY], KEY)
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        seen = saved.get("format") if isinstance(saved, dict) else saved
        raise CheckpointError(
            f"the checkpoint has the format {seen!r}, this version reads {FORMAT}; load it with "
            "the version that wrote it."
        )
    for stage, wanted in walk.blockings.items():
        seen = saved["blocks"].get(stage, wanted)
        if seen != wanted:
            raise CheckpointError(
                f"the stage {stage or 'blocked'!r} was saved with {_settings(seen)}, but has "
                f"{_settings(wanted)}; build the optimizer with the saved numbers."
            )
    return saved


def _settings(own: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={own[name]}" for name in ("block_size", "merge_dims", "merge_to"))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
