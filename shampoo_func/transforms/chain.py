"""Stages one after another, each with its state under its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shampoo_func import tree
from shampoo_func.errors import ChainError
from shampoo_func.types import Transformation, Tree

__all__ = ["Chain", "chain"]


@dataclass(frozen=True, slots=True)
class Chain(Transformation):
    """See `chain`."""

    stages: tuple[tuple[str, Transformation], ...]

    @property
    def children(self) -> tuple[Transformation, ...]:
        """The stages, without their names."""
        return tuple(stage for _, stage in self.stages)

    def init(self, params: Tree) -> dict[str, Any]:
        """Return every stage's state under its name."""
        tree.check_params(params)
        return {name: stage.init(params) for name, stage in self.stages}

    def update(
        self,
        updates: Tree,
        state: dict[str, Any],
        params: Tree | None = None,
        **extra: Any,
    ) -> tuple[Tree, dict[str, Any]]:
        """Send the updates through the stages; each gets the extra arguments it declares."""
        self.check_call(params, extra)
        tree.check_updates(updates, params, what="the parameter")
        self.check_state(state)
        after = {}
        for name, stage in self.stages:
            known = {key: value for key, value in extra.items() if key in stage.extras}
            updates, after[name] = stage.update(updates, state[name], params, **known)
        return updates, after

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that a state has this chain's stages.

        Raises:
            ChainError: If it has others.
        """
        if set(state) != {name for name, _ in self.stages}:
            raise ChainError(
                f"the state has the stages {sorted(state)}, but the chain has "
                f"{sorted(name for name, _ in self.stages)}; use the state that this chain's "
                "init returned."
            )


def chain(*stages: Transformation | tuple[str, Transformation], **named: Transformation) -> Chain:
    """Compose stages: the updates of one are the input of the next.

    The state is a dict keyed by stage name: the name given, or the name of the constructor
    (of the inner stage for a wrapper such as `blocked`).

    Args:
        *stages: Transformations, or (name, transformation) pairs.
        **named: More stages, after those, under these names.

    Raises:
        ChainError: If a name occurs twice, or something is not a transformation.

    Example:
        >>> import torch
        >>> from shampoo_func.transforms import scale_by_learning_rate, trace
        >>> tx = chain(trace(0.9), learning_rate=scale_by_learning_rate(0.1))
        >>> state = tx.init({"w": torch.ones(1)})
        >>> updates, state = tx.update({"w": torch.ones(1)}, state)
        >>> updates["w"], state["trace"].trace["w"]
        (tensor([-0.1000]), tensor([1.]))
    """
    pairs: list[tuple[str, Transformation]] = []
    for entry in (*stages, *named.items()):
        pair = entry if isinstance(entry, tuple) else (getattr(entry, "name", ""), entry)
        name, stage = pair if len(pair) == 2 else ("", None)
        if not isinstance(stage, Transformation) or not isinstance(name, str):
            raise ChainError(
                f"chain takes transformations or (name, transformation) pairs, got {entry!r}; "
                "wrap a preconditioner in precondition(...)."
            )
        if name in (taken for taken, _ in pairs):
            raise ChainError(
                f"the name {name!r} is given twice in a chain; name one of the two stages, as in "
                f"chain(..., second_{name}=...) or chain(('second_{name}', ...))."
            )
        pairs.append((name, stage))
    return Chain(tuple(pairs))
