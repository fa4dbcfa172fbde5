"""Ranks killed in the middle of a step: `python -m benchmarks.faults`, a Markdown table."""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shampoo_func as sf

__all__ = ["main", "trial"]

PATIENCE = 20.0
"""Seconds that a collective may take."""

STORAGES: dict[str, Any] = {"DDP": Replicate(), "FSDP2, Shard(0)": Shard(0)}


def _rank(
    rank: int, world: int, store: str, storage: str, delay: float | None, pipe: Connection
) -> None:
    """Train until an error; tell its type, the wait since the last step, and what is intact."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE),
    )
    mesh = init_device_mesh("cpu", (world,))
    tx = sf.sharded(sf.shampoo(0.1, block_size=32, refresh_every=2), mesh)
    whole = {f"w{index}": torch.ones(96, 64) for index in range(4)}
    params: Any = {key: distribute_tensor(w, mesh, [STORAGES[storage]]) for key, w in whole.items()}
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    if delay is not None:  # whatever it is doing then
        kill = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
        kill.start()
    start = time.perf_counter()
    while True:
        before = [leaf.clone() for leaf in sf.tree.leaves(state)]
        try:
            _, state = tx.update(params, state, params)
        except Exception as error:
            waited = time.perf_counter() - start
            pairs = zip(before, sf.tree.leaves(state), strict=True)
            intact = all(torch.equal(a, b) for a, b in pairs)
            pipe.send((type(error).__name__, waited, intact))
            os._exit(0)
        start = time.perf_counter()


def trial(world: int, storage: str, delay: float) -> list[tuple[str, float, bool] | None]:
    """Kill the last of some ranks after so many seconds; return what the others saw."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["shampoo_func", "torch.distributed.tensor"])
    found: list[tuple[str, float, bool] | None] = []
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank in range(world):
            own, theirs = context.Pipe()
            wanted = delay if rank == world - 1 else None
            args = (rank, world, str(Path(folder) / "store"), storage, wanted, theirs)
            process = context.Process(target=_rank, args=args, daemon=True)
            process.start()
            theirs.close()
            running.append((own, process))
        for own, _ in running[:-1]:
            seen = None
            if own.poll(60 + PATIENCE):
                try:
                    seen = own.recv()
                except EOFError:
                    seen = None  # it has ended without a word
            found.append(seen)
        for own, process in running:
            process.kill()
            process.join()
            own.close()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parse = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parse.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parse.add_argument("--trials", type=int, default=20)
    parse.add_argument("--seed", type=int, default=0)
    options = parse.parse_args(arguments)
    rng = random.Random(options.seed)
    print(
        "One rank of gloo is killed (SIGKILL) at a random time of its loop of updates. What the "
        "survivors saw.\n"
    )
    print("| storage | ranks | kills | survivors | errors | state intact | longest wait, s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for storage in STORAGES:
        for world in options.worlds:
            seen = []
            for _ in range(options.trials):
                seen += trial(world, storage, rng.uniform(0.0, 0.2))
            kinds = Counter("no error" if own is None else own[0] for own in seen)
            told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            intact = sum(own is not None and own[2] for own in seen)
            longest = max((own[1] for own in seen if own is not None), default=float("nan"))
            print(
                f"| {storage} | {world} | {options.trials} | {len(seen)} | {told} | {intact} | "
                f"{longest:.1f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
