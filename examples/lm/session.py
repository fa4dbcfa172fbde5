"""One optimizer's run from start or checkpoint to the end, with progress and Ctrl-C."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

import shampoo_func as sf
from lm import checkpoint, recipes, training
from lm.model import initial_params
from lm.progress import Progress
from lm.report import Result
from lm.training import Run, Step, Task

__all__ = ["Interrupted", "SaveOnInterrupt", "Session"]

LOSS_EVERY = 5
"""Steps between two readings of the loss for the progress bar."""


class Interrupted(Exception):
    """Ctrl-C was pressed, and the run was saved."""


class SaveOnInterrupt:
    """Turns the first Ctrl-C into a request to save and stop; the second stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> SaveOnInterrupt:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nCtrl-C: saving after this step (again: stop at once)", file=sys.stderr)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """How to run one optimizer of the comparison."""

    name: str
    learning_rate: float
    storage: str
    task: Task
    compiled: bool
    path: Path
    save_every: int
    fingerprint: dict[str, Any]

    def run(self, interrupt: SaveOnInterrupt) -> Result:
        """Train to the end, from the checkpoint if there is one.

        Raises:
            Interrupted: If Ctrl-C was pressed; the checkpoint is written.
        """
        tx = recipes.build(self.name, self.learning_rate, self.task.steps, self.storage)
        run = self._start(tx)
        if run.step < self.task.steps:
            self._train(tx, run, interrupt)
        return Result(
            name=self.name,
            learning_rate=self.learning_rate,
            history=run.history,
            seconds=run.seconds,
            compile_seconds=run.compile_seconds,
            validation_seconds=run.validation_seconds,
            checksum=checkpoint.checksum(run.params),
        )

    def _start(self, tx: sf.Transformation) -> Run:
        """Return the run at its beginning, or where its checkpoint stands."""
        _, params = initial_params(self.task.config, self.task.seed, self.task.device)
        run = Run(params, tx.init(params))
        if self.path.exists():
            checkpoint.load(self.path, run, self.fingerprint)
            print(f"{self.name}: continuing after step {run.step}", file=sys.stderr)
        return run

    def _train(self, tx: sf.Transformation, run: Run, interrupt: SaveOnInterrupt) -> None:
        """Warm up, train, and save at the end whatever the reason for it."""
        step = training.make_step(self.task.model, tx, compiled=self.compiled)
        finished = self._warm_up(tx, step, run, interrupt) and self._loop(tx, step, run, interrupt)
        checkpoint.save(self.path, run, self.fingerprint)
        if not finished:
            raise Interrupted(f"{self.name} saved after step {run.step} of {self.task.steps}")

    def _warm_up(
        self, tx: sf.Transformation, step: Step, run: Run, interrupt: SaveOnInterrupt
    ) -> bool:
        """Compile before the clock starts; return whether to go on."""
        if self.compiled:
            print(f"{self.name}: compiling ...", file=sys.stderr)
        try:
            if not interrupt.requested:
                training.warm_up(self.task, tx, step, run)
        except Exception:
            # Ctrl-C also reaches the C++ compiler, which then fails
            if not interrupt.requested:
                raise
        return not interrupt.requested

    def _loop(
        self, tx: sf.Transformation, step: Step, run: Run, interrupt: SaveOnInterrupt
    ) -> bool:
        """Train with a progress bar and checkpoints; return whether the end was reached."""
        tokens = self.task.batch * self.task.config.context
        with Progress(
            self.name, steps=self.task.steps, done=run.step, tokens_per_step=tokens
        ) as progress:

            def on_step(run: Run, loss: torch.Tensor) -> bool:
                if run.step % LOSS_EVERY == 0 or run.step == self.task.steps:
                    held_out = run.history[-1].validation_loss
                    progress.update(run.step, f"loss {loss:.3f}, validation {held_out:.3f}")
                if run.step % self.save_every == 0:
                    checkpoint.save(self.path, run, self.fingerprint)
                return not interrupt.requested

            return training.train(self.task, tx, step, run, on_step=on_step)
