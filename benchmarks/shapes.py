"""Shapes of the parameters of known models, for planning; vectors are left out where many."""

from __future__ import annotations

__all__ = ["MODELS", "Shapes", "gpt2", "llama", "resnet50", "vit_b"]

Shapes = dict[str, tuple[int, ...]]


def gpt2() -> Shapes:
    """GPT-2 small."""
    shapes: Shapes = {"wte": (50257, 768), "wpe": (1024, 768), "norm": (768,)}
    for layer in range(12):
        shapes |= {
            f"h.{layer}.qkv": (2304, 768),
            f"h.{layer}.out": (768, 768),
            f"h.{layer}.up": (3072, 768),
            f"h.{layer}.down": (768, 3072),
        }
    return shapes


def resnet50() -> Shapes:
    """ResNet-50's convolutions and head."""
    shapes: Shapes = {"conv1": (64, 3, 7, 7), "fc": (1000, 2048)}
    wide = 64
    for stage, (width, count) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        for block in range(count):
            name = f"layer{stage}.{block}"
            shapes |= {
                f"{name}.conv1": (width, wide, 1, 1),
                f"{name}.conv2": (width, width, 3, 3),
                f"{name}.conv3": (4 * width, width, 1, 1),
            }
            if block == 0:
                shapes[f"{name}.down"] = (4 * width, wide, 1, 1)
            wide = 4 * width
    return shapes


def llama() -> Shapes:
    """A Llama of 7B parameters."""
    shapes: Shapes = {"embed": (32000, 4096), "head": (32000, 4096), "norm": (4096,)}
    for layer in range(32):
        shapes |= {f"layers.{layer}.{name}": (4096, 4096) for name in "qkvo"}
        shapes |= {f"layers.{layer}.{name}": (11008, 4096) for name in ("gate", "up")}
        shapes |= {f"layers.{layer}.down": (4096, 11008), f"layers.{layer}.norm": (4096,)}
    return shapes


def vit_b() -> Shapes:
    """ViT-B/16's matrices."""
    shapes: Shapes = {"patch": (768, 3, 16, 16), "position": (197, 768), "head": (1000, 768)}
    for layer in range(12):
        shapes |= {
            f"blocks.{layer}.qkv": (2304, 768),
            f"blocks.{layer}.proj": (768, 768),
            f"blocks.{layer}.fc1": (3072, 768),
            f"blocks.{layer}.fc2": (768, 3072),
        }
    return shapes


MODELS = {"GPT-2 small": gpt2, "ResNet-50": resnet50, "ViT-B": vit_b, "Llama 7B": llama}
