"""Folders that are there whole or not at all, also if a process is killed at any point.

They are filled under another name, then listed in a marker with the size of every file, and
then renamed, which the file system does at once or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from shampoo_func.errors import CheckpointError

__all__ = ["MARKER", "begin", "check_complete", "discard", "partial", "publish"]

MARKER = "complete.json"
UNFINISHED = ".partial"


def partial(path: Path) -> Path:
    """Return where a folder is filled before it gets its name."""
    return path.with_name(f".{path.name}{UNFINISHED}")


def begin(path: Path) -> None:
    """Make an empty folder to be filled, in the place of what a killed process has left there.

    Raises:
        CheckpointError: If there is something under the final name, or it cannot be one.
    """
    if not path.name or path.name.endswith(UNFINISHED):
        raise CheckpointError(
            f"{str(path)!r} is no name for a checkpoint; give a folder that does not end in "
            f"{UNFINISHED!r}."
        )
    if path.exists():
        raise CheckpointError(
            f"{str(path)!r} exists; checkpoints are never overwritten: give another name, such as "
            "checkpoint_path(folder, step), or remove it."
        )
    discard(path)
    partial(path).mkdir(parents=True)


def discard(path: Path) -> None:
    """Remove the folder that was to become `path`, if there is one."""
    if partial(path).exists():
        shutil.rmtree(partial(path))


def publish(path: Path, names: Iterable[str]) -> None:
    """Mark the filled folder as complete, and give it its name.

    Args:
        path: The final name.
        names: The files that must be in it, and on the disk already.

    Raises:
        CheckpointError: If one is not there.
    """
    folder = partial(path)
    absent = sorted(name for name in names if not (folder / name).is_file())
    if absent:
        raise CheckpointError(
            f"{str(folder)!r} has no {', '.join(map(repr, absent[:3]))} of another rank; give a "
            "folder on a file system that all ranks share."
        )
    sizes = {name: (folder / name).stat().st_size for name in sorted(names)}
    with (folder / MARKER).open("w") as file:
        json.dump({"format": 1, "files": sizes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)
    folder.rename(path)
    _sync(path.parent)


def check_complete(path: Path) -> None:
    """Check that a folder was published, and that its files are all there.

    Raises:
        CheckpointError: If not; the message says what is missing.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {str(path)!r}; nothing was saved there.")
    if path.name.endswith(UNFINISHED):
        raise CheckpointError(
            f"{str(path)!r} is what a process that was killed has left; load an earlier checkpoint."
        )
    try:
        sizes = json.loads((path / MARKER).read_text())["files"]
        wanted = {str(name): int(size) for name, size in sizes.items()}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{str(path)!r} has no {MARKER!r}: it was not finished, or not written by "
            "save_checkpoint; load an earlier one."
        ) from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{str(path / MARKER)!r} cannot be read ({type(error).__name__}: {error}); the "
            "checkpoint is damaged."
        ) from error
    problems = [text for name, size in wanted.items() if (text := _problem(path / name, size))]
    if problems:
        raise CheckpointError(
            f"the checkpoint {str(path)!r} is damaged: {'; '.join(problems[:3])}"
            f"{f'; and {len(problems) - 3} more' if len(problems) > 3 else ''}."
        )


def _problem(file: Path, size: int) -> str:
    if not file.is_file():
        return f"{file.name!r} is missing"
    found = file.stat().st_size
    return "" if found == size else f"{file.name!r} has {found} bytes, not {size}"


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk, where a folder can be opened."""
    if hasattr(os, "O_DIRECTORY"):
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(place)
        finally:
            os.close(place)
