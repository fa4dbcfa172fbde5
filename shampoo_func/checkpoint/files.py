"""Checkpoints as folders that all ranks write and read, whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shampoo_func import tree
from shampoo_func.checkpoint import atomic, contents, metadata
from shampoo_func.checkpoint.contents import Checkpoint, gathered, named_params
from shampoo_func.checkpoint.entries import Walk, by_key
from shampoo_func.checkpoint.fitting import UPPER, check_fit, find, put
from shampoo_func.checkpoint.flat import first_state, whole_walk
from shampoo_func.errors import CheckpointError, PeerError, ShampooFuncError
from shampoo_func.sharding.folders import read_folder, stored_in, write_folder
from shampoo_func.sharding.peers import Peers, peers_of
from shampoo_func.types import Transformation, Tree

__all__ = ["load_checkpoint", "save_checkpoint", "write_checkpoint"]


def save_checkpoint(
    path: str | PathLike[str],
    tx: Transformation,
    state: Any,
    params: Tree,
    *,
    extra: Mapping[str, Any] | None = None,
    pack_symmetric: bool = False,
    group: Any = None,
    alone: bool = False,
) -> Path:
    """Save parameters and state in a folder, in the format of torch.distributed.checkpoint.

    Every rank calls it, and writes what it owns. The folder appears under its name when all
    ranks have written and all files are on the disk: a process that is killed at any point
    leaves no folder of that name, and earlier checkpoints as they are.

    Args:
        path: The folder, on a file system that all ranks share; the same on each. It must not
            exist: see `checkpoint_path`.
        tx: The transformation.
        state: Its state.
        params: The parameters, plain tensors or DTensors.
        extra: What else the run needs, by name: tensors, and plain data that JSON holds. What has
            the same name on several ranks must be the same; a rank's own needs its own name.
        pack_symmetric: See `to_state_dict`.
        group: The process group of the ranks that save; all ranks if not given.
        alone: This process saves for itself, although torch.distributed is initialized.

    Returns:
        The path.

    Raises:
        CheckpointError: On every rank, if one cannot write, or the folder exists.
        PeerError: If another rank ends or hangs.

    Example:
        >>> import tempfile
        >>> from shampoo_func.transforms import trace
        >>> tx, params = trace(0.9), {"w": torch.ones(2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_checkpoint(f"{folder}/a", tx, tx.init(params), params)
        ...     load_checkpoint(path, tx, params).params
        {'w': tensor([1., 1.])}
    """

    def collect() -> dict[str, Tensor]:
        return gathered(tx, state, params, extra or {}, pack_symmetric=pack_symmetric, copy=False)

    return write_checkpoint(Path(path), collect, peers_of(group, alone=alone))


def write_checkpoint(path: Path, collect: Callable[[], dict[str, Tensor]], peers: Peers) -> Path:
    """Write a folder on all ranks.

    Args:
        path: The folder.
        collect: Returns this rank's tensors; an error in it is one on every rank.
        peers: The ranks.

    Raises:
        CheckpointError: See `save_checkpoint`.
        PeerError: See `save_checkpoint`.
    """
    tensors: dict[str, Tensor] = {}
    first = peers.rank == 0

    def begin() -> str:
        tensors.update(collect())
        return str(path)

    def prepare() -> None:
        if first:
            atomic.begin(path)

    def publish() -> None:
        if first:
            atomic.publish(path, names)

    _check_one_path(peers.together(begin, "save the checkpoint"))
    peers.together(prepare, "begin the checkpoint")
    try:
        names = write_folder(atomic.partial(path), tensors, peers)
        peers.together(publish, "publish the checkpoint")
    except PeerError:
        raise  # the others may still be writing
    except ShampooFuncError:
        if first:
            with contextlib.suppress(OSError):
                atomic.discard(path)
        raise
    return path


def load_checkpoint(
    path: str | PathLike[str],
    tx: Transformation,
    params: Tree,
    *,
    group: Any = None,
    alone: bool = False,
) -> Checkpoint:
    """Return what `save_checkpoint` has saved: on any number of ranks, in any storage.

    Every rank calls it, and reads what it owns now. All names, shapes, dtypes and block sizes are
    compared before anything is read. The files may hold pickles: load only what you trust.

    Args:
        path: The folder.
        tx: The transformation, on any mesh or none; hyper-parameters may have changed, the
            shapes of its state not.
        params: Parameters of the same paths, shapes and dtypes; they are not changed, and those
            returned are stored as they are.
        group: The process group of the ranks that load; all ranks if not given.
        alone: This process loads for itself, although torch.distributed is initialized.

    Returns:
        The parameters, the state, and the extras (tensors on the CPU, of all ranks).

    Raises:
        CheckpointError: On every rank, if the folder was not finished or is damaged, or does not
            fit on one of them: the message says what is missing or differs.
        PeerError: If another rank ends or hangs.

    Example:
        >>> import tempfile
        >>> from shampoo_func.transforms import trace
        >>> tx, params = trace(0.9), {"w": torch.ones(2)}
        >>> _, state = tx.update({"w": torch.ones(2)}, tx.init(params))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_checkpoint(f"{folder}/a", tx, state, params, extra={"step": 1})
        ...     loaded = load_checkpoint(path, tx, params)
        >>> loaded.state, loaded.extra
        (TraceState(trace={'w': tensor([1., 1.])}), {'step': 1})
    """
    state = first_state(tx, params)
    found: list[Checkpoint] = []

    def read() -> str:
        found.append(_read(Path(path), tx, state, params))
        return str(path)

    _check_one_path(peers_of(group, alone=alone).together(read, f"load {str(path)!r}"))
    return found[0]


def _read(path: Path, tx: Transformation, state: Any, params: Tree) -> Checkpoint:
    """Fill a first state, and new parameters, after comparing all with what the folder holds."""
    atomic.check_complete(path)
    stored = stored_in(path)
    walk = Walk(tx, state, params)
    whole = whole_walk(tx, walk, params)
    described = metadata.check({**stored, **_description(path, stored)}, walk)
    new = {key: torch.empty_like(leaf) for key, leaf in named_params(params).items()}
    wanted = {key: entry.tensor for key, entry in by_key(walk.entries).items()} | new
    ours = {key: leaf for key, leaf in stored.items() if key.split("/")[0] in ("state", "params")}
    check_fit(wanted, ours, elsewhere=by_key(whole.entries))
    metadata.check_same(described, whole)
    packed = {
        key: torch.empty(value.shape, dtype=value.dtype)
        for key in wanted
        for value, is_packed in (find(key, stored),)
        if is_packed
    }
    extra = contents.empty_extra(stored)
    direct = {key: tensor for key, tensor in wanted.items() if key not in packed}
    triangles = {key + UPPER: value for key, value in packed.items()}
    read_folder(path, {**direct, **triangles, **extra})
    for key, value in packed.items():
        put(value, True, wanted[key])
    filled = tree.unflatten(tree.flatten(params)[1], list(new.values()))
    return Checkpoint(filled, state, contents.unpacked_extra(extra))


def _description(path: Path, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensor in which a checkpoint describes itself, if there is one."""
    if metadata.KEY not in stored:
        return {}
    own = stored[metadata.KEY]
    found = {metadata.KEY: torch.empty(own.shape, dtype=own.dtype)}
    read_folder(path, found)
    return found


def _check_one_path(paths: list[str]) -> None:
    if len(set(paths)) > 1:
        raise CheckpointError(
            f"the ranks were given different folders ({', '.join(sorted(set(paths))[:2])}); give "
            "the same path to all."
        )
