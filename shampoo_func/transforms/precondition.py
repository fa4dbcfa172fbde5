"""A preconditioner as a transformation: feed it, refresh it on its clock, apply it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from shampoo_func import tree
from shampoo_func.errors import (
    HyperparameterError,
    TreeMismatchError,
    check_choice,
    check_count,
)
from shampoo_func.transforms.policies import Policy, every
from shampoo_func.transforms.scaling import Identity
from shampoo_func.types import EmptyState, Preconditioner, RefreshPolicy, Transformation, Tree

__all__ = ["Precondition", "PreconditionState", "precondition"]


class PreconditionState(NamedTuple):
    """State of `precondition`.

    step: int64 counters, one per parameter (one per block inside `blocked`). filter: the
    filter's state. preconditioner: the preconditioner's state for every parameter. clock:
    counters as `step`, the update of the latest refresh, if the policy keeps them.
    """

    step: Tree
    filter: Any
    preconditioner: Tree
    clock: Tree


@dataclass(frozen=True, slots=True)
class Precondition(Transformation):
    """See `precondition`."""

    preconditioner: Preconditioner
    filter: Transformation
    policy: Policy
    statistics: Literal["before", "after"] = "before"

    @property
    def children(self) -> tuple[Transformation, ...]:
        """The filter."""
        return (self.filter,)

    @property
    def extras(self) -> frozenset[str]:
        """`refresh`, and what the filter understands."""
        return self.filter.extras | {"refresh"}

    @property
    def refresh_policies(self) -> frozenset[RefreshPolicy]:
        """The policy of this stage, if its preconditioner has anything to refresh."""
        return frozenset({self.policy} if self.preconditioner.refreshes else ())

    def init(self, params: Tree) -> PreconditionState:
        """Return the state of filter and preconditioner; every parameter is one block."""
        return PreconditionState(
            step=tree.counters(params),
            filter=self.filter.init(params),
            preconditioner=tree.map(self.preconditioner.init, params),
            clock=tree.counters(params) if self.policy.keeps_clock else EmptyState(),
        )

    def update(
        self,
        updates: Tree,
        state: PreconditionState,
        params: Tree | None = None,
        **extra: Any,
    ) -> tuple[Tree, PreconditionState]:
        """Accumulate the raw gradient, refresh if due, and apply to the filtered gradient."""
        self.check_call(params, extra)
        refresh = extra.pop("refresh", None)
        if refresh is not None and not isinstance(refresh, bool):
            raise HyperparameterError(
                f"refresh must be None, True or False, got {refresh!r}; a tensor's value is "
                "never looked at: pass None to decide from state.step."
            )
        tree.check_updates(updates, params, what="the parameter")
        self._check_state(updates, state)
        filtered, filter_state = self.filter.update(updates, state.filter, params, **extra)
        step = tree.advance_counters(state.step, updates)
        inner, clock = state.preconditioner, state.clock
        if self.statistics == "before":
            inner, clock = self._take_in(inner, clock, updates, step, refresh)
        inner = tree.advance(self.preconditioner.correct, inner, updates)

        def apply(update: Tensor, direction: Tensor, own: Any) -> Tensor:
            return self.preconditioner.apply(own, direction).to(update.dtype)

        out = tree.map(apply, updates, filtered, inner)
        if self.statistics == "after":
            inner, clock = self._take_in(inner, clock, updates, step, refresh)
        return out, PreconditionState(step, filter_state, inner, clock)

    def _take_in(
        self, inner: Tree, clock: Tree, updates: Tree, step: Tree, refresh: bool | None
    ) -> tuple[Tree, Tree]:
        """Accumulate the gradients and refresh what is due."""
        inner = tree.advance(self.preconditioner.accumulate, inner, updates)
        never = refresh is None and math.isinf(self.policy.start)
        if refresh is False or never or not self.preconditioner.refreshes:
            return inner, clock
        flat, structure = tree.flatten(updates)
        states = tree.flatten_up_to(structure, inner, updates)
        steps = tree.flatten_up_to(structure, step, updates)
        clocks = [None] * len(flat)
        if self.policy.keeps_clock:
            clocks = tree.flatten_up_to(structure, clock, updates)
        after = [
            (own, ticks)
            if leaf is None
            else self.policy.refresh(self.preconditioner, own, ticks, count, refresh is True)
            for leaf, own, ticks, count in zip(flat, states, clocks, steps, strict=True)
        ]
        inner = tree.unflatten(structure, [own for own, _ in after])
        if self.policy.keeps_clock:
            clock = tree.unflatten(structure, [ticks for _, ticks in after])
        return inner, clock

    def _check_state(self, updates: Tree, state: PreconditionState) -> None:
        """Check that every gradient has the shape that its preconditioner was made for."""
        flat, structure = tree.flatten(updates)
        states = tree.flatten_up_to(structure, state.preconditioner, updates)
        for index, (leaf, own) in enumerate(zip(flat, states, strict=True)):
            wanted = None if leaf is None else self.preconditioner.block_shape(own)
            if wanted is None:
                continue
            fits = len(wanted) == leaf.ndim and all(
                size in (None, seen) for size, seen in zip(wanted, leaf.shape, strict=True)
            )
            if not fits:
                raise TreeMismatchError(
                    f"the gradient of {tree.path_of(updates, index)!r} has shape "
                    f"{tuple(leaf.shape)}, but the state was made for shape {wanted}; pass the "
                    "gradient of that parameter, or call init again with the new parameters."
                )


def precondition(
    preconditioner: Preconditioner,
    *,
    filter: Transformation | None = None,
    refresh_every: int = 1,
    start: float | None = None,
    policy: Policy | None = None,
    statistics: Literal["before", "after"] = "before",
) -> Precondition:
    """Make a preconditioner a transformation.

    Each update (t = 1, 2, ...) the preconditioner takes in the raw gradient; refreshes if
    (t mod refresh_every = 0 and t > start) or t = start, so with statistics that contain this
    gradient; and is applied to the gradient as the filter returns it. Before `start` a
    Kronecker preconditioner is the identity, and a graft the grafted method's own update.

    With `statistics="after"` the gradient is applied first, to what the earlier ones have made
    of the statistics, and then taken in, as SOAP's and KL-Shampoo's own code do.

    `update` takes the extra argument `refresh`: None decides from `state.step` (a branch on
    the host when eager, `torch.cond` when compiled); True or False is static, and gives a
    compiled loop exactly two graphs and no synchronisation (see `refresh_due`).

    Inside `blocked` it works on stacks of blocks; on a bare tree, every parameter is one block.

    Args:
        preconditioner: `kronecker()`, `second_moment()`, `graft(...)` ...
        filter: What is applied to the gradient on the way to the direction, usually
            `ema(beta1)`; nothing if not given.
        refresh_every: Updates between two refreshes.
        start: The first update that refreshes; `refresh_every` if not given, `math.inf` for
            never.
        policy: Another rule of when to refresh which blocks, in the place of the last two:
            `adaptive(...)`, `probabilistic(...)`, `staggered(...)`.
        statistics: Whether the statistics take in a gradient "before" or "after" it is
            preconditioned with them.

    Raises:
        HyperparameterError: If an argument is of the wrong kind or range.

    Source: arXiv 2309.06497, algorithm 1.

    Example:
        >>> import torch
        >>> from shampoo_func.preconditioners import kronecker
        >>> tx = precondition(kronecker())
        >>> state = tx.init(torch.zeros(1, 1))
        >>> tx.update(torch.full((1, 1), -4.0), state)[0]
        tensor([[-1.]])
    """
    if not isinstance(preconditioner, Preconditioner):
        raise HyperparameterError(
            f"precondition needs a preconditioner such as kronecker(), got {preconditioner!r}."
        )
    chosen = Identity() if filter is None else filter
    if not isinstance(chosen, Transformation):
        raise HyperparameterError(f"filter must be a transformation, got {chosen!r}.")
    check_choice("statistics", statistics, ("before", "after"))
    check_count("refresh_every", refresh_every)
    if policy is None:
        policy = every(refresh_every, start=start)
        if policy.start < refresh_every:
            raise HyperparameterError(
                f"start must be at least refresh_every={refresh_every} (or math.inf), got {start}; "
                "policy=every(refresh_every, start=...) begins as early as you like."
            )
    elif not isinstance(policy, Policy):
        raise HyperparameterError(
            f"policy must be a refresh policy such as staggered(10), got {policy!r}."
        )
    elif refresh_every != 1 or start is not None:
        raise HyperparameterError(
            f"policy={policy!r} is given along with refresh_every={refresh_every} or "
            f"start={start}; give the period and the start to the policy."
        )
    return Precondition(policy.prepare(preconditioner), chosen, policy, statistics)
