"""Transports: how gradients come to the owners of blocks, and directions go back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from shampoo_func.errors import ShardingError
from shampoo_func.sharding.all_to_all import plan_all_to_all
from shampoo_func.sharding.exchange import Exchange, Request
from shampoo_func.sharding.gathers import plan_gather
from shampoo_func.sharding.refresh import plan_refresh
from shampoo_func.sharding.shards import plan_shard_local

__all__ = [
    "AllGather",
    "AllToAll",
    "Automatic",
    "ReduceScatter",
    "RefreshSharded",
    "ShardLocal",
    "Transport",
    "all_gather",
    "all_to_all",
    "automatic",
    "reduce_scatter",
    "refresh_sharded",
    "shard_local",
]


class Transport(ABC):
    """How blocks travel: a frozen value that plans an `Exchange` for what is stored where.

    Example:
        >>> isinstance(all_to_all(), Transport)
        True
    """

    __slots__ = ()

    shares_state = True
    """Whether a block's state is on its owner alone."""

    @abstractmethod
    def plan(self, request: Request) -> Exchange:
        """Plan the exchange of one call.

        Raises:
            ShardingError: If the tensors are stored in a way that this transport cannot serve.
        """


@dataclass(frozen=True, slots=True)
class AllGather(Transport):
    """See `all_gather`."""

    def plan(self, request: Request) -> Exchange:
        """Plan one gather of directions per dtype."""
        for name, storage in zip(request.plan.paths, request.storages, strict=True):
            if not storage.whole or storage.summands > 1:
                raise ShardingError(
                    f"all_gather needs tensors that every rank has whole, but {name!r} is not; "
                    "use transport=all_to_all(), or leave the choice to transport=None."
                )
        return plan_gather(request, summed=False)


@dataclass(frozen=True, slots=True)
class ReduceScatter(Transport):
    """See `reduce_scatter`."""

    def plan(self, request: Request) -> Exchange:
        """Plan one reduce-scatter of gradients and one gather of directions per dtype."""
        if all(own.whole and own.summands == 1 for own in request.storages):
            return plan_gather(request, summed=False)  # parameters: nothing to add
        bad = [
            name
            for name, storage, here in zip(
                request.plan.paths, request.storages, request.present, strict=True
            )
            if here and not _is_sum(storage.summands, storage.parts, storage.whole)
        ]
        averages = {
            storage.average
            for storage, here in zip(request.storages, request.present, strict=True)
            if here
        }
        if bad or len(averages) > 1:
            raise ShardingError(
                "reduce_scatter needs gradients of which every rank has one summand (placements "
                f"[Partial()] on the whole mesh, one operation), but {(bad or ['the tree'])[0]!r} "
                "is stored otherwise; use transport=all_to_all(), or leave the choice to None."
            )
        return plan_gather(request, summed=True)


@dataclass(frozen=True, slots=True)
class AllToAll(Transport):
    """See `all_to_all`."""

    def plan(self, request: Request) -> Exchange:
        """Plan one all-to-all each way per dtype."""
        return plan_all_to_all(request)


@dataclass(frozen=True, slots=True)
class ShardLocal(Transport):
    """See `shard_local`."""

    exact: bool = True

    def plan(self, request: Request) -> Exchange:
        """Plan the blocks of the local shards."""
        return plan_shard_local(request, exact=self.exact)


@dataclass(frozen=True, slots=True)
class RefreshSharded(Transport):
    """See `refresh_sharded`."""

    shares_state = False

    def plan(self, request: Request) -> Exchange:
        """Plan one gather of roots per stack and refresh."""
        return plan_refresh(request)


@dataclass(frozen=True, slots=True)
class Automatic(Transport):
    """See `automatic`."""

    def plan(self, request: Request) -> Exchange:
        """Plan with the transport that sends least."""
        present = [
            storage for storage, here in zip(request.storages, request.present, strict=True) if here
        ]
        if all(storage.whole and storage.summands == 1 for storage in present):
            return plan_gather(request, summed=False)
        sums = all(_is_sum(own.summands, own.parts, own.whole) for own in present)
        if sums and len({own.average for own in present}) == 1:
            return plan_gather(request, summed=True)
        return plan_all_to_all(request)


def _is_sum(summands: int, parts: tuple[int, ...], whole: bool) -> bool:
    """Whether every rank has exactly one whole summand."""
    return whole and summands == len(parts) and len(set(parts)) == summands


def all_gather() -> AllGather:
    """Every rank has all gradients; owners' directions are gathered (DDP).

    Nothing comes in. Out, each rank sends its directions to all: of P elements on W ranks
    P (W - 1) / W, times the imbalance, because buffers are as long as the largest.

    Source: arXiv 2309.06497, section 4.

    Example:
        >>> all_gather()
        AllGather()
    """
    return AllGather()


def reduce_scatter() -> ReduceScatter:
    """Gradients are summands (`Partial`): they are added on their way to the owners.

    In and out P (W - 1) / W per rank each: together what the all-reduce of the gradients, which
    is not needed then, would have sent.

    Example:
        >>> reduce_scatter()
        ReduceScatter()
    """
    return ReduceScatter()


def all_to_all() -> AllToAll:
    """Pieces of gradients go to the owners of their blocks, pieces of directions come back.

    Serves every storage, `Partial` sums and mixed trees too, without loss: blocks are those of
    one process. Of P elements that are sharded over W ranks each rank sends P / W (W - 1) / W
    both ways.

    Example:
        >>> all_to_all()
        AllToAll()
    """
    return AllToAll()


def shard_local(*, exact: bool = True) -> ShardLocal:
    """Blocks are cut from the local shards: no communication.

    Where every shard ends where a block does, the blocks are those of one process and so are
    the numbers. Anywhere else they are others, and depend on the number of ranks.

    Args:
        exact: Whether to refuse shards that are not aligned with blocks.

    Example:
        >>> shard_local(exact=False)
        ShardLocal(exact=False)
    """
    return ShardLocal(exact)


def refresh_sharded() -> RefreshSharded:
    """Every rank has all gradients and all state; the owners' refreshed roots are gathered.

    Nothing is sent but by an update that refreshes: each rank computes the roots of the blocks
    that it owns and sends them to all, (W - 1) / W of the bytes of all roots, the same bits for
    everyone. Every T updates that is F / T for F bytes of roots, about twice the bytes of the
    parameters, where `all_gather` sends the bytes of the parameters at each. All statistics and
    roots are on every rank, and all ranks take in all gradients.

    For policies that refresh whole stacks (`every`, `adaptive`, `probabilistic`). Gradients must
    be plain or `Replicate`, and summed.

    Source: arXiv 2002.09018 (each core computes some of the roots).

    Example:
        >>> refresh_sharded()
        RefreshSharded()
    """
    return RefreshSharded()


def automatic() -> Automatic:
    """The transport that sends least: what `transport=None` means.

    `all_gather` if every rank has all gradients, `reduce_scatter` if every rank has a summand
    of all, `all_to_all` otherwise.

    Example:
        >>> automatic()
        Automatic()
    """
    return Automatic()
