"""Train a small GPT with AdamW and with Shampoo, and compare them.

Both start from the same weights and see the same batches: the source of Python's own standard
library, byte by byte, with whole files held out for validation. Run `python
examples/train_lm.py --help` for the options; `make demo` runs it with the defaults.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm.checkpoint import CheckpointError
from lm.data import Corpus, load_corpus, validation_batches
from lm.model import SIZES, initial_params
from lm.recipes import RECIPES, STORAGES, recipe_names
from lm.report import comparison, table, write_json, write_plot
from lm.session import Interrupted, SaveOnInterrupt, Session
from lm.training import Task

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

LONG = 4000
"""From so many steps on, compiling on a CPU saves more time than it takes."""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parse = argparse.ArgumentParser(
        prog="train_lm.py",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parse.add_argument
    add(
        "--optimizers",
        type=recipe_names,
        default="adamw,shampoo",
        metavar="NAMES",
        help=f"comma-separated, the first is the baseline; known: {', '.join(RECIPES)}",
    )
    add(
        "--learning-rate",
        type=_named_rate,
        action="append",
        default=argparse.SUPPRESS,
        metavar="NAME=RATE",
        help="peak learning rate of one optimizer; may be repeated (default: the swept best)",
    )
    add("--size", choices=SIZES, default="small", help="size of the model")
    add("--steps", type=_positive, default=400, help="training steps of each optimizer")
    add("--batch", type=_positive, default=32, help="windows of text per step")
    add("--seed", type=int, default=0, help="seed of the initial weights and of the data order")
    add("--device", type=torch.device, default="cpu", help="cpu, cuda or cuda:N")
    add("--threads", type=_positive, default=torch.get_num_threads(), help="threads on the CPU")
    add(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help=f"torch.compile; auto: where it pays, on CUDA or from {LONG} steps, and is possible",
    )
    add("--storage", choices=STORAGES, default="full", help="what Shampoo keeps its state in")
    add("--evaluate-every", type=_positive, default=10, help="steps between validations")
    add("--save-every", type=_positive, default=50, help="steps between checkpoints")
    add("--out", type=Path, default=Path("runs/lm"), help="folder for checkpoints and results")
    add("--resume", action="store_true", help="continue what --out holds, bit for bit")
    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(argv)
    _configure(options)
    corpus = load_corpus()
    sessions = [_session(options, name, corpus) for name in options.optimizers]
    try:
        _check_folder(options, sessions)
        with SaveOnInterrupt() as interrupt:
            results = [session.run(interrupt) for session in sessions]
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(f"{stop}; continue with\n  {_resuming(argv, options)}", file=sys.stderr)
        return INTERRUPTED
    print(table(results))
    for result in results[1:]:
        print(_sentence(comparison(results[0], result)))
    write_json(options.out / "results.json", results, _settings(options, corpus))
    print(f"wrote {options.out / 'results.json'}")
    if write_plot(options.out / "curves.png", results):
        print(f"wrote {options.out / 'curves.png'}")
    else:
        print("no plot: matplotlib is not installed (pip install 'shampoo-func[plot]')")
    return 0


def _resuming(argv: list[str], options: argparse.Namespace) -> str:
    """Return the command that continues this run."""
    more = [] if options.resume else ["--resume"]
    if not any(argument.startswith("--threads") for argument in argv):
        more += ["--threads", str(options.threads)]
    return shlex.join([sys.executable, sys.argv[0], *argv, *more])


def _named_rate(text: str) -> tuple[str, float]:
    """Parse NAME=RATE."""
    name, _, rate = text.partition("=")
    if name not in RECIPES or not rate:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=RATE, e.g. shampoo=6e-3")
    return name, float(rate)


def _positive(text: str) -> int:
    """Parse a whole number from 1 on."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def _configure(options: argparse.Namespace) -> None:
    """Make every run with these options give the same bits."""
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: this torch sees no CUDA device; use --device cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(options.threads)
    options.compile = options.compile == "on" or (
        options.compile == "auto" and _compile_pays(options.device, options.steps)
    )


def _compile_pays(device: torch.device, steps: int) -> bool:
    """Whether torch.compile has its compiler (Triton or C++) and enough steps to repay it."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    found = any(map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++"]))
    return found and steps >= LONG


def _session(options: argparse.Namespace, name: str, corpus: Corpus) -> Session:
    """Describe the run of one optimizer."""
    config = SIZES[options.size]
    model, _ = initial_params(config, options.seed, options.device)
    validation = validation_batches(corpus, config.context)
    given = dict(getattr(options, "learning_rate", []))
    rate = given.get(name, RECIPES[name].learning_rate)
    return Session(
        name=name,
        learning_rate=rate,
        storage=options.storage,
        task=Task(
            config=config,
            model=model,
            corpus=corpus,
            validation=[windows.to(options.device) for windows in validation],
            steps=options.steps,
            batch=options.batch,
            seed=options.seed,
            evaluate_every=options.evaluate_every,
            device=options.device,
        ),
        compiled=options.compile,
        path=options.out / f"{name}.pt",
        save_every=options.save_every,
        fingerprint={"learning_rate": rate, **_settings(options, corpus)},
    )


def _settings(options: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """List what decides the numbers, and so must be the same to resume."""
    names = ("size", "steps", "batch", "seed", "threads", "compile", "evaluate_every", "storage")
    return {
        **{name: getattr(options, name) for name in names},
        "device": str(options.device),
        "corpus": corpus.digest,
        "torch": str(torch.__version__),
        "machine": platform.machine(),
    }


def _check_folder(options: argparse.Namespace, sessions: Sequence[Session]) -> None:
    """Find the checkpoints to resume, or clear the way for a new run."""
    found = [session.path for session in sessions if session.path.exists()]
    if options.resume and not found:
        raise CheckpointError(f"nothing to resume in {options.out}")
    if not options.resume:
        for path in found:
            kept = path.replace(path.with_suffix(".old"))
            print(f"starting anew (no --resume): {path.name} is now {kept}", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)


def _sentence(row: dict[str, Any]) -> str:
    """Say in one line how the second optimizer did against the first."""
    if row["steps"] is None:
        return f"{row['optimizer']} did not reach {row['baseline']}'s final loss."
    return (
        f"{row['optimizer']} reached {row['baseline']}'s final loss in {row['steps_ratio']:.2f} of "
        f"its steps and {row['seconds_ratio']:.2f} of its seconds "
        f"({row['seconds_per_step_ratio']:.2f}x per step)."
    )


if __name__ == "__main__":
    raise SystemExit(main())
