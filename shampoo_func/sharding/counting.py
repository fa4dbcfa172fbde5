"""Counting what a step sends."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CountCollectives"]


class CountCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts functional collectives while it is entered, in eager code.

    calls: how many. sent: the elements that this rank sends to others. bytes: their bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0
        self.sent = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a call, and make it."""
        name = func.name()
        if name.startswith("_c10d_functional::") and "wait" not in name:
            count, world = args[0].numel(), dist.get_world_size()
            sent = 0
            if "all_to_all" in name:
                sent = count - args[2][dist.get_rank()]
            elif "all_gather" in name:
                sent = count * (world - 1)
            elif "reduce_scatter" in name:
                sent = count // world * (world - 1)
            self.calls += 1
            self.sent += sent
            self.bytes += sent * args[0].element_size()
        return func(*args, **(kwargs or {}))
