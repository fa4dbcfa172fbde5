"""What a file or folder holds, by name, without an optimizer and without loading tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shampoo_func.checkpoint import atomic, metadata
from shampoo_func.errors import CheckpointError
from shampoo_func.sharding.folders import read_folder, stored_in

__all__ = ["Stored", "look_into"]

SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """What was found.

    kind: the format of the file or folder. tensors: shapes and dtypes by name, on the meta
    device. description: the tensor `metadata`, None if there is none. problem: why the file or
    folder is not whole; empty if it is.
    """

    kind: str
    tensors: dict[str, Tensor]
    description: Tensor | None
    problem: str = ""


def look_into(path: Path) -> Stored:
    """Return what a folder of `save_checkpoint`, or a file of torch.save or safetensors, holds.

    Args:
        path: Where it is.

    Raises:
        CheckpointError: If it cannot be read as any of them.
    """
    if path.is_dir():
        return _folder(path)
    with path.open("rb") as file:
        start = file.read(9)
    # a safetensors file begins with the length of its header, which is JSON
    return _safetensors(path) if start[8:9] == b"{" else _torch_file(path)


def _folder(path: Path) -> Stored:
    problem = ""
    try:
        atomic.check_complete(path)
    except CheckpointError as error:
        problem = str(error)
    if problem and not (path / ".metadata").is_file():
        raise CheckpointError(problem)
    tensors = stored_in(path)
    description = None
    if metadata.KEY in tensors:
        description = torch.empty(tensors[metadata.KEY].shape, dtype=torch.uint8)
        try:
            read_folder(path, {metadata.KEY: description})
        except CheckpointError as error:
            return Stored("folder", tensors, None, problem or str(error))
    return Stored("folder", tensors, description, problem)


def _torch_file(path: Path) -> Stored:
    try:
        # mapped: only what is looked at is read
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of any kind: it may be any file
        raise CheckpointError(
            f"{str(path)!r} is neither a folder, nor a file of safetensors or torch.save with "
            f"tensors only ({type(error).__name__}: {str(error).splitlines()[0]})."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{str(path)!r} holds a {type(found).__name__}, not a dict of tensors."
        )
    tensors = {str(k): own.to("meta") for k, own in found.items() if isinstance(own, Tensor)}
    return Stored("torch.save", tensors, found.get(metadata.KEY))


def _safetensors(path: Path) -> Stored:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {
            key: torch.empty(own["shape"], dtype=SAFETENSORS_DTYPES[own["dtype"]], device="meta")
            for key, own in header.items()
        }
        ends = [int(own["data_offsets"][1]) for own in header.values()]
        wanted = 8 + length + max(ends, default=0)
        description = _bytes_of(path, 8 + length, header.get(metadata.KEY))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{str(path)!r} begins like safetensors, but its header cannot be read "
            f"({type(error).__name__}: {error}); it is damaged."
        ) from error
    size = path.stat().st_size
    problem = "" if size == wanted else f"the file has {size} bytes, not {wanted}"
    return Stored("safetensors", tensors, description, problem)


def _bytes_of(path: Path, start: int, own: Any) -> Tensor | None:
    if own is None:
        return None
    first, last = own["data_offsets"]
    with path.open("rb") as file:
        file.seek(start + first)
        return torch.tensor(list(file.read(last - first)), dtype=torch.uint8)
