"""Saving while training goes on."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shampoo_func import tree
from shampoo_func.checkpoint.contents import gathered
from shampoo_func.checkpoint.files import write_checkpoint
from shampoo_func.sharding.peers import peers_of
from shampoo_func.types import Transformation, Tree

__all__ = ["save_checkpoint_async"]


def save_checkpoint_async(
    path: str | PathLike[str],
    tx: Transformation,
    state: Any,
    params: Tree,
    *,
    extra: Mapping[str, Any] | None = None,
    pack_symmetric: bool = False,
    group: Any = None,
    alone: bool = False,
) -> Future[Path]:
    """Copy parameters and state, and save the copies as `save_checkpoint` does in a thread.

    When it returns, all may be changed or donated. Checkpoints are written one after another, in
    the order of the calls. The ranks talk through a gloo group of their own, which is made at the
    first call. Ask for the result before the process group is destroyed.

    Args:
        path: See `save_checkpoint`.
        tx: See `save_checkpoint`.
        state: See `save_checkpoint`.
        params: See `save_checkpoint`.
        extra: See `save_checkpoint`.
        pack_symmetric: See `save_checkpoint`.
        group: See `save_checkpoint`.
        alone: See `save_checkpoint`.

    Returns:
        A future: `result()` waits until the folder is complete, returns its path, and raises
        what `save_checkpoint` would have raised; `done()` says whether it would wait.

    Example:
        >>> import tempfile
        >>> from shampoo_func.checkpoint import load_checkpoint
        >>> from shampoo_func.transforms import trace
        >>> tx, params = trace(0.9), {"w": torch.ones(2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saving = save_checkpoint_async(f"{folder}/a", tx, tx.init(params), params)
        ...     _ = params["w"].zero_()
        ...     load_checkpoint(saving.result(), tx, params).params
        {'w': tensor([1., 1.])}
    """
    peers = peers_of(group, alone=alone).in_background()
    copied: Future[dict[str, Tensor]] = Future()
    try:
        copied.set_result(
            gathered(tx, state, params, extra or {}, pack_symmetric=pack_symmetric, copy=True)
        )
    except Exception as error:  # raised where all ranks can learn of it
        copied.set_exception(error)
    copies = [_mark(device) for device in _accelerators(params)]

    def write() -> Path:
        for mark in copies:
            mark.synchronize()
        return write_checkpoint(Path(path), copied.result, peers)

    return _writer().submit(write)


@functools.cache
def _writer() -> ThreadPoolExecutor:
    """Return the thread that writes: one, so that ranks write in the same order."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")


def _accelerators(params: Tree) -> set[torch.device]:
    return {leaf.device for leaf in tree.leaves(params) if leaf.device.type not in ("cpu", "meta")}


def _mark(device: torch.device) -> torch.Event:
    """Return an event that is reached when the copies on a device are made."""
    mark = torch.Event(device)
    mark.record(torch.accelerator.current_stream(device))
    return mark
