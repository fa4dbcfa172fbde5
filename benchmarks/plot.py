"""The bar chart of the results: mean steps by set, and measured ratios over their targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.record import Result

__all__ = ["draw"]

OURS, OTHERS, OVER = "#1f6fb4", "#a0a8b0", "#c44e52"
MINE = ("shampoo-", "soap-compiled", "adamw-")
MEAN = "mean, every 10"


def draw(results: Sequence[Result], machine: dict[str, Any], path: Path) -> bool:
    """Draw the chart as PNG; return whether there was anything to draw."""
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    groups = _mean_steps(results)
    limited = [r for r in results if r.target and r.value is not None]
    bars = [len(rows) for rows in groups.values()] + ([len(limited)] if limited else [])
    if not bars:
        return False
    figure = Figure(figsize=(9, sum(0.26 * count + 0.9 for count in bars)), layout="constrained")
    axes = figure.subplots(len(bars), 1, squeeze=False, height_ratios=[n + 2 for n in bars])[:, 0]
    for axis, (title, rows) in zip(axes, groups.items(), strict=False):
        names = list(rows)
        colors = [OURS if name.startswith(MINE) else OTHERS for name in names]
        axis.barh(names, [1e3 * rows[name] for name in names], color=colors)
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_xlabel("ms, mean step with a refresh every 10 steps", fontsize=8)
    if limited:
        shares = [(r.value or 0.0) / (r.target or 1.0) for r in limited]
        labels = [_label(r) for r in limited]
        colors = [OURS if share <= 1 else OVER for share in shares]
        places = range(len(limited))
        axes[-1].barh(places, shares, color=colors)
        axes[-1].set_yticks(places, labels)
        axes[-1].axvline(1.0, color="black", linewidth=0.8)
        axes[-1].set_title("measured over target: at most 1", loc="left", fontsize=9)
    for axis in axes:
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
    figure.suptitle(f"{machine['machine']}, {machine['date']}", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True


def _mean_steps(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Return, by set and threads, the mean step of every optimizer, the fastest first.

    What both suites time is shown as `peers` has it, next to the peers. Optimizers whose steps are
    all alike have their plain step.
    """
    groups: dict[str, dict[str, float]] = {}
    for suite in ("steps", "peers"):
        for result in results:
            if result.suite != suite or result.value is None or result.unit != "s":
                continue
            title = f"{result.set}, {result.threads} thread(s)"
            case, _, kind = result.name.partition(": ")
            group = groups.setdefault(title, {})
            # the plain step comes first in the results, and the mean replaces it
            if kind in ("plain", MEAN):
                group[case] = result.value
    return {
        title: dict(sorted(group.items(), key=lambda item: item[1]))
        for title, group in groups.items()
        if group
    }


def _label(result: Result) -> str:
    return f"{result.name} ({result.set or result.suite}, {result.threads})"
