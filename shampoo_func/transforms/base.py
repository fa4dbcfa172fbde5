"""What stages without a state, stages around one other, and averages have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from shampoo_func import tree
from shampoo_func.errors import TreeMismatchError
from shampoo_func.types import EmptyState, Transformation, Tree

__all__ = ["Averaging", "Stateless", "Wrapper", "check_kept"]


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


class Averaging(Transformation):
    """A transformation that knows which parameters to evaluate with: see `eval_params`."""

    __slots__ = ()

    @abstractmethod
    def averaged(self, state: Any, params: Tree) -> Tree:
        """Return the averaged parameters; the very tensors of `params` where nothing averages.

        Args:
            state: The state of this transformation.
            params: The parameters after the update that returned it.
        """


def check_kept(params: Tree, kept: Tree) -> None:
    """Check that what a state keeps of every parameter has its shape.

    Raises:
        TreeMismatchError: If structure or a shape differs.
    """
    flat, structure = tree.flatten(params)
    partners = tree.flatten_up_to(structure, kept, params)
    for index, (param, own) in enumerate(zip(flat, partners, strict=True)):
        seen = own.shape if isinstance(own, Tensor) else None
        if seen != param.shape:
            raise TreeMismatchError(
                f"parameter {tree.path_of(params, index)!r} has shape {tuple(param.shape)}, but "
                f"the state was made for {'a tree' if seen is None else tuple(seen)}; pass the "
                "parameters that this state belongs to."
            )
