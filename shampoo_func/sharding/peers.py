"""Doing something on every rank so that it succeeds on all of them, or is an error on all."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from shampoo_func.errors import CheckpointError, PeerError, ShampooFuncError

__all__ = ["Peers", "peers_of"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Peers:
    """The ranks that act together. group: their process group; None is this process alone."""

    group: Any = None

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return 1 if self.group is None else int(self.group.size())

    @property
    def rank(self) -> int:
        """Which of them this process is."""
        return 0 if self.group is None else int(self.group.rank())

    def together(self, act: Callable[[], T], what: str) -> list[T]:
        """Do something on every rank, and wait until all have done it.

        Args:
            act: What to do; its result is sent to all ranks, so it should be small.
            what: What that is, in the words of an error: "write the checkpoint".

        Returns:
            The results, in rank order.

        Raises:
            CheckpointError: On every rank, if it failed on one; a `ShampooFuncError` of this
                rank is raised as it is.
            PeerError: If another rank does not take part.
        """
        own: ShampooFuncError | None = None
        result, told = None, ""
        try:
            result = act()
        except ShampooFuncError as error:
            own, told = error, str(error)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            own = CheckpointError(f"cannot {what}: {told}")
            own.__cause__ = error
        answers = self._gathered((result, told))
        if own is not None:
            raise own
        for rank, (_, other) in enumerate(answers):
            if other:
                raise CheckpointError(f"rank {rank} could not {what}: {other}")
        return [answer for answer, _ in answers]

    def _gathered(self, answer: Any) -> list[Any]:
        if self.group is None:
            return [answer]
        import torch.distributed as dist

        answers: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(answers, answer, group=self.group)
        except RuntimeError as error:
            raise PeerError(
                f"a collective failed ({str(error).splitlines()[0]}): another rank has ended or "
                "hangs. What was being written is not a checkpoint; earlier ones are intact."
            ) from error
        return answers

    def in_background(self) -> Peers:
        """Return the same ranks, to act at the same time as these do something else.

        Every rank must call. Two threads must not share a group: ranks would pair the
        collectives of one with those of the other.
        """
        if self.group is None:
            return self
        import torch.distributed as dist

        if self.group not in _BACKGROUND:
            own = dist.new_group(
                dist.get_process_group_ranks(self.group),
                backend="gloo",
                use_local_synchronization=self.group is not dist.group.WORLD,
            )
            _BACKGROUND[self.group] = Peers(own)
        return _BACKGROUND[self.group]


_BACKGROUND: weakref.WeakKeyDictionary[Any, Peers] = weakref.WeakKeyDictionary()


def peers_of(group: Any = None, *, alone: bool = False) -> Peers:
    """Return who acts together with this process.

    Args:
        group: A `ProcessGroup`; None is all ranks, if torch.distributed is initialized.
        alone: This process acts for itself, whatever others there are.
    """
    import torch.distributed as dist

    if alone or not (dist.is_available() and dist.is_initialized()):
        return Peers()
    return Peers(dist.group.WORLD if group is None else group)
