"""Raising, on the host, when roots cannot be computed for too long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shampoo_func import tree
from shampoo_func.errors import RootFailureError, check_count
from shampoo_func.transforms.inspect import BlockView, parameter_state
from shampoo_func.transforms.sharded import shardings
from shampoo_func.types import Transformation, Tree

__all__ = ["check_failures"]


def check_failures(tx: Transformation, state: Any, params: Tree, *, limit: int = 3) -> None:
    """Raise if a block's root or basis could not be computed in too many refreshes in a row.

    A failed refresh keeps what the block had, and is counted in the state; training goes on.
    Call this where a synchronisation with the device does no harm: after a refresh, or once in
    a while. It reads one number, and looks for the parameter only if that is too large.

    On a mesh every rank must call it: if a block fails, all of them raise, so that none waits for
    another; the block's owner names it.

    Args:
        tx: The transformation.
        state: Its state.
        params: The parameters it was made for.
        limit: Failures in a row that are still tolerated, at least 0.

    Raises:
        RootFailureError: If there are more; the message names the parameter and the block.

    Example:
        >>> from shampoo_func.transforms import scale_by_shampoo
        >>> tx, params = scale_by_shampoo(refresh_every=1), {"w": torch.ones(4, 2)}
        >>> _, state = tx.update({"w": torch.full((4, 2), torch.nan)}, tx.init(params), params)
        >>> check_failures(tx, state, params, limit=1)
        >>> try:
        ...     check_failures(tx, state, params, limit=0)
        ... except RootFailureError as error:
        ...     print(str(error).partition(" could")[0])
        the roots of parameter 'w', block of shape (8,) from (0,)
    """
    check_count("limit", limit, low=0)
    counts = [count for count in _counts(state) if count.numel() > 0]
    worst = 0
    if counts:
        device = counts[0].device
        worst = int(torch.stack([count.max().to(device) for count in counts]).max())
    everywhere = worst
    for shared in dict.fromkeys(shardings(tx)):
        everywhere = max(everywhere, shared.largest(worst))
    if everywhere <= limit:
        return
    for path in tree.paths(params):
        for place, count in _failing(parameter_state(tx, state, params, path), "", limit):
            raise RootFailureError(
                f"the roots of parameter {path!r}{place} could not be computed in the latest "
                f"{count} refreshes (tolerated: {limit}); the ones before are kept. Look for NaN "
                "or infinite gradients (apply_if_finite skips them), use a larger epsilon or a "
                "relative one, or another root solver."
            )
    if worst <= limit:
        raise RootFailureError(
            "the roots of a block of another rank could not be computed in the latest "
            f"{everywhere} refreshes (tolerated: {limit}); its owner names the parameter."
        )


def _counts(node: Any) -> Iterator[Tensor]:
    """Yield every count of failures in a row."""
    if isinstance(node, Tensor):
        return
    if hasattr(node, "_fields"):
        for field, child in zip(node._fields, node, strict=True):
            if field == "failures_in_a_row":
                yield child
            else:
                yield from _counts(child)
        return
    for child in node.values() if isinstance(node, dict) else node or ():
        yield from _counts(child)


def _failing(view: Any, place: str, limit: int) -> Iterator[tuple[str, int]]:
    """Yield where, and how often, a parameter's blocks fail."""
    if isinstance(view, BlockView):
        place = f", block of shape {view.shape} from {view.start}"
        yield from _failing(view.state, place, limit)
    elif isinstance(view, dict | list):
        for child in view.values() if isinstance(view, dict) else view:
            yield from _failing(child, place, limit)
    else:
        worst = max((int(count.max()) for count in _counts(view)), default=0)
        if worst > limit:
            yield place, worst
