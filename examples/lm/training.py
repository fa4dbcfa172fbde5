"""The functional training step, evaluation, and the loop around them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

import shampoo_func as sf
from lm.data import Corpus, training_batch
from lm.model import GPTConfig, loss_of

__all__ = ["Evaluation", "Run", "Step", "Task", "evaluate", "make_step", "train", "warm_up"]

Step = Callable[..., tuple[Any, Any, torch.Tensor]]


class Evaluation(NamedTuple):
    """What is known after so many steps; seconds are of training alone."""

    step: int
    seconds: float
    training_loss: float
    validation_loss: float


@dataclass(slots=True)
class Run:
    """One optimizer's training: all that a checkpoint holds."""

    params: dict[str, torch.Tensor]
    state: Any
    step: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    validation_seconds: float = 0.0
    history: list[Evaluation] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What every optimizer is given alike."""

    config: GPTConfig
    model: nn.Module
    corpus: Corpus
    validation: list[torch.Tensor]
    steps: int
    batch: int
    seed: int
    evaluate_every: int
    device: torch.device

    def windows(self, step: int) -> torch.Tensor:
        """Return the training batch of a step, on the device."""
        windows = training_batch(
            self.corpus, step, seed=self.seed, batch=self.batch, context=self.config.context
        )
        return windows.to(self.device)

    def synchronize(self) -> None:
        """Wait for the device, so that clocks are honest."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def make_step(model: nn.Module, tx: sf.Transformation, *, compiled: bool) -> Step:
    """Return `step(params, state, windows, refresh=...) -> (params, state, loss)`.

    `refresh` is static: with it the compiled step has two graphs, one that recomputes the
    preconditioners' roots and one that does not, and never waits for the device.
    """

    def step(
        params: Any, state: Any, windows: torch.Tensor, *, refresh: bool
    ) -> tuple[Any, Any, torch.Tensor]:
        grads, loss = torch.func.grad_and_value(loss_of, argnums=1)(model, params, windows)
        extra = {"refresh": refresh} if "refresh" in tx.extras else {}
        updates, state = tx.update(grads, state, params, **extra)
        return sf.apply_updates(params, updates), state, loss

    donated: Step = sf.donate(step)
    return torch.compile(donated, fullgraph=True) if compiled else donated


def warm_up(task: Task, tx: sf.Transformation, step: Step, run: Run) -> None:
    """Call every variant of the step that will occur on copies, and note how long that took."""
    start = time.perf_counter()
    for refresh in sorted({sf.refresh_due(tx, number) for number in range(1, task.steps + 1)}):
        params, state = copy.deepcopy((run.params, run.state))
        step(params, state, task.windows(1), refresh=refresh)
    task.synchronize()
    run.compile_seconds += time.perf_counter() - start


def evaluate(task: Task, params: dict[str, torch.Tensor]) -> float:
    """Return the mean loss on the validation batches."""
    with torch.no_grad():
        losses = [loss_of(task.model, params, windows) for windows in task.validation]
    return float(torch.stack(losses).mean())


def train(
    task: Task,
    tx: sf.Transformation,
    step: Step,
    run: Run,
    *,
    on_step: Callable[[Run, torch.Tensor], bool],
) -> bool:
    """Train from where `run` stands to the last step.

    Args:
        task: What to train on.
        tx: The optimizer, asked when a refresh is due.
        step: Its step function.
        run: Where training stands; changed in place.
        on_step: Called after every step with the run and the batch's loss; False stops.

    Returns:
        Whether the last step was reached.
    """
    if not run.history:
        with torch.no_grad():
            first = loss_of(task.model, run.params, task.windows(1))
        _note(task, run, float(first))
    while run.step < task.steps:
        due = sf.refresh_due(tx, run.step + 1)
        with _counted(task, run, "seconds"):
            run.params, run.state, loss = step(
                run.params, run.state, task.windows(run.step + 1), refresh=due
            )
        run.step += 1
        if run.step % task.evaluate_every == 0 or run.step == task.steps:
            _note(task, run, float(loss))
        if not on_step(run, loss):
            return run.step == task.steps
    return True


def _note(task: Task, run: Run, training_loss: float) -> None:
    """Evaluate and append to the history."""
    with _counted(task, run, "validation_seconds"):
        validation_loss = evaluate(task, run.params)
    run.history.append(Evaluation(run.step, run.seconds, training_loss, validation_loss))


@contextmanager
def _counted(task: Task, run: Run, clock: str) -> Iterator[None]:
    """Add the time spent inside to one of the run's clocks."""
    start = time.perf_counter()
    yield
    task.synchronize()
    setattr(run, clock, getattr(run, clock) + time.perf_counter() - start)
