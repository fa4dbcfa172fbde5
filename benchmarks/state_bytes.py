"""What Shampoo's state takes in every storage: `python -m benchmarks.state_bytes --help`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import shampoo_func as sf
from benchmarks.sets import SETS, fill

__all__ = ["COUNTED", "STORAGES", "main", "measured"]

COUNTED = ("second_moment", "factor", "root")
"""The kinds of state that the targets are about."""

STORAGES: dict[str, Any] = {
    "no codec": None,
    "packing": sf.symmetric_packing(),
    "bf16": {
        "factor": sf.symmetric_packing(torch.bfloat16),
        "root": sf.symmetric_packing(torch.bfloat16),
        "second_moment": sf.bfloat16_codec(),
    },
    "8-bit": {
        "factor": sf.symmetric_packing(),
        "root": sf.eight_bit(64),
        "second_moment": sf.bfloat16_codec(),
    },
    "4-bit, eigenvectors": {
        "factor": sf.four_bit_eigen(),
        "root": sf.four_bit_eigen(basis="eigh"),
        "second_moment": sf.bfloat16_codec(),
    },
    "4-bit, Cholesky": {
        "factor": sf.four_bit_cholesky(),
        "root": sf.four_bit_cholesky(),
        "second_moment": sf.bfloat16_codec(),
    },
}
"""What the state is kept in; "8-bit" and "4-bit, eigenvectors" as in examples/train_lm.py."""


def measured(set_name: str, block_size: int) -> dict[str, Any]:
    """Return the bytes of parameters and states, by storage and kind.

    The states are made on the device "meta", which has shapes and dtypes and no data.
    """
    params = fill(SETS[set_name](), "meta")
    states = {}
    for name, storage in STORAGES.items():
        tx = sf.shampoo(
            1e-3, weight_decay=0.01, block_size=block_size, grafting="adam", storage=storage
        )
        states[name] = sf.state_bytes(tx, tx.init(params))
    return {
        "set": set_name,
        "block_size": block_size,
        "parameters": sum(leaf.numel() * leaf.element_size() for leaf in params.values()),
        "states": states,
    }


def report(result: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    unit = result["parameters"]
    head = ["storage", *(kind.replace("_", " ") for kind in COUNTED), "these three"]
    head += ["momentum and counters", "the whole state"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name, kinds in result["states"].items():
        whole, three = sum(kinds.values()), sum(kinds[kind] for kind in COUNTED)
        numbers = [*(kinds[kind] for kind in COUNTED), three, whole - three]
        cells = [f"{number / unit:.2f}x" for number in numbers]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {whole / unit:.2f}x |")
    return "\n".join(
        [
            "# Bytes of Shampoo's state",
            "",
            f"Parameter set `{result['set']}`, {unit / 1e6:.1f} MB in float32, blocks of "
            f"{result['block_size']}, Adam grafting, beta1 = 0.9; multiples of the parameters' "
            "bytes. Written by `make bench-bytes`; nothing is timed, so any machine will do.",
            "",
            *lines,
            "",
            "bf16: packed triangles and second moments. 8-bit: roots in one byte per number, "
            "packed factors in float32, second moments in bfloat16. 4-bit: factors and roots; "
            "second moments in bfloat16. The momentum is the gradient filter's; `ema(dtype=...)` "
            "halves it.",
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print the table, and write it as Markdown and JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.state_bytes", description=__doc__)
    parser.add_argument("--set", choices=SETS, default="gpt", help="parameters (default: gpt)")
    parser.add_argument("--block-size", type=int, default=256, help="largest side of a block")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    result = measured(options.set, options.block_size)
    text = report(result)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "state_bytes.md").write_text(text)
    (options.output / "state_bytes.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
