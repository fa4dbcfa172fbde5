"""Parameter sets to time optimizers on, and random gradients for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SETS", "random_like"]

Params = dict[str, Tensor]


def _fill(shapes: dict[str, tuple[int, ...]]) -> Params:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def gpt() -> Params:
    """Return the parameters of a 4-layer transformer of width 256: 3.41 M numbers, 13 MB.

    At block size 256 its matrices are exactly 52 blocks of 256 x 256; its 9 norm weights are
    vectors of 256.
    """
    shapes: dict[str, tuple[int, ...]] = {"embed": (512, 256)}
    for layer in range(4):
        shapes |= {
            f"{layer}.norm1": (256,),
            f"{layer}.qkv": (768, 256),
            f"{layer}.proj": (256, 256),
            f"{layer}.norm2": (256,),
            f"{layer}.fc": (1024, 256),
            f"{layer}.out": (256, 1024),
        }
    return _fill(shapes | {"norm": (256,), "head": (512, 256)})


def tiny() -> Params:
    """Return a few small parameters: enough to see that the benchmark runs, not to time."""
    return _fill({"first": (24, 16), "bias": (24,), "second": (16, 24)})


SETS: dict[str, Callable[[], Params]] = {"gpt": gpt, "tiny": tiny}


def random_like(params: Params, seed: int) -> Params:
    """Return random gradients in the shapes of the parameters."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {name: torch.randn(leaf.shape, generator=generator) for name, leaf in params.items()}
