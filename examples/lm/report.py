"""What came out: a comparison of two runs, as a table, a JSON file and a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm.training import Evaluation

__all__ = ["Result", "comparison", "table", "write_json", "write_plot"]

FRACTIONS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One optimizer's finished run."""

    name: str
    learning_rate: float
    history: list[Evaluation]
    seconds: float
    compile_seconds: float
    validation_seconds: float
    checksum: str

    @property
    def final_loss(self) -> float:
        """The validation loss after the last step."""
        return self.history[-1].validation_loss

    @property
    def seconds_per_step(self) -> float:
        """Mean training time of a step."""
        return self.seconds / self.history[-1].step

    def at_step(self, step: float) -> Evaluation:
        """Return the last evaluation no later than a step."""
        return [note for note in self.history if note.step <= step][-1]

    def at_seconds(self, seconds: float) -> Evaluation:
        """Return the last evaluation no later than a training time."""
        return [note for note in self.history if note.seconds <= seconds][-1]

    def first_reaching(self, loss: float) -> Evaluation | None:
        """Return the first evaluation at or below a validation loss."""
        return next((note for note in self.history if note.validation_loss <= loss), None)


def comparison(baseline: Result, other: Result) -> dict[str, Any]:
    """Say when `other` reached the final loss of `baseline`; None where it never did.

    Nothing is interpolated: the step is that of the first evaluation at or below the loss.
    """
    reached = other.first_reaching(baseline.final_loss)
    last = baseline.history[-1]
    return {
        "baseline": baseline.name,
        "optimizer": other.name,
        "target_loss": baseline.final_loss,
        "steps": reached.step if reached else None,
        "steps_ratio": reached.step / last.step if reached else None,
        "seconds": reached.seconds if reached else None,
        "seconds_ratio": reached.seconds / last.seconds if reached else None,
        "seconds_per_step_ratio": other.seconds_per_step / baseline.seconds_per_step,
    }


def table(results: Sequence[Result]) -> str:
    """Return the comparison as text; the first result is the baseline."""
    baseline = results[0]
    rows = [["", *(result.name for result in results)]]
    rows.append(["peak learning rate", *(f"{result.learning_rate:g}" for result in results)])
    rows += _loss_rows(results)
    rows += _target_rows(results)
    rows.append(["seconds per step", *(f"{result.seconds_per_step:.4f}" for result in results)])
    for name in ("seconds", "compile_seconds", "validation_seconds"):
        values = [f"{getattr(result, name):.1f}" for result in results]
        rows.append([_CLOCKS[name], *values])
    first, *rest = _aligned(rows)
    note = f"Losses are of the validation files, in nats per byte; target: {baseline.name}'s final."
    return "\n".join([first, "-" * len(first), *rest, note])


_CLOCKS = {
    "seconds": "training seconds",
    "compile_seconds": "warm-up and compile seconds",
    "validation_seconds": "validation seconds",
}


_AXES = {"step": "step", "seconds": "training seconds"}


def _loss_rows(results: Sequence[Result]) -> list[list[str]]:
    """Tabulate losses at equal steps, then at equal training time."""
    end = results[0].history[-1]
    rows = []
    for fraction in FRACTIONS:
        step = round(fraction * end.step)
        losses = [f"{result.at_step(step).validation_loss:.4f}" for result in results]
        rows.append([f"loss at step {step}", *losses])
    for fraction in FRACTIONS:
        seconds = fraction * end.seconds
        losses = [f"{result.at_seconds(seconds).validation_loss:.4f}" for result in results]
        rows.append([f"loss at {seconds:.0f} s", *losses])
    return rows


def _target_rows(results: Sequence[Result]) -> list[list[str]]:
    """Tabulate steps and seconds to the baseline's final loss."""
    compared = [comparison(results[0], result) for result in results]
    rows = []
    for unit, digits in (("steps", 0), ("seconds", 1)):
        cells = [
            "not reached"
            if row[unit] is None
            else f"{row[unit]:.{digits}f} ({row[f'{unit}_ratio']:.2f}x)"
            for row in compared
        ]
        rows.append([f"{unit} to loss {results[0].final_loss:.4f}", *cells])
    return rows


def _aligned(rows: list[list[str]]) -> list[str]:
    """Pad the cells: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def write_json(path: Path, results: Sequence[Result], settings: dict[str, Any]) -> None:
    """Write settings, histories and comparisons."""
    content = {
        "settings": settings,
        "comparisons": [comparison(results[0], result) for result in results[1:]],
        "results": [
            {
                **asdict(result),
                "history": [note._asdict() for note in result.history],
                "final_loss": result.final_loss,
                "seconds_per_step": result.seconds_per_step,
            }
            for result in results
        ],
    }
    path.write_text(json.dumps(_finite(content), indent=1) + "\n")


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_plot(path: Path, results: Sequence[Result]) -> bool:
    """Draw the validation losses against steps and against seconds.

    Returns:
        Whether a plot was written; it is not where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (unit, label) in zip(axes, _AXES.items(), strict=True):
        for result in results:
            axis.plot(
                [getattr(note, unit) for note in result.history[1:]],
                [note.validation_loss for note in result.history[1:]],
                label=f"{result.name}, learning rate {result.learning_rate:g}",
            )
        axis.axhline(results[0].final_loss, color="gray", linewidth=0.8, linestyle="--")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss (nats per byte)")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    return True
