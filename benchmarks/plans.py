"""State per rank of known models, planned: `python -m benchmarks.plans`, a Markdown table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

import shampoo_func as sf
from benchmarks.shapes import MODELS, Shapes
from shampoo_func.blocks import LeafSpec, plan_blocks
from shampoo_func.sharding import balance, plan_shards

__all__ = ["main", "row"]


def row(name: str, shapes: Shapes, block: int, world: int) -> str:
    """Return a line: blocks, bytes per rank, balance of ours and of plain LPT, planning time."""
    params = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    tx = sf.blocked(sf.precondition(sf.kronecker()), block_size=block)
    start = time.perf_counter()
    balances = {}
    for what, cost in (("bytes", sf.byte_cost()), ("cost", sf.cubic_cost())):
        specs = [LeafSpec.of(leaf) for leaf in params.values()]
        blocks = plan_blocks(specs, block_size=block)
        for assignment in ("bucket_lpt", "lpt", "chunk"):
            plan = plan_shards(blocks, list(params), world, assignment=assignment, cost=cost)
            balances[what, assignment] = balance(plan.loads())
    seconds = (time.perf_counter() - start) / 6
    report = sf.state_report(tx, params, world)
    mean = sum(report.bytes) / world / 2**20
    ours = [balances[what, "bucket_lpt"] for what in ("bytes", "cost")]
    greedy = [balances[what, "lpt"] for what in ("bytes", "cost")]
    even = [balances[what, "chunk"] for what in ("bytes", "cost")]
    shown = " | ".join(
        f"{a:.3f} / {b:.3f} / {c:.3f}" for a, b, c in zip(ours, greedy, even, strict=True)
    )
    return (
        f"| {name} | {block} | {world} | {sum(report.blocks)} | {mean:.1f} | {shown} | "
        f"{seconds:.3f} |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parse = argparse.ArgumentParser(prog="python -m benchmarks.plans", description=__doc__)
    parse.add_argument("--blocks", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parse.add_argument("--worlds", type=int, nargs="+", default=[2, 4, 8, 64, 512])
    parse.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parse.parse_args(arguments)
    print(
        "Max/mean over ranks as bucket_lpt / lpt / chunk, balanced by what the column says; state "
        "of kronecker in float32.\n"
    )
    print("| model | block | ranks | blocks | MiB per rank | bytes | cubic cost | s per plan |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.models:
        for block in options.blocks:
            for world in options.worlds:
                print(row(name, MODELS[name](), block, world), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
