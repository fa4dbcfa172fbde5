"""Parameter sets to time optimizers on, and random gradients for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.shapes import Shapes

__all__ = ["LARGE", "SETS", "blocks", "fill", "random_like"]

Params = dict[str, Tensor]

LARGE = 50_000_000
"""From so many numbers on, a set is timed in fewer variants, to fit time and memory."""


def fill(shapes: Shapes, device: str = "cpu") -> Params:
    """Return random parameters, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (0.02 * torch.randn(shape, generator=generator)).to(device)
        for name, shape in shapes.items()
    }


def gpt() -> Shapes:
    """Return the shapes of a 4-layer transformer of width 256: 3.41 M numbers, 13 MB.

    At block size 256 its matrices are exactly 52 blocks of 256 x 256; its 9 norm weights are
    vectors of 256.
    """
    shapes: Shapes = {"embed": (512, 256)}
    for layer in range(4):
        shapes |= {
            f"{layer}.norm1": (256,),
            f"{layer}.qkv": (768, 256),
            f"{layer}.proj": (256, 256),
            f"{layer}.norm2": (256,),
            f"{layer}.fc": (1024, 256),
            f"{layer}.out": (256, 1024),
        }
    return shapes | {"norm": (256,), "head": (512, 256)}


def resnet18() -> Shapes:
    """Return the shapes of a ResNet-18 with 100 classes: 11.2 M numbers, 43 MB."""
    shapes: Shapes = {"conv1": (64, 3, 7, 7), "bn1.weight": (64,), "bn1.bias": (64,)}
    before = 64
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            name = f"layer{stage}.{block}"
            for number, inputs in enumerate((before, width)):
                shapes[f"{name}.conv{number}"] = (width, inputs, 3, 3)
                shapes |= {f"{name}.bn{number}.{kind}": (width,) for kind in ("weight", "bias")}
            if before != width:
                shapes[f"{name}.down"] = (width, before, 1, 1)
                shapes |= {f"{name}.down.bn.{kind}": (width,) for kind in ("weight", "bias")}
            before = width
    return shapes | {"fc.weight": (100, 512), "fc.bias": (100,)}


def gpt2() -> Shapes:
    """Return the shapes of GPT-2 small with tied embeddings: 124 M numbers, 498 MB."""
    wide = 768
    shapes: Shapes = {"wte": (50257, wide), "wpe": (1024, wide)}
    for layer in range(12):
        for name, rows, columns in (
            ("qkv", 3 * wide, wide),
            ("out", wide, wide),
            ("up", 4 * wide, wide),
            ("down", wide, 4 * wide),
        ):
            shapes[f"h.{layer}.{name}.weight"] = (rows, columns)
            shapes[f"h.{layer}.{name}.bias"] = (rows,)
        for norm in ("norm1", "norm2"):
            shapes |= {f"h.{layer}.{norm}.{kind}": (wide,) for kind in ("weight", "bias")}
    return shapes | {"norm.weight": (wide,), "norm.bias": (wide,)}


def many(count: int = 2000) -> Shapes:
    """Return the shapes of 2,000 tiny parameters, as a tree of many small layers has them."""
    return {f"{n}": (16, 16) if n % 2 == 0 else (16,) for n in range(count)}


def tiny() -> Shapes:
    """Return a few small shapes: enough to see that the benchmark runs, not to time."""
    return {"first": (24, 16), "bias": (24,), "second": (16, 24)}


def blocks(count: int, size: int) -> Shapes:
    """Return the shape of one matrix that is cut into so many square blocks."""
    return {"matrix": (count * size, size)}


SETS: dict[str, Callable[[], Shapes]] = {
    "gpt": gpt,
    "resnet18": resnet18,
    "gpt2": gpt2,
    "many": many,
    "tiny": tiny,
}


def random_like(params: Params, seed: int) -> Params:
    """Return random gradients in the shapes of the parameters."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        name: torch.randn(leaf.shape, generator=generator).to(leaf.device)
        for name, leaf in params.items()
    }
