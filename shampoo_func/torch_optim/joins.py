"""What the shell asks of the rest of the library about states that it does not know."""

from __future__ import annotations

from typing import Any

from shampoo_func import training, transforms
from shampoo_func.types import Transformation, Tree

__all__ = ["averaged_params", "check_roots"]


def averaged_params(tx: Transformation, state: Any, params: Tree) -> Tree:
    """Return the parameters to evaluate with; the very tensors given where nothing averages."""
    evaluate = getattr(transforms, "eval_params", None)
    return params if evaluate is None else evaluate(tx, state, params)


def check_roots(tx: Transformation, state: Any, params: Tree, limit: int) -> None:
    """Raise if a block's root could not be renewed more than `limit` times in a row."""
    for room in (transforms, training):
        check = getattr(room, "check_failures", None)
        if check is not None:
            check(tx, state, params, limit)
            return
