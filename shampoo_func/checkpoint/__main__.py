"""Say what is in a checkpoint: `python -m shampoo_func.checkpoint inspect PATH`.

PATH is a folder of save_checkpoint, or a file of torch.save or safetensors that holds what
to_state_dict returned. Exit status: 0 if it is whole, 1 if it is damaged or not one, 2 for usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from shampoo_func.checkpoint.stored import look_into
from shampoo_func.checkpoint.summary import summarize
from shampoo_func.errors import CheckpointError

SHOWN = 10


def main(arguments: list[str] | None = None) -> int:
    """Print a summary, and return the exit status."""
    options = _parse(arguments)
    try:
        summary = summarize(look_into(options.path))
    except CheckpointError as error:
        summary = {"valid": False, "problem": str(error)}
    if options.json:
        print(json.dumps({"path": str(options.path), **summary}, indent=2))
    else:
        print("\n".join(_lines(str(options.path), summary, everything=options.all)))
    return 0 if summary["valid"] else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m shampoo_func.checkpoint", description=(__doc__ or "").split("\n\n")[0]
    )
    inspect = parser.add_subparsers(required=True).add_parser("inspect", help="say what is in it")
    inspect.add_argument("path", type=Path, help="a folder, or a .pt or .safetensors file")
    inspect.add_argument("--json", action="store_true", help="everything, as JSON")
    inspect.add_argument("--all", action="store_true", help="every parameter, not the largest")
    options = parser.parse_args(arguments)
    if not options.path.exists():
        parser.error(f"there is no {str(options.path)!r}")
    return options


def _lines(path: str, summary: dict[str, Any], *, everything: bool) -> list[str]:
    lines = [f"{path}: {'complete' if summary['valid'] else 'NOT VALID'}"]
    if summary["problem"]:
        lines.append(f"  {summary['problem']}")
    if "kind" not in summary:
        return lines
    lines.append(f"stored as {summary['kind']}, format {summary['format']}")
    lines.append(f"dtypes    {', '.join(summary['dtypes']) or 'none'}")
    lines.append(f"packed    {'upper triangles' if summary['packed'] else 'no'}")
    for stage, own in summary["blocks"].items():
        settings = ", ".join(f"{name}={value}" for name, value in own.items())
        lines.append(f"blocks    {stage or '(the whole)'}: {settings}")
    rows = [(f"{own['stage']}: {own['role']}", own) for own in summary["roles"]]
    lines += _table("state", [*rows, ("all", summary["total"])])
    if summary["others"]:
        lines += _table("beside it", [(own["prefix"], own) for own in summary["others"]])
    owners = summary["parameters"]
    shown = owners if everything else owners[:SHOWN]
    lines += _table("state by parameter", [(own["parameter"] or "(none)", own) for own in shown])
    if len(shown) < len(owners):
        lines.append(f"  and {len(owners) - len(shown)} more (--all)")
    return lines


def _table(title: str, rows: list[tuple[str, dict[str, int]]]) -> list[str]:
    width = max([len(title), *(len(name) + 2 for name, _ in rows)])
    head = f"\n{title:<{width}}  {'tensors':>9}  {'bytes':>15}"
    return [
        head,
        *(f"  {name:<{width - 2}}  {own['tensors']:>9}  {own['bytes']:>15,}" for name, own in rows),
    ]


if __name__ == "__main__":
    sys.exit(main())
