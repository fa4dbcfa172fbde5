"""Staggered refresh: a share of every stack at each update, so that no update is a spike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo_func import tree
from shampoo_func.errors import check_count
from shampoo_func.transforms.control import when
from shampoo_func.transforms.policies import Policy, checked_start
from shampoo_func.types import Preconditioner

__all__ = ["Staggered", "staggered"]


@dataclass(frozen=True, slots=True)
class Staggered(Policy):
    """See `staggered`."""

    period: int
    start: float = 1
    calls: int = 1

    keeps_clock = True

    def due_at(self, step: Any) -> Any:
        """Whether t >= start: from then on, every update refreshes its share."""
        return step >= self.start

    def refresh(
        self,
        preconditioner: Preconditioner,
        state: Any,
        clock: Tensor | None,
        step: Tensor,
        static: bool,
    ) -> tuple[Any, Tensor | None]:
        """Refresh the blocks that have waited longest, one `period`-th of them."""
        if clock is None or math.isinf(self.start):
            return state, clock
        if step.ndim == 0:
            whole = tree.map(lambda leaf: leaf.unsqueeze(0), state)
            after, ticked = self._share(
                preconditioner, whole, clock.unsqueeze(0), step.unsqueeze(0), static
            )
            return tree.map(lambda leaf: leaf.squeeze(0), after), ticked.squeeze(0)
        return self._share(preconditioner, state, clock, step, static)

    def _share(
        self, preconditioner: Preconditioner, state: Any, clock: Tensor, step: Tensor, static: bool
    ) -> tuple[Any, Tensor]:
        late = step - self._next(clock)
        share = -(-step.shape[0] // self.period)
        rows = late.sort(descending=True, stable=True).indices[:share]
        due = late[rows] >= 0

        def refresh(operand: Any) -> Any:
            own, clock, rows, due = operand
            part = tree.map(lambda leaf: leaf[rows], own)
            new = tree.select(due, preconditioner.refresh(part), part)
            ticked = torch.where(due, step[rows], clock[rows])
            put = tree.map(lambda *leaves: _put(rows, *leaves), own, part, new)
            return put, clock.index_copy(0, rows, ticked), rows, due

        operand = (state, clock, rows, due)
        after = refresh(operand) if static else when(due.any(), refresh, operand)
        return after[0], after[1]

    def _next(self, clock: Tensor) -> Tensor:
        """Return the update at which every block is due; the first ones are spread out."""
        blocks = clock.shape[0]
        phase = torch.arange(blocks, device=clock.device) * self.period // blocks
        return torch.where(clock == 0, int(self.start) + phase, clock + self.period)


def _put(rows: Tensor, whole: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Return the stack with some rows replaced; itself if they are the same tensor."""
    return whole if after is before else whole.index_copy(0, rows, after)


def staggered(period: int, *, start: float = 1) -> Staggered:
    """Refresh one `period`-th of every stack at each update, so that no update is a spike.

    Block i of n is refreshed first at update start + floor(i period / n), then every `period`
    updates. If gradients are missing now and then, the blocks that have waited longest come
    first. Outside `blocked` every parameter is a stack of one block.

    A loop that passes `refresh=True` from `start` on compiles to one graph.

    Args:
        period: Updates between two refreshes of the same block.
        start: The first update that refreshes a block; `math.inf` for never.

    Raises:
        HyperparameterError: If a number is out of range.

    Example:
        >>> from shampoo_func.preconditioners import kronecker
        >>> from shampoo_func.transforms import blocked, precondition
        >>> tx = blocked(precondition(kronecker(), policy=staggered(4)), block_size=2)
        >>> params = {"w": torch.eye(8)}
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> state["2x2"].clock
        tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    """
    check_count("period", period)
    return Staggered(period, checked_start(1, start))
