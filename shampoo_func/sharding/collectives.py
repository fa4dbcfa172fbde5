"""The collectives: functional, so that they trace into one graph with what is around them.

This module is the only one that calls any while stepping. Each waits for its result at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_func.errors import PeerError, ShardingError

__all__ = ["all_gather", "all_max", "all_to_all", "reduce_scatter", "register"]

_OPS = torch.ops._c10d_functional


def register() -> None:
    """Tell the compiler about the operators: done before the first, as it imports much of torch."""
    importlib.import_module("torch.distributed._functional_collectives")


def _waited(call: Callable[[], Tensor]) -> Tensor:
    """Run a collective and wait for it.

    Raises:
        PeerError: If it fails, in eager code; a compiled graph raises what the backend does.
        ShardingError: If there is no process group any more.
    """
    if torch.compiler.is_compiling():
        return _OPS.wait_tensor(call())
    try:
        return _OPS.wait_tensor(call())
    except RuntimeError as error:
        if not dist.is_initialized():
            raise ShardingError(
                "the process group of the mesh was destroyed; make a group, a mesh, and the "
                "optimizer anew. Parameters and state of the last finished step are intact."
            ) from error
        raise PeerError(
            f"a collective failed ({str(error).splitlines()[0]}): another rank has ended or hangs. "
            "Parameters and state of the last finished step are intact on this rank: save them, "
            "and start again on the ranks that are left."
        ) from error


def all_to_all(buffer: Tensor, received: Sequence[int], sent: Sequence[int], group: str) -> Tensor:
    """Send a part of a 1-D buffer to every rank and return what they send, in rank order.

    Args:
        buffer: What to send, in rank order.
        received: How many elements come from each rank.
        sent: How many go to each.
        group: The name of the process group.

    Raises:
        PeerError: If another rank does not take part.
    """
    return _waited(lambda: _OPS.all_to_all_single(buffer, list(received), list(sent), group))


def all_gather(buffer: Tensor, world: int, group: str) -> Tensor:
    """Return the 1-D buffers, all of one length, of all ranks: `[world, length]`.

    Raises:
        PeerError: If another rank does not take part.
    """
    out = _waited(lambda: _OPS.all_gather_into_tensor(buffer, world, group))
    return out.reshape(world, -1)


def reduce_scatter(buffer: Tensor, world: int, group: str) -> Tensor:
    """Return the sum over all ranks of this rank's row of `[world, length]`.

    Raises:
        PeerError: If another rank does not take part.
    """
    return _waited(lambda: _OPS.reduce_scatter_tensor(buffer.reshape(-1), "sum", world, group))


def all_max(values: Tensor, group: str) -> Tensor:
    """Return the elementwise maximum over all ranks.

    Raises:
        PeerError: If another rank does not take part.
    """
    return _waited(lambda: _OPS.all_reduce(values, "max", group))
