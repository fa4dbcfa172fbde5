"""A folder of checkpoints, one per step: where the next goes, and which is the latest."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

from shampoo_func.checkpoint.atomic import check_complete
from shampoo_func.errors import CheckpointError, check_count

__all__ = ["checkpoint_path", "latest_checkpoint"]

_NAME = re.compile(r"step_(\d+)")


def checkpoint_path(folder: str | PathLike[str], step: int) -> Path:
    """Return the place of a step's checkpoint in a folder of checkpoints.

    Args:
        folder: The folder.
        step: How many steps were done.

    Raises:
        HyperparameterError: If the step is no int, or negative.

    Example:
        >>> checkpoint_path("runs", 10).name
        'step_00000010'
    """
    check_count("step", step, low=0)
    return Path(folder) / f"step_{step:08d}"


def latest_checkpoint(folder: str | PathLike[str]) -> Path | None:
    """Return the complete checkpoint of the latest step; None if there is none.

    Checkpoints that were not finished, or whose files are not all there, are passed over.

    Args:
        folder: The folder that has those of `checkpoint_path`; it need not exist.

    Example:
        >>> latest_checkpoint("no/such/folder") is None
        True
    """
    if not Path(folder).is_dir():
        return None
    found = [
        (int(name.group(1)), path)
        for path in Path(folder).iterdir()
        if (name := _NAME.fullmatch(path.name))
    ]
    for _, path in sorted(found, reverse=True):
        try:
            check_complete(path)
        except CheckpointError:
            continue
        return path
    return None
