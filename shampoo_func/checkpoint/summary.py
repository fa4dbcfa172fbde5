"""What is in a checkpoint, in numbers: by role and stage, and by parameter."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shampoo_func.checkpoint import metadata
from shampoo_func.checkpoint.fitting import UPPER
from shampoo_func.checkpoint.stored import Stored
from shampoo_func.errors import CheckpointError

__all__ = ["summarize"]


@dataclass(frozen=True, slots=True)
class Name:
    """The parts of the name of a saved leaf: its stage, parameter (if any), and role."""

    stage: str
    parameter: str
    role: str


def summarize(stored: Stored) -> dict[str, Any]:
    """Return a summary as plain data.

    Args:
        stored: What a file or folder holds.
    """
    tensors = stored.tensors
    state = {key: own for key, own in tensors.items() if key.startswith("state/")}
    problem, described = stored.problem, dict[str, Any]()
    try:
        described = _described(stored)
    except CheckpointError as error:
        problem = problem or str(error)
    problem = problem or _unlike(described, state)
    names = {key: _name(key, described) for key in state}
    others = defaultdict(list)
    for key in tensors.keys() - state.keys() - {metadata.KEY}:
        others[key.split("/")[0] if "/" in key else "(no prefix)"].append(tensors[key])
    stages = defaultdict(list)
    parameters = defaultdict(list)
    for key, name in names.items():
        stages[name.stage, name.role].append(state[key])
        parameters[name.parameter].append(state[key])
    return {
        "kind": stored.kind,
        "valid": not problem,
        "problem": problem,
        "format": described.get("format"),
        "blocks": described.get("blocks", {}),
        "packed": described.get("packed"),
        "dtypes": sorted({str(own.dtype).removeprefix("torch.") for own in state.values()}),
        "total": _count(state.values()),
        "roles": [
            {"stage": stage, "role": role, **_count(own)}
            for (stage, role), own in sorted(stages.items())
        ],
        "parameters": [
            {"parameter": path, **_count(own)}
            for path, own in sorted(parameters.items(), key=lambda item: (-_bytes(item[1]), item))
        ],
        "others": [{"prefix": key, **_count(own)} for key, own in sorted(others.items())],
    }


def _described(stored: Stored) -> dict[str, Any]:
    if stored.description is None:
        raise CheckpointError(f"there is no readable {metadata.KEY!r} among its tensors.")
    described = metadata.decode(stored.description, metadata.KEY)
    if not isinstance(described, dict) or described.get("format") != metadata.FORMAT:
        seen = described.get("format") if isinstance(described, dict) else described
        raise CheckpointError(f"it has the format {seen!r}, this version reads {metadata.FORMAT}.")
    return described


def _unlike(described: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Say how the tensors differ from the description; nothing if they do not."""
    leaves = [(key.removesuffix(UPPER), _whole(key, own), own.dtype) for key, own in state.items()]
    if metadata.fingerprint(leaves) == described["fingerprint"]:
        return ""
    return (
        f"it holds {len(leaves)} tensors of the {described['tensors']} of the state, or tensors of "
        "other names, shapes or dtypes."
    )


def _whole(key: str, own: Tensor) -> tuple[int, ...]:
    """Return the shape of a leaf, of which the upper triangle may be stored."""
    shape = tuple(own.shape)
    if not key.endswith(UPPER):
        return shape
    size = (math.isqrt(8 * shape[-1] + 1) - 1) // 2
    return (*shape[:-1], size, size)


def _name(key: str, described: Mapping[str, Any]) -> Name:
    """Take a name apart with the parameters and roles that the checkpoint lists."""
    paths, roles = set(described.get("parameters", ())), described.get("roles", {})
    parts = key.removesuffix(UPPER).split("/")[1:]
    for start in range(len(parts)):
        for stop in range(len(parts), start, -1):
            path = "/".join(parts[start:stop])
            for skip in (0, 1):  # the name of a block
                kind = "/".join((*parts[:start], *parts[stop + skip :]))
                if path in paths and kind in roles:
                    return Name(parts[0], path, _role(roles[kind], parts[:start], kind))
    kind = "/".join(parts)
    return Name(parts[0], "", _role(roles.get(kind, "other"), [], kind))


def _role(role: str, before: list[str], kind: str) -> str:
    """Return the role of a leaf, or the field it is in, if it has none."""
    if role != "other":
        return role
    words = [word for word in kind.split("/") if not word.isdigit()]
    return words[-1] if words else role


def _count(tensors: Iterable[Tensor]) -> dict[str, int]:
    own = list(tensors)
    return {"tensors": len(own), "bytes": _bytes(own)}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(own.numel() * own.element_size() for own in tensors)
