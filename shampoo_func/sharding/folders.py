"""Dicts of tensors in folders, in the format of torch.distributed.checkpoint.

Its planners, writers and readers do the work; the ranks meet here, in `Peers.together`, so that
every error is an ordinary one, on every rank, and one process needs no group.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shampoo_func.errors import CheckpointError
from shampoo_func.sharding.peers import Peers

__all__ = ["read_folder", "stored_in", "write_folder"]


def write_folder(folder: Path, tensors: Mapping[str, Tensor], peers: Peers) -> list[str]:
    """Write a dict of every rank into one folder; each file is on the disk when this returns.

    A plain tensor that several ranks have under one name is written by one of them; of a DTensor
    each rank writes its part.

    Args:
        folder: An empty folder that all ranks see.
        tensors: This rank's tensors.
        peers: The ranks that write.

    Returns:
        The names of the files.

    Raises:
        CheckpointError: On every rank, if one of them fails.
        PeerError: If another rank does not take part.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    # one thread: an error in another would be lost
    writer = FileSystemWriter(folder, sync_files=True, thread_count=1)
    planner = DefaultSavePlanner()
    first = peers.rank == 0

    def plan() -> Any:
        writer.set_up_storage_writer(first)
        planner.set_up_planner(dict(tensors), writer.storage_meta(), first)
        return writer.prepare_local_plan(planner.create_local_plan())

    def write() -> Any:
        plans, found = planner.create_global_plan(planned)
        own = planner.finish_plan(writer.prepare_global_plan(plans)[peers.rank])
        described.append(found)
        return writer.write_data(own, planner).wait()

    def finish() -> list[str]:
        if first:
            writer.finish(described[0], written)
        names = {result.storage_data.relative_path for own in written for result in own}
        return sorted({*names, ".metadata"})

    described: list[Any] = []
    planned = peers.together(plan, "plan the checkpoint")
    written = peers.together(write, "write the checkpoint")
    return peers.together(finish, "finish the checkpoint")[0]


def stored_in(folder: Path) -> dict[str, Tensor]:
    """Return what a folder holds: tensors on the meta device, which have shape and dtype only.

    Raises:
        CheckpointError: If its description cannot be read.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        described = FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # of any kind: it is a pickle
        raise CheckpointError(
            f"cannot read {str(folder / '.metadata')!r} ({type(error).__name__}: {error}); the "
            "folder is none of torch.distributed.checkpoint, or is damaged."
        ) from error
    return {
        key: torch.empty(own.size, dtype=own.properties.dtype, device="meta")
        for key, own in described.items()
        if isinstance(own, TensorStorageMetadata)
    }


def read_folder(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Read tensors from a folder into those given, which have the shapes and dtypes stored there.

    Needs no other rank: each reads what it wants, of a DTensor its part.

    Args:
        folder: What `write_folder` wrote.
        into: The tensors to be written, by name.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = FileSystemReader(folder)
    try:
        described = reader.read_metadata()
        planner.set_up_planner(dict(into), described, True)
        reader.set_up_storage_reader(described, True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        (plan,) = reader.prepare_global_plan(planner.create_global_plan([plan]))
        reader.read_data(planner.finish_plan(plan), planner).wait()
    except Exception as error:  # of any kind: the files hold pickles
        raise CheckpointError(
            f"cannot read the checkpoint {str(folder)!r} ({type(error).__name__}: {error}); it is "
            "damaged."
        ) from error
