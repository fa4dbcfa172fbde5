"""What each rank sends per update, counted: `python -m benchmarks.sent`, a Markdown table."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.multiprocessing.spawn import spawn

import shampoo_func as sf
from shampoo_func.sharding import CountCollectives

__all__ = ["expected", "main"]


STORAGES: dict[str, tuple[int, list[Placement], list[Placement]]] = {
    "DDP": (1, [Replicate()], [Replicate()]),
    "DDP, gradients not reduced": (1, [Replicate()], [Partial()]),
    "FSDP2, Shard(0)": (1, [Shard(0)], [Shard(0)]),
    "TP, Shard(1)": (1, [Shard(1)], [Shard(1)]),
    "FSDP2 x TP": (2, [Shard(0), Shard(1)], [Shard(0), Shard(1)]),
    "HSDP, 2 replicas": (2, [Replicate(), Shard(0)], [Replicate(), Shard(0)]),
}
"""Mesh dimensions, placements of parameters and of gradients."""


def expected(storage: str, elements: int, world: int) -> float:
    """Return how many elements a rank sends on average, by the formulas of the guide."""
    share = (world - 1) / world
    if storage == "DDP":
        return elements * share
    if storage.startswith("DDP"):
        return 2 * elements * share
    if storage.startswith("HSDP"):
        shards = world // 2
        if shards == 1:  # every rank has all
            return elements * share
        return elements / world * (1 - 1 / shards) + elements / shards * share
    return 2 * elements / world * share


def shapes(layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return the matrices of a small GPT."""
    found: dict[str, tuple[int, ...]] = {"embedding": (512, width)}
    for layer in range(layers):
        found |= {
            f"h.{layer}.qkv": (3 * width, width),
            f"h.{layer}.out": (width, width),
            f"h.{layer}.up": (4 * width, width),
            f"h.{layer}.down": (width, 4 * width),
        }
    return found


def _count(rank: int, world: int, store: str, layers: int, width: int, block: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    sizes = shapes(layers, width)
    for name, (dims, own, grad) in STORAGES.items():
        mesh = init_device_mesh("cpu", (world,) if dims == 1 else (2, world // 2))

        def placed(kinds: list[Placement], mesh: Any = mesh) -> dict[str, torch.Tensor]:
            whole = {key: torch.ones(size) for key, size in sizes.items()}
            if any(isinstance(kind, Partial) for kind in kinds):
                return {
                    key: DTensor.from_local(leaf, mesh, kinds, run_check=False)
                    for key, leaf in whole.items()
                }
            return {key: distribute_tensor(leaf, mesh, kinds) for key, leaf in whole.items()}

        tx = sf.blocked(sf.trace(0.9), block_size=block, mesh=mesh)
        params, grads = placed(own), placed(grad)
        state = tx.init(params)
        with CountCollectives() as counted:
            tx.update(grads, state, params)
        sent = torch.tensor([float(counted.sent)])
        dist.all_reduce(sent)
        if rank == 0:
            elements = sum(leaf.numel() for leaf in params.values())
            mean, wanted = sent.item() / world, expected(name, elements, world)
            print(
                f"| {name} | {world} | {counted.calls} | {4 * mean / 1e6:.3f} | "
                f"{4 * wanted / 1e6:.3f} | {mean / wanted:.3f} |",
                flush=True,
            )
    dist.destroy_process_group()
    os._exit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parse = argparse.ArgumentParser(prog="python -m benchmarks.sent", description=__doc__)
    parse.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parse.add_argument("--layers", type=int, default=8)
    parse.add_argument("--width", type=int, default=256)
    parse.add_argument("--block", type=int, default=256)
    options = parse.parse_args(arguments)
    print("| storage | ranks | collectives | MB sent per rank | formula | ratio |")
    print("|---|---|---|---|---|---|", flush=True)
    for world in options.worlds:
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            args = (world, store, options.layers, options.width, options.block)
            spawn(_count, args, nprocs=world)  # type: ignore[no-untyped-call]
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
