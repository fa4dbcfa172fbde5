"""Results as a table, as JSON and as a bar chart."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.record import Result
from benchmarks.suites import SUITES

__all__ = ["read", "read_versions", "shown", "tables", "write"]


def shown(result: Result) -> str:
    """Return the value with its unit, as people read it."""
    if result.value is None:
        return "-"
    if result.unit == "s":
        return f"{result.value:.2f} s" if result.value >= 10 else f"{1e3 * result.value:.2f} ms"
    if result.unit == "bytes":
        return f"{result.value / 2**20:.1f} MiB"
    if result.unit == "graphs":
        return f"{result.value:.0f}"
    return f"{result.value:.2f}" + ("x" if result.unit == "x" else "")


def _verdict(result: Result) -> str:
    if result.error:
        return result.error
    if result.met is None:
        return result.note
    return "met" if result.met else "NOT met"


def _markdown(head: str, rows: Sequence[Sequence[str]]) -> str:
    body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    names = head.split(", ")
    lines = [names, ["---"] * len(names), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _where(result: Result) -> list[str]:
    return [result.set or "-", str(result.threads)]


def tables(results: Sequence[Result], machine: dict[str, Any]) -> str:
    """Return all results in Markdown: the targets, what failed, then suite by suite."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        f"# Benchmarks: {machine['machine']}",
        f"{machine['date']}; {versions}. float32, blocks of {machine['block_size']}; medians of "
        "interleaved rounds. Written by `make bench`; see docs/benchmarks.md for what is "
        "measured. Read ratios, not milliseconds.",
    ]
    limited = [r for r in results if r.target is not None]
    if limited:
        rows = [
            [r.suite, *_where(r), r.name, shown(r), f"{r.target:g}", _verdict(r)] for r in limited
        ]
        head = "suite, set, threads, what, measured, at most, verdict"
        parts += ["## Targets", _markdown(head, rows)]
    failed = [r for r in results if r.error and r.target is None]
    if failed:
        rows = [[r.suite, *_where(r), r.name, r.error] for r in failed]
        head = "suite, set, threads, what, error"
        parts += ["## Not measured", _markdown(head, rows)]
    for suite in SUITES.values():
        own = [r for r in results if r.suite == suite.name and not r.error and r.target is None]
        if own:
            rows = [[*_where(r), r.name, shown(r), r.note] for r in own]
            head = "set, threads, what, measured, note"
            parts += [f"## {suite.name}: {suite.about}", _markdown(head, rows)]
    return "\n\n".join(parts) + "\n"


def read(path: Path) -> list[Result]:
    """Return the results of an earlier run."""
    rows = json.loads(path.read_text())["results"]
    names = [field.name for field in fields(Result)]
    return [
        Result(**{**{name: row[name] for name in names}, "samples": tuple(row["samples"])})
        for row in rows
    ]


def read_versions(path: Path) -> dict[str, str]:
    """Return the versions of what an earlier run found."""
    versions: dict[str, str] = json.loads(path.read_text())["versions"]
    return versions


def write(results: Sequence[Result], machine: dict[str, Any], stem: Path) -> list[str]:
    """Write Markdown, JSON and, if matplotlib is there, a chart; return what was written."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    content = {**machine, "results": [_rounded(result) for result in results]}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    stem.with_suffix(".md").write_text(tables(results, machine))
    written = [f"{stem}.json", f"{stem}.md"]
    if importlib.util.find_spec("matplotlib") is None:
        return [*written, "no chart: matplotlib is not installed (pip install '.[plot]')"]
    from benchmarks.plot import draw

    if draw(results, machine, stem.with_suffix(".png")):
        written.append(f"{stem}.png")
    return written


def _rounded(result: Result) -> dict[str, Any]:
    """Return a result as JSON has it: six digits are more than any clock's."""
    row = asdict(result)
    row["samples"] = [float(f"{sample:.6g}") for sample in result.samples]
    row["value"] = None if result.value is None else float(f"{result.value:.6g}")
    return row | {"met": result.met}
