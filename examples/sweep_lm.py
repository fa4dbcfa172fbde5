"""Sweep the learning rates of AdamW and Shampoo, n models at once by `torch.func.vmap`.

Every recipe gets the same number of trials, the same initial weights and the same batches as
in `train_lm.py`. With the default settings the runs are shorter and the batches smaller than
those of `train_lm.py`, so that the sweep takes a few minutes on two cores; `--steps 400 --batch
32` sweeps the full-length runs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import shampoo_func as sf
from lm.data import Corpus, load_corpus, training_batch, validation_batches
from lm.model import SIZES, initial_params, loss_of
from lm.progress import Progress
from lm.recipes import RECIPES, build

DEFAULT_RATES = {
    "adamw": (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2),
    "shampoo": (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2),
}
VALIDATION_BATCHES = 4


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parse = argparse.ArgumentParser(
        prog="sweep_lm.py",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parse.add_argument
    add("--optimizers", nargs="+", choices=RECIPES, default=["adamw", "shampoo"], help="recipes")
    add(
        "--learning-rates",
        nargs="+",
        type=float,
        help="peak rates for every recipe; by default a grid of factor 2 around each one's best",
    )
    add("--size", choices=SIZES, default="small", help="size of the models")
    add("--steps", type=int, default=100, help="training steps of each trial")
    add("--batch", type=int, default=16, help="windows of text per step")
    add("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    add("--device", type=torch.device, default="cpu", help="cpu, cuda or cuda:N")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads on the CPU")
    add("--out", type=Path, default=Path("runs/sweep"), help="folder for sweep.json")
    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep every recipe; return the exit status."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    corpus = load_corpus()
    rows = []
    for name in options.optimizers:
        rates = options.learning_rates or DEFAULT_RATES.get(name) or _grid(name)
        rows += sweep(options, corpus, name, torch.tensor(rates, device=options.device))
    print(table(rows))
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(options).items()}
    content = json.dumps({"settings": settings, "trials": rows}, indent=1)
    (options.out / "sweep.json").write_text(content + "\n")
    print(f"wrote {options.out / 'sweep.json'}")
    return 0


def sweep(
    options: argparse.Namespace, corpus: Corpus, name: str, rates: torch.Tensor
) -> list[dict[str, Any]]:
    """Train one model per learning rate, all in one stack, and return a row for each.

    The weights of all models are stacked, `[n, ...]`; `torch.func.vmap` maps the loss over them
    and `sf.sweep` the optimizer, with the learning rate as one more mapped argument.
    """
    config = SIZES[options.size]
    window = {"batch": options.batch, "context": config.context}
    model, params = initial_params(config, options.seed, options.device)
    params = {key: _repeated(weight, len(rates)) for key, weight in params.items()}
    tx = sf.sweep(lambda learning_rate: build(name, learning_rate, options.steps),
                  learning_rate=rates)
    clock = build(name, 1.0, options.steps)

    def loss_fn(weights: Any, windows: torch.Tensor) -> torch.Tensor:
        return loss_of(model, weights, windows)

    gradients = torch.func.vmap(torch.func.grad_and_value(loss_fn), in_dims=(0, None))
    state = tx.init(params)
    losses = torch.zeros(len(rates))
    start = time.perf_counter()
    with Progress(
        f"{name} x {len(rates)}",
        steps=options.steps,
        done=0,
        tokens_per_step=len(rates) * options.batch * config.context,
    ) as progress:
        for step in range(1, options.steps + 1):
            windows = training_batch(corpus, step, seed=options.seed, **window)
            grads, losses = gradients(params, windows.to(options.device))
            extra = {"refresh": sf.refresh_due(clock, step)} if clock.refresh_schedules else {}
            updates, state = tx.update(grads, state, params, **extra)
            params = sf.apply_updates(params, updates)
            progress.update(step, float(losses.nan_to_num(math.inf).min()), math.nan)
    seconds = time.perf_counter() - start
    held_out = validation_batches(corpus, VALIDATION_BATCHES, **window)
    validation = torch.func.vmap(loss_fn, in_dims=(0, None))
    with torch.no_grad():
        final = torch.stack([validation(params, w.to(options.device)) for w in held_out]).mean(0)
    return [
        {
            "optimizer": name,
            "learning_rate": rate,
            "training_loss": training_loss if math.isfinite(training_loss) else None,
            "validation_loss": validation_loss if math.isfinite(validation_loss) else None,
            "seconds": seconds / len(rates),
        }
        for rate, training_loss, validation_loss in zip(
            rates.tolist(), losses.tolist(), final.tolist(), strict=True
        )
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the trials as text, the best of each recipe marked."""
    lines = ["optimizer  learning rate  validation loss  s/trial"]
    best: dict[str, float] = {}
    for row in rows:
        loss = math.inf if row["validation_loss"] is None else row["validation_loss"]
        best[row["optimizer"]] = min(loss, best.get(row["optimizer"], math.inf))
    for row in rows:
        loss = row["validation_loss"]
        shown = "diverged" if loss is None else f"{loss:.4f}"
        mark = "  best" if loss == best[row["optimizer"]] else ""
        lines.append(
            f"{row['optimizer']:<9}  {row['learning_rate']:>13.4g}  {shown:>15}  "
            f"{row['seconds']:>7.1f}{mark}"
        )
    return "\n".join(lines)


def _repeated(weight: torch.Tensor, count: int) -> torch.Tensor:
    """Stack `count` copies of a tensor."""
    return weight.expand(count, *weight.shape).contiguous()


def _grid(name: str) -> tuple[float, ...]:
    """Return six rates by factors of two around a recipe's own."""
    return tuple(RECIPES[name].learning_rate * 2.0**power for power in range(-3, 3))


if __name__ == "__main__":
    sys.exit(main())
