"""Eight ranks as threads of this process: `python sharding_threads.py`, a line per storage.

torch's threaded process group is private and changes global state, so the test runs this file as a
process of its own.
"""

from __future__ import annotations

import json
import os
import threading
import traceback
from typing import Any

import sharding_cases as cases
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed import multi_threaded_pg

WORLD = 8


def main() -> None:
    """Compare every storage with one process, on `WORLD` threads, and print what was found."""
    torch.set_num_threads(1)
    _distributed_c10d._set_thread_isolation_mode(True)  # type: ignore[attr-defined]
    multi_threaded_pg._install_threaded_pg()  # type: ignore[no-untyped-call]
    store = dist.HashStore()
    found: list[dict[str, Any]] = [{} for _ in range(WORLD)]

    def rank_of(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=WORLD, store=store)
        meshes: Any = {}

        def mesh_of(shape: tuple[int, ...], world: int, *names: str) -> Any:
            if shape not in meshes:
                whole = (world,) if len(shape) == 1 else (2, world // 2)
                names = ("a", "b")[: len(whole)]
                meshes[shape] = init_device_mesh("cpu", whole, mesh_dim_names=names)
            return meshes[shape]

        local.mesh_of = mesh_of
        try:
            for storage in cases.STORAGES:
                found[rank][storage] = cases.compare(rank, WORLD, storage, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # the others would wait for this one

    # a mesh belongs to a rank, and here ranks share the module that keeps them
    local: Any = threading.local()
    cases.mesh_of = lambda *args: local.mesh_of(*args)  # type: ignore[assignment]
    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worst = {
        storage: [max(own[storage][which] for own in found) for which in (0, 1)]
        for storage in cases.STORAGES
    }
    print(json.dumps(worst), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
