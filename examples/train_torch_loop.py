"""A plain torch loop with Shampoo: scheduler, checkpoint, resume. Runs in a few seconds.

    python examples/train_torch_loop.py                    # train, save on the way
    python examples/train_torch_loop.py --stop-after 120   # stop early; call again to resume

A small network learns the product of two numbers in [-1, 1].
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

import shampoo_func as sf


def make_model() -> nn.Module:
    """Return the network, the same one at every start."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )


def make_optimizer(model: nn.Module, compile: bool) -> torch.optim.Optimizer:
    """Return Shampoo with decay for the weights and none for the biases."""
    named = list(model.named_parameters())
    groups = [
        {"params": [(name, p) for name, p in named if p.ndim > 1], "weight_decay": 1e-3},
        {"params": [(name, p) for name, p in named if p.ndim < 2]},
    ]
    return sf.ShampooOptimizer(
        groups, lr=1e-2, beta2=0.99, block_size=64, refresh_every=5, compile=compile
    )


def make_scheduler(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """Return a warm-up over a tenth of the steps, then a cosine."""
    warm = max(steps // 10, 1)
    return SequentialLR(
        optimizer,
        [
            LinearLR(optimizer, start_factor=0.1, total_iters=warm),
            CosineAnnealingLR(optimizer, max(steps - warm, 1)),
        ],
        milestones=[warm],
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return the examples of one step, the same at every start."""
    generator = torch.Generator().manual_seed(step)
    factors = 2 * torch.rand(128, 2, generator=generator) - 1
    return factors, factors.prod(-1, keepdim=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--stop-after", type=int, help="stop after this step, saved")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/torch_loop.pt"))
    parser.add_argument("--compile", action="store_true", help="compile the update")
    return parser.parse_args()


def main() -> None:
    """Train from the checkpoint, if there is one, or from the beginning."""
    arguments = parse()
    model = make_model()
    optimizer = make_optimizer(model, arguments.compile)
    scheduler = make_scheduler(optimizer, arguments.steps)
    first = 0
    if arguments.checkpoint.exists():
        saved = torch.load(arguments.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        first = saved["step"]
        print(f"resumed after step {first}")
    last = min(arguments.steps, arguments.stop_after or arguments.steps)
    for step in range(first + 1, last + 1):
        inputs, targets = batch(step)
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.2e}  lr {scheduler.get_last_lr()[0]:.1e}")
        if step % arguments.save_every == 0 or step == last:
            arguments.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "step": step,
                },
                arguments.checkpoint,
            )
    with torch.no_grad():
        inputs, targets = batch(0)
        print(f"validation loss {(model(inputs) - targets).square().mean().item():.6e}")


if __name__ == "__main__":
    main()
