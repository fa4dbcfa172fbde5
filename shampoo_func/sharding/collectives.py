"""The collectives: functional, so that they trace into one graph with what is around them.

This module is the only one that calls any while stepping. Each waits for its result at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed._functional_collectives  # registers the operators
from torch import Tensor

__all__ = ["all_gather", "all_max", "all_to_all", "reduce_scatter"]

_OPS = torch.ops._c10d_functional


def all_to_all(buffer: Tensor, received: Sequence[int], sent: Sequence[int], group: str) -> Tensor:
    """Send a part of a 1-D buffer to every rank and return what they send, in rank order.

    Args:
        buffer: What to send, in rank order.
        received: How many elements come from each rank.
        sent: How many go to each.
        group: The name of the process group.
    """
    out = _OPS.all_to_all_single(buffer, list(received), list(sent), group)
    return _OPS.wait_tensor(out)


def all_gather(buffer: Tensor, world: int, group: str) -> Tensor:
    """Return the 1-D buffers, all of one length, of all ranks: `[world, length]`."""
    out = _OPS.wait_tensor(_OPS.all_gather_into_tensor(buffer, world, group))
    return out.reshape(world, -1)


def reduce_scatter(buffer: Tensor, world: int, group: str) -> Tensor:
    """Return the sum over all ranks of this rank's row of `[world, length]`."""
    out = _OPS.reduce_scatter_tensor(buffer.reshape(-1), "sum", world, group)
    return _OPS.wait_tensor(out)


def all_max(values: Tensor, group: str) -> Tensor:
    """Return the elementwise maximum over all ranks."""
    return _OPS.wait_tensor(_OPS.all_reduce(values, "max", group))
