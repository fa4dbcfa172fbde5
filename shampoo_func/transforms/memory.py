"""How many bytes a state takes, and what for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from shampoo_func import tree
from shampoo_func.transforms.blocked import Blocked
from shampoo_func.transforms.chain import Chain
from shampoo_func.transforms.momentum import Ema, Trace
from shampoo_func.transforms.partition import Masked, Partition
from shampoo_func.transforms.precondition import Precondition
from shampoo_func.types import Transformation

__all__ = ["state_bytes"]


def state_bytes(tx: Transformation, state: Any) -> dict[str, int]:
    """Return how many bytes an optimizer's state takes, by what they are for.

    The kinds are the roles that preconditioners give their leaves ("factor", "root", "basis",
    "eigenvalues", "second_moment", "momentum"; a code counts as what it is the code of),
    "momentum" also for `trace` and `ema`, and "other" for the rest. Only shapes and dtypes are
    looked at, so a state on the device "meta" will do.

    Args:
        tx: The transformation.
        state: Its state.

    Returns:
        Bytes by kind, for the kinds that there are; their sum is what the state takes.

    Example:
        >>> import torch
        >>> from shampoo_func.transforms import scale_by_shampoo
        >>> tx, params = scale_by_shampoo(block_size=256), torch.zeros(512, 256, device="meta")
        >>> bytes = state_bytes(tx, tx.init({"w": params}))
        >>> bytes["factor"] == bytes["root"] == 2 * 2 * 256 * 256 * 4
        True
    """
    total: dict[str, int] = {}
    for role, leaf in _leaves(tx, state):
        kind = role.removesuffix(" code")
        total[kind] = total.get(kind, 0) + leaf.numel() * leaf.element_size()
    return total


def _leaves(tx: Transformation, state: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a state with its role."""
    if isinstance(tx, Chain):
        for name, stage in tx.stages:
            yield from _leaves(stage, state[name])
    elif isinstance(tx, Blocked):
        for part in state.values():
            yield from _leaves(tx.inner, part)
    elif isinstance(tx, Partition):
        for label, stage in tx.transformations:
            if label in state:
                yield from _leaves(stage, state[label])
    elif isinstance(tx, Precondition):
        flat, structure = tree.flatten(state.step)
        for own in tree.flatten_up_to(structure, state.preconditioner, state.step):
            yield from zip(tree.leaves(tx.preconditioner.roles(own)), tree.leaves(own), strict=True)
        yield from _leaves(tx.filter, state.filter)
        yield from (("other", leaf) for leaf in (*flat, *tree.leaves(state.clock)))
    elif isinstance(tx, Trace | Ema):
        momentum = state.trace if isinstance(tx, Trace) else state.ema
        yield from (("momentum", leaf) for leaf in tree.leaves(momentum))
        if isinstance(tx, Ema):
            yield from (("other", leaf) for leaf in tree.leaves(state.step))
    elif isinstance(tx, Masked):
        yield from _leaves(tx.inner, state)
    elif len(tx.children) == 1 and hasattr(state, "inner"):
        yield from _leaves(tx.children[0], state.inner)
        yield from (("other", leaf) for leaf in tree.leaves(state._replace(inner=())))
    else:
        yield from (("other", leaf) for leaf in tree.leaves(state))
