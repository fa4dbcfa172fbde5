"""Real text that every machine has: the source of Python's own standard library, as bytes.

Files are taken in the order of a hash of their relative names, whole files are held out for
validation by the same hash, and batch number t is a pure function of (seed, t): nothing has to
be remembered to resume.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

__all__ = ["Corpus", "load_corpus", "training_batch", "validation_batches"]

MAX_BYTES = 8_000_000
"""Files are taken until this many bytes are read (training and validation together)."""

MIN_BYTES = 500_000
"""With less text than this the comparison means nothing."""

HELD_OUT = 10
"""One file in so many is held out for validation."""

VALIDATION_BATCHES, VALIDATION_BATCH = 4, 32
"""How much of the held-out text is used: windows in so many batches of so many."""

SKIPPED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
"""Folders left out: tests, installed packages, tables, and what distributions may drop."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """The text, as uint8 tensors, and what identifies it."""

    training: torch.Tensor
    validation: torch.Tensor
    training_files: tuple[str, ...]
    validation_files: tuple[str, ...]
    digest: str


def load_corpus(root: Path | None = None, max_bytes: int = MAX_BYTES) -> Corpus:
    """Read the standard library.

    Args:
        root: The folder to read; the running Python's library by default.
        max_bytes: Stop before the file that would exceed this total.

    Raises:
        RuntimeError: If there is too little source text.
    """
    root = root or Path(os.__file__).parent
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    names: tuple[list[str], list[str]] = ([], [])
    total = 0
    for name in sorted(_source_files(root), key=_name_hash):
        text = (root / name).read_bytes().replace(b"\r\n", b"\n")
        total += len(text)
        if total > max_bytes:
            break
        held_out = _name_hash(name) % HELD_OUT == 0
        parts[held_out].append(text)
        names[held_out].append(name)
    training, validation = (b"\n".join(part) for part in parts)
    if min(len(training), HELD_OUT * len(validation)) < MIN_BYTES:
        raise RuntimeError(
            f"found {len(training) + len(validation)} bytes of Python source under {root}, need "
            f"{MIN_BYTES}; use a Python that ships its standard library as .py files"
        )
    return Corpus(
        training=torch.frombuffer(bytearray(training), dtype=torch.uint8),
        validation=torch.frombuffer(bytearray(validation), dtype=torch.uint8),
        training_files=tuple(names[0]),
        validation_files=tuple(names[1]),
        digest=hashlib.sha256(training + b"\0" + validation).hexdigest()[:16],
    )


def training_batch(
    corpus: Corpus, step: int, *, seed: int, batch: int, context: int
) -> torch.Tensor:
    """Return batch number `step` (from 1): int64 windows `[batch, context + 1]`."""
    return _windows(corpus.training, (seed << 32) + step, batch, context)


def validation_batches(corpus: Corpus, context: int) -> list[torch.Tensor]:
    """Return batches from the held-out files, the same for every run."""
    return [
        _windows(corpus.validation, index, VALIDATION_BATCH, context)
        for index in range(VALIDATION_BATCHES)
    ]


def _windows(text: torch.Tensor, seed: int, batch: int, context: int) -> torch.Tensor:
    """Cut `batch` windows at places drawn from a generator with the given seed."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - context, (batch, 1), generator=generator)
    return text[starts + torch.arange(context + 1)].to(torch.int64)


def _source_files(root: Path) -> list[str]:
    """List the relative names of the Python files under `root`, without skipped folders."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [sub for sub in subfolders if sub not in SKIPPED]
        relative = Path(folder).relative_to(root)
        found += [(relative / file).as_posix() for file in files if file.endswith(".py")]
    return [name for name in found if not _generated(name)]


def _generated(name: str) -> bool:
    """Whether a file was written by the build of this one machine."""
    return PurePosixPath(name).name.startswith("_sysconfigdata")


def _name_hash(name: str) -> int:
    """Hash a relative name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
