"""How blocks come to their owners and go back: what every transport plans, on one process too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shampoo_func.blocks import BlockPlan, ParameterPlan, gather, present_rows, scatter
from shampoo_func.sharding.cells import cells_of, lines_of
from shampoo_func.sharding.plan import ShardPlan
from shampoo_func.sharding.storage import LeafStorage

__all__ = ["Exchange", "Here", "LocalExchange", "OwnedExchange", "Request", "Rows"]

Rows = tuple[tuple[str, tuple[int, ...]], ...]
"""For some stacks, by name, some of their rows."""


@dataclass(frozen=True, slots=True)
class Here:
    """A block that this rank owns.

    place, start, shape: its place in the grid of its parameter, its first index, its shape.
    stack, row: where its state is.
    """

    place: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    stack: str
    row: int


class Exchange(ABC):
    """A frozen plan of one call: which blocks are here, and what goes where."""

    __slots__ = ()

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """How many blocks of every stack this rank owns, whether or not they have gradients."""

    @abstractmethod
    def rows(self) -> dict[str, list[int]]:
        """Which of the owned blocks have gradients, by their place among the owned."""

    @abstractmethod
    def here(self) -> list[list[Here]]:
        """Return the owned blocks of every parameter, in row-major order."""

    @abstractmethod
    def collect(self, leaves: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Return the stacks of the owned blocks that have gradients.

        Args:
            leaves: The local tensors, one per parameter, None where there is no gradient.
        """

    @abstractmethod
    def deliver(
        self, stacks: dict[str, Tensor], leaves: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Return the blocks of such stacks to where the parameters are stored.

        Args:
            stacks: New values of what `collect` returned.
            leaves: The local tensors; each result has the dtype and strides of its partner.
        """


@dataclass(frozen=True, slots=True)
class LocalExchange(Exchange):
    """Everything is here: no communication.

    plan: the blocks. present: which parameters have gradients.
    """

    plan: BlockPlan
    present: tuple[bool, ...]

    def sizes(self) -> dict[str, int]:
        """All blocks."""
        return dict(self.plan.stacks)

    def rows(self) -> dict[str, list[int]]:
        """All blocks of the parameters that are present."""
        return present_rows(self.plan, self.present)

    def here(self) -> list[list[Here]]:
        """All blocks."""
        return [blocks_of(parameter) for parameter in self.plan.parameters]

    def collect(self, leaves: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Cut the tensors into blocks."""
        return gather(self.plan, leaves)

    def deliver(
        self, stacks: dict[str, Tensor], leaves: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Lay the blocks back."""
        return scatter(self.plan, stacks, leaves)


@dataclass(frozen=True, slots=True)
class OwnedExchange(Exchange):
    """What transports that send blocks to owners have in common.

    plan: the blocks of all. group: the name of the process group. owned: the rows of this rank.
    present: which of them have gradients.
    """

    plan: BlockPlan
    group: str
    owned: Rows
    present: Rows

    def sizes(self) -> dict[str, int]:
        """How many blocks of every stack this rank owns."""
        return {name: len(rows) for name, rows in self.owned}

    def rows(self) -> dict[str, list[int]]:
        """Which of them have gradients."""
        return {name: list(rows) for name, rows in self.present}

    def here(self) -> list[list[Here]]:
        """The owned blocks, by their rows among the owned."""
        at = {(name, row): index for name, rows in self.owned for index, row in enumerate(rows)}
        return [
            [
                replace(block, row=at[block.stack, block.row])
                for block in blocks_of(parameter)
                if (block.stack, block.row) in at
            ]
            for parameter in self.plan.parameters
        ]


@dataclass(frozen=True, slots=True)
class Request:
    """What a transport plans an exchange from; the same on every rank but for `rank`.

    plan: blocks and owners. storages: of every parameter. present: which have gradients.
    dtypes: of the gradients. rank: this one's place among those that share the blocks. group:
    the name of their process group. communication_dtype: in which values are sent; None keeps
    their own.
    """

    plan: ShardPlan
    storages: tuple[LeafStorage, ...]
    present: tuple[bool, ...]
    dtypes: tuple[torch.dtype, ...]
    rank: int
    group: str
    communication_dtype: torch.dtype | None = None
    block_size: int | None = None

    def channel(self, leaf: int) -> torch.dtype:
        """Return the dtype in which a parameter's blocks are sent: one buffer for each."""
        return self.communication_dtype or self.dtypes[leaf]

    def owned(self) -> Rows:
        """Return the rows of every stack that this rank owns."""
        return tuple((name, tuple(rows)) for name, rows in self.plan.rows(self.rank).items())

    def rows_of_present(self) -> Rows:
        """Return which of the owned blocks have gradients, by their place among the owned."""
        if all(self.present):
            return tuple((name, tuple(range(len(rows)))) for name, rows in self.owned())
        there = {
            name: set(rows) for name, rows in present_rows(self.plan.blocks, self.present).items()
        }
        found = (
            (name, tuple(at for at, row in enumerate(rows) if row in there[name]))
            for name, rows in self.owned()
        )
        return tuple((name, rows) for name, rows in found if rows)


def blocks_of(parameter: ParameterPlan) -> list[Here]:
    """Return all blocks of a parameter with their rows in the plan."""
    lines = lines_of(parameter)
    return [
        Here(
            cell.place,
            tuple(line[at][0] for line, at in zip(lines, cell.place, strict=True)),
            cell.shape,
            cell.stack,
            cell.row,
        )
        for cell in cells_of(parameter).values()
    ]
