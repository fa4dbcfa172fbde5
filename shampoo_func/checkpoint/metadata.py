"""What a checkpoint says about itself, as a tensor, so that the dict stays one of tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shampoo_func.checkpoint.entries import Walk
from shampoo_func.errors import CheckpointError

__all__ = ["KEY", "check", "decode", "describe", "encode"]

KEY = "metadata"
FORMAT = 1


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
    """Describe a state: its format, blocks, dtypes, and a fingerprint of names and shapes."""
    lines = sorted(
        f"{entry.key} {tuple(entry.tensor.shape)} {entry.tensor.dtype}" for entry in walk.entries
    )
    return {
        "format": FORMAT,
        "blocks": walk.blockings,
        "dtypes": sorted({_dtype_name(entry.tensor) for entry in walk.entries}),
        "packed": packed,
        "fingerprint": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16],
    }


def check(state_dict: Mapping[str, Tensor], walk: Walk) -> dict[str, Any]:
    """Check a checkpoint's own description against the state that is to be filled.

    Returns:
        The description.

    Raises:
        CheckpointError: If there is none, or format or blocks differ.
    """
    if KEY not in state_dict:
        raise CheckpointError(
            f"the dict has no key {KEY!r}, so it was not written by to_state_dict; its keys begin "
            f"{sorted(state_dict)[:3]}."
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
                f"the stage {stage or 'blocked'!r} was saved with block_size={seen[0]}, "
                f"merge_dims={seen[1]}, but has block_size={wanted[0]}, merge_dims={wanted[1]}; "
                "build the optimizer with the saved numbers."
            )
    return saved


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
