"""What stages without a state, and stages around one other, have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from shampoo_func import tree
from shampoo_func.types import EmptyState, Transformation, Tree

__all__ = ["Stateless", "Wrapper"]


class Stateless(Transformation):
    """A stage that remembers nothing: subclasses define `transform`."""

    __slots__ = ()

    @abstractmethod
    def transform(self, updates: Tree) -> Tree:
        """Return the transformed updates."""

    def init(self, params: Tree) -> EmptyState:
        """Return the empty state."""
        tree.check_params(params)
        return EmptyState()

    def update(
        self, updates: Tree, state: Any, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, Any]:
        """Transform the updates."""
        self.check_call(params, extra)
        tree.check_updates(updates, params, what="the parameter")
        return self.transform(updates), state


class Wrapper(Transformation):
    """A stage around one other, `inner`, whose name it takes."""

    __slots__ = ()

    inner: Transformation

    @property
    def name(self) -> str:
        """The name of the stage inside."""
        return self.inner.name

    @property
    def children(self) -> tuple[Transformation, ...]:
        """The stage inside."""
        return (self.inner,)
