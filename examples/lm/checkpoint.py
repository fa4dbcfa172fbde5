"""Save a run so that it continues bit for bit: one flat dict of named tensors in one file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lm.training import Evaluation, Run

__all__ = ["CheckpointError", "checksum", "load", "named_tensors", "save"]


class CheckpointError(RuntimeError):
    """A checkpoint that is absent, unreadable, or of another run."""


def named_tensors(tree: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a tree of dicts, NamedTuples and sequences, with its path.

    Example:
        >>> dict(named_tensors({"layer": (torch.zeros(()),)}, "params"))
        {'params/layer/0': tensor(0.)}
    """
    if isinstance(tree, torch.Tensor):
        yield prefix, tree
        return
    for key, value in _items(tree):
        yield from named_tensors(value, f"{prefix}/{key}" if prefix else key)


def save(path: Path, run: Run, fingerprint: dict[str, Any]) -> None:
    """Write `run` to `path`; a crash half way leaves the older file whole."""
    content = {
        "fingerprint": fingerprint,
        "step": run.step,
        "seconds": run.seconds,
        "compile_seconds": run.compile_seconds,
        "validation_seconds": run.validation_seconds,
        "history": [list(evaluation) for evaluation in run.history],
        "tensors": {name: tensor.detach().cpu() for name, tensor in _tensors_of(run).items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(path: Path, run: Run, fingerprint: dict[str, Any]) -> None:
    """Fill `run`, freshly made with the same settings, from `path`.

    Raises:
        CheckpointError: If the file cannot be read, or was written with other settings.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from error
    _check_fingerprint(path, content["fingerprint"], fingerprint)
    _copy_tensors(path, content["tensors"], _tensors_of(run))
    run.step = content["step"]
    run.seconds = content["seconds"]
    run.compile_seconds = content["compile_seconds"]
    run.validation_seconds = content["validation_seconds"]
    run.history = [Evaluation(*values) for values in content["history"]]


def checksum(tree: Any) -> str:
    """Return a digest of every bit of every tensor in `tree`, whatever the order of its keys."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(tree), key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _tensors_of(run: Run) -> dict[str, torch.Tensor]:
    """Name every tensor that a run carries from step to step."""
    return dict(named_tensors({"params": run.params, "state": run.state}))


def _items(tree: Any) -> list[tuple[str, Any]]:
    """List the children of a dict, a NamedTuple or a sequence with their names."""
    if isinstance(tree, dict):
        return [(str(key), value) for key, value in tree.items()]
    if hasattr(tree, "_fields"):
        return list(zip(tree._fields, tree, strict=True))
    if isinstance(tree, list | tuple):
        return [(str(index), value) for index, value in enumerate(tree)]
    raise TypeError(f"cannot save a {type(tree).__name__}; states are made of tensors")


def _check_fingerprint(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare the settings that decide the numbers."""
    different = [key for key in {**saved, **wanted} if saved.get(key) != wanted.get(key)]
    if different:
        changes = "; ".join(
            f"{key} was {saved.get(key)!r}, now {wanted.get(key)!r}" for key in different
        )
        raise CheckpointError(
            f"{path} is of another run: {changes}. Resume with the settings it was started with, "
            "or choose another --out."
        )


def _copy_tensors(
    path: Path, saved: dict[str, torch.Tensor], into: dict[str, torch.Tensor]
) -> None:
    """Copy saved values into tensors of the same names and shapes, keeping their strides."""
    odd = sorted(saved.keys() ^ into.keys())
    if odd:
        raise CheckpointError(f"{path} does not fit this version: {odd[:3]} only on one side")
    for name, tensor in into.items():
        value = saved[name]
        if value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise CheckpointError(
                f"{path} does not fit this version: {name} is {tuple(value.shape)} {value.dtype}, "
                f"expected {tuple(tensor.shape)} {tensor.dtype}"
            )
        tensor.copy_(value)
