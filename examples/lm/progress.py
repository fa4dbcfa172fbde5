"""A progress bar where tqdm and a terminal are at hand, plain lines elsewhere."""

from __future__ import annotations

import importlib
import sys
import time
from types import TracebackType
from typing import Any

__all__ = ["Progress"]

LINE_EVERY = 10.0
"""Seconds between two plain lines."""


class Progress:
    """Shows loss, tokens per second and the time left of one run."""

    def __init__(self, name: str, *, steps: int, done: int, tokens_per_step: int) -> None:
        self._name, self._steps, self._first, self._tokens = name, steps, done, tokens_per_step
        self._start = self._last_line = time.perf_counter()
        self._bar = _bar(name, steps, done)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, step: int, loss: str) -> None:
        """Show where the run stands after `step` steps."""
        elapsed = time.perf_counter() - self._start
        rate = self._tokens * (step - self._first) / max(elapsed, 1e-9)
        text = f"{loss}, {_short(rate)} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            self._print_line(step, elapsed, text)

    def _print_line(self, step: int, elapsed: float, text: str) -> None:
        """Print a line every few seconds, and at the end."""
        now = time.perf_counter()
        if now - self._last_line < LINE_EVERY and step < self._steps:
            return
        self._last_line = now
        left = elapsed * (self._steps - step) / max(step - self._first, 1)
        minutes, seconds = divmod(round(left), 60)
        print(
            f"{self._name} {step}/{self._steps}: {text}, {minutes}:{seconds:02d} left",
            file=sys.stderr,
            flush=True,
        )


def _bar(name: str, steps: int, done: int) -> Any | None:
    """Return a tqdm bar, or None where there is no tqdm or no terminal."""
    if not sys.stderr.isatty():
        return None
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        return None
    layout = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"
    return tqdm(desc=name, total=steps, initial=done, bar_format=layout, dynamic_ncols=True)


def _short(number: float) -> str:
    """Write a rate with at most three digits."""
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
