"""Checking, while a loop is being written, that all ranks have the same gradients missing."""

from __future__ import annotations

import zlib

from shampoo_func import tree
from shampoo_func.errors import PlanMismatchError
from shampoo_func.transforms.sharded import shardings
from shampoo_func.types import Transformation, Tree

__all__ = ["check_masks"]


def check_masks(tx: Transformation, grads: Tree) -> None:
    """Check, together with all ranks, that the same gradients are None on each of them.

    `update` on a mesh relies on it: ranks that differ would send buffers of different sizes, at
    which a backend hangs or aborts. This sends two numbers, so call it while a loop is new, or at
    each step of a model whose layers are skipped at random; not inside of a compiled step.

    Args:
        tx: The transformation; one that is on no mesh is never wrong.
        grads: The gradients that `update` is to get.

    Raises:
        PlanMismatchError: On every rank, if they differ.

    Example:
        >>> from shampoo_func.recipes import shampoo
        >>> check_masks(shampoo(0.1), {"w": None})
    """
    missing = [
        path
        for path, leaf in zip(tree.paths(grads), tree.leaves(grads), strict=True)
        if leaf is None
    ]
    mask = zlib.crc32(repr(missing).encode())
    for shared in dict.fromkeys(shardings(tx)):
        if shared.largest(mask) != -shared.largest(-mask):
            listed = ", ".join(map(repr, missing[:5])) or "none"
            raise PlanMismatchError(
                f"the ranks of the mesh have different gradients missing (None); this one {listed}"
                f"{' and more' if len(missing) > 5 else ''}. Give zeros where another rank has a "
                "gradient, or the same None everywhere."
            )
