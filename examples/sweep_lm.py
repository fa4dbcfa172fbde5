"""Sweep the learning rates of AdamW and Shampoo, n models at once by `torch.func.vmap`.

Every optimizer gets the same number of trials, the same initial weights and the same batches,
as in `train_lm.py`. By default the trials are shorter and the batches smaller than there, so
that the sweep takes a few minutes on two cores; `--steps 400 --batch 32` sweeps full runs.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm.data import Corpus, load_corpus, training_batch, validation_batches
from lm.model import SIZES, initial_params, loss_of
from lm.progress import Progress
from lm.recipes import RECIPES, build, recipe_names

import shampoo_func as sf

FACTORS = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
"""The rates of a sweep, as multiples of the default rate in `RECIPES`."""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parse = argparse.ArgumentParser(
        prog="sweep_lm.py",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parse.add_argument
    add(
        "--optimizers",
        type=recipe_names,
        default="adamw,shampoo",
        metavar="NAMES",
        help=f"comma-separated; known: {', '.join(RECIPES)}",
    )
    add(
        "--learning-rates",
        nargs="+",
        type=float,
        default=argparse.SUPPRESS,
        metavar="RATE",
        help="peak rates for every optimizer (default: six around each one's own)",
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
    """Sweep every optimizer; return the exit status."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    # vmap runs the CPU's attention kernel model by model, which costs next to nothing here
    warnings.filterwarnings("ignore", message="There is a performance drop")
    corpus = load_corpus()
    trials = []
    for name in options.optimizers:
        default = [factor * RECIPES[name].learning_rate for factor in FACTORS]
        given = getattr(options, "learning_rates", default)
        rates = torch.tensor(given, device=options.device)
        trials += sweep(options, corpus, name, rates)
    print(table(trials))
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"settings": vars(options), "trials": trials}
    path = options.out / "sweep.json"
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")
    print(f"wrote {path}")
    return 0


def sweep(
    options: argparse.Namespace, corpus: Corpus, name: str, rates: torch.Tensor
) -> list[dict[str, Any]]:
    """Train one model per learning rate, all in one stack, and return a row for each.

    The weights of all models are stacked, `[n, ...]`; `torch.func.vmap` maps the loss over them
    and `sf.sweep` the optimizer, with the learning rate as one more mapped argument.
    """
    config = SIZES[options.size]
    model, params = initial_params(config, options.seed, options.device)
    params = sf.stack_copies(params, len(rates))
    tx = sf.sweep(
        lambda learning_rate: build(name, learning_rate, options.steps), learning_rate=rates
    )

    def loss_fn(weights: Any, windows: torch.Tensor) -> torch.Tensor:
        return loss_of(model, weights, windows)

    start = time.perf_counter()
    params = _train(options, corpus, name, tx, loss_fn, params)
    seconds = (time.perf_counter() - start) / len(rates)
    with torch.no_grad():
        losses = [
            torch.func.vmap(loss_fn, in_dims=(0, None))(params, windows.to(options.device))
            for windows in validation_batches(corpus, config.context)
        ]
    return [
        {
            "optimizer": name,
            "learning_rate": rate,
            "validation_loss": loss if math.isfinite(loss) else None,
            "seconds": seconds,
        }
        for rate, loss in zip(rates.tolist(), torch.stack(losses).mean(0).tolist(), strict=True)
    ]


def _train(
    options: argparse.Namespace,
    corpus: Corpus,
    name: str,
    tx: sf.Transformation,
    loss_fn: Any,
    params: Any,
) -> Any:
    """Return the stacked weights after all steps."""
    context, runs = SIZES[options.size].context, next(iter(params.values())).shape[0]
    gradients = torch.func.vmap(torch.func.grad_and_value(loss_fn), in_dims=(0, None))
    state = tx.init(params)
    tokens = runs * options.batch * context
    with Progress(f"{name} x{runs}", steps=options.steps, done=0, tokens_per_step=tokens) as bar:
        for step in range(1, options.steps + 1):
            windows = training_batch(
                corpus, step, seed=options.seed, batch=options.batch, context=context
            )
            grads, losses = gradients(params, windows.to(options.device))
            extra = {"refresh": sf.refresh_due(tx, step)} if "refresh" in tx.extras else {}
            updates, state = tx.update(grads, state, params, **extra)
            params = sf.apply_updates(params, updates)
            bar.update(step, f"best loss {losses.nan_to_num(math.inf).min():.3f}")
    return params


def table(trials: Sequence[dict[str, Any]]) -> str:
    """Return the trials as text, the best of each optimizer marked."""
    best: dict[str, float] = {}
    for trial in trials:
        if trial["validation_loss"] is not None:
            name, loss = trial["optimizer"], trial["validation_loss"]
            best[name] = min(loss, best.get(name, math.inf))
    lines = [f"{'optimizer':<10}{'learning rate':>14}{'validation loss':>17}{'s/trial':>9}"]
    for trial in trials:
        name, loss = trial["optimizer"], trial["validation_loss"]
        shown = "diverged" if loss is None else f"{loss:.4f}"
        mark = "  best" if loss is not None and loss == best[name] else ""
        lines.append(
            f"{name:<10}{trial['learning_rate']:>14.4g}{shown:>17}{trial['seconds']:>9.1f}{mark}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
