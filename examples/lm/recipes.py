"""The optimizers to choose from, each a short sentence over the library."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import shampoo_func as sf

__all__ = ["RECIPES", "STORAGES", "Recipe", "build", "recipe_names"]

WARMUP = 0.1
"""Fraction of the steps that warm the learning rate up."""

FLOOR = 0.0
"""Fraction of the peak learning rate that the cosine ends at."""

BETA1, BETA2 = 0.9, 0.95
WEIGHT_DECAY = 0.1


STORAGES: dict[str, Any] = {
    "full": None,
    "packed": sf.symmetric_packing(),
    "8bit": {
        "factor": sf.symmetric_packing(),
        "root": sf.eight_bit(),
        "second_moment": sf.bfloat16_codec(),
    },
    "4bit": {
        "factor": sf.four_bit_eigen(),
        "root": sf.four_bit_eigen(basis="eigh"),
        "second_moment": sf.bfloat16_codec(),
    },
}
"""What Shampoo keeps its factors, roots and grafting moments in."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """An optimizer as a function of its learning rate and storage, and its best peak rate."""

    make: Callable[[Any, Any], sf.Transformation]
    learning_rate: float


def _adamw(learning_rate: Any, storage: Any) -> sf.Transformation:
    return sf.adamw(learning_rate, beta1=BETA1, beta2=BETA2, weight_decay=WEIGHT_DECAY)


def _shampoo(learning_rate: Any, storage: Any) -> sf.Transformation:
    return sf.shampoo(
        learning_rate,
        beta1=BETA1,
        beta2=BETA2,
        weight_decay=WEIGHT_DECAY,
        block_size=256,
        refresh_every=10,
        grafting="adam",
        storage=storage,
    )


def _sgd(learning_rate: Any, storage: Any) -> sf.Transformation:
    return sf.sgd(learning_rate, momentum=0.9, nesterov=True)


def _rmsprop(learning_rate: Any, storage: Any) -> sf.Transformation:
    return sf.rmsprop(learning_rate)


RECIPES = {
    "adamw": Recipe(_adamw, 6e-3),
    "shampoo": Recipe(_shampoo, 1.2e-2),
    "sgd": Recipe(_sgd, 3e-1),
    "rmsprop": Recipe(_rmsprop, 1e-3),
}


def build(name: str, learning_rate: Any, steps: int, storage: str = "full") -> sf.Transformation:
    """Return the recipe with gradient clipping and a warmed-up cosine schedule.

    Args:
        name: A key of `RECIPES`.
        learning_rate: The peak rate: a number, or a 0-d tensor in a sweep.
        steps: Length of the whole run.
        storage: A key of `STORAGES`, for Shampoo.
    """
    warmup = max(1, round(WARMUP * steps))
    schedule = sf.warmup_cosine_decay_schedule(
        init_value=learning_rate / warmup,
        peak_value=learning_rate,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=FLOOR * learning_rate,
    )
    return sf.chain(sf.clip_by_global_norm(1.0), RECIPES[name].make(schedule, STORAGES[storage]))


def recipe_names(text: str) -> list[str]:
    """Parse a comma-separated list of recipes from the command line."""
    names = text.split(",")
    for name in names:
        if name not in RECIPES:
            raise argparse.ArgumentTypeError(f"unknown {name!r}; known: {', '.join(RECIPES)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError("an optimizer is named twice")
    return names
