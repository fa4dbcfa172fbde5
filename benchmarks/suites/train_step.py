"""The whole training step of the example's model with Shampoo, over the same with AdamW."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import shampoo_func as sf
from benchmarks.cases import adamw, shampoo
from benchmarks.ratios import Ratio, Steps, step_results
from benchmarks.record import Result, Settings, Suite, Unit
from benchmarks.timing import Job, interleave, timer_for

__all__ = ["SUITE"]

TOKENS = 16 * 1024
PERIOD = 50

RATIO = Ratio(
    ours=("train-shampoo", f"mean {PERIOD}"),
    theirs=("train-adamw", "plain"),
    set="",
    limits={None: 1.05},
)


def _jobs(
    case: str, tx: sf.Transformation, model: Any, params: Any, batches: Any, *, compiled: bool
) -> list[Job]:
    from lm.training import make_step

    # what a quick run does not compile is the same function, eager
    step = make_step(model, tx, compiled=compiled)
    own = {name: leaf.clone() for name, leaf in params.items()}
    state = tx.init(own)

    def job(kind: str, refresh: bool) -> Job:
        # the step is donated: parameters and state are updated in place
        def run(number: int) -> None:
            step(own, state, batches[number % len(batches)], refresh=refresh)

        return Job(case, kind, run)

    kinds = [("refresh", True)] if tx.refresh_policies else []
    return [job(kind, refresh) for kind, refresh in [*kinds, ("plain", False)]]


def run(settings: Settings, unit: Unit) -> Iterator[Result]:
    """Time both steps, interleaved, 16k tokens each."""
    sys.path.append(str(Path(__file__).parents[2] / "examples"))
    from lm.model import SIZES, initial_params

    config = SIZES["tiny" if settings.quick else "small"]
    batch = 2 if settings.quick else TOKENS // config.context
    model, params = initial_params(config, 0, torch.device(settings.device))
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(config.vocabulary, (batch, config.context + 1), generator=generator).to(
            settings.device
        )
        for _ in range(2)
    ]
    jobs = [
        job
        for case, tx in (
            ("train-adamw", adamw(settings.block_size)),
            ("train-shampoo", shampoo(settings.block_size)),
        )
        for job in _jobs(case, tx, model, params, batches, compiled=not settings.quick)
    ]
    clock, timer = timer_for(settings.device, unit.threads)
    measured = interleave(jobs, settings.rounds, timer, seconds=2 * settings.seconds)
    yield from step_results(unit, f"{batch * config.context} tokens; {clock}", measured)
    yield RATIO.result(Steps.of(measured), settings, unit, {})


SUITE = Suite(
    name="train_step",
    about="the whole training step at 16k tokens, Shampoo at period 50 over AdamW",
    run=run,
    threaded=True,
)
