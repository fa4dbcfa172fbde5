"""Finding the state of one parameter: factors, roots, grafting state, momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shampoo_func import tree
from shampoo_func.errors import TreeMismatchError
from shampoo_func.transforms.blocked import Blocked
from shampoo_func.transforms.chain import Chain
from shampoo_func.transforms.partition import Masked, Partition
from shampoo_func.types import Transformation, Tree

__all__ = ["BlockView", "SubState", "block_views", "parameter_state", "sub_states"]


@dataclass(frozen=True, slots=True)
class BlockView:
    """One block of a parameter and its state.

    place: where it is in the grid of the parameter's blocks. start, shape: where the block lies
    in the merged parameter, and its shape. state: the state of the stage inside `blocked`,
    without the block dimension (factors are `[d, d]`).
    """

    place: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    state: Any


def parameter_state(tx: Transformation, state: Any, params: Tree, path: str) -> Any:
    """Return what an optimizer's state holds for one parameter.

    Args:
        tx: The transformation.
        state: Its state.
        params: The parameters it was made for.
        path: The dotted path of a parameter, e.g. `"layers.0.weight"`.

    Returns:
        For a chain a dict by stage name; for `blocked` a list of `BlockView` in row-major
        order; for other stages their state, with the trees over parameters cut down to this
        one. A transformation that does not see the parameter is left out.

    Raises:
        TreeMismatchError: If there is no such parameter.

    Example:
        >>> import torch
        >>> from shampoo_func.transforms import chain, scale_by_shampoo, trace
        >>> tx, params = chain(scale_by_shampoo(block_size=4), trace(0.9)), {"w": torch.ones(8, 4)}
        >>> view = parameter_state(tx, tx.init(params), params, "w")
        >>> [block.start for block in view["precondition"]], view["trace"].trace.shape
        ([(0, 0), (4, 0)], torch.Size([8, 4]))
        >>> view["precondition"][0].state.preconditioner.roots[0].shape
        torch.Size([4, 4])
    """
    names = tree.paths(params)
    if path not in names:
        raise TreeMismatchError(
            f"there is no parameter {path!r}; the parameters are {', '.join(map(repr, names))}."
        )
    return _view(tx, state, params, path)


def _view(tx: Transformation, state: Any, params: Tree, path: str) -> Any:
    parts = sub_states(tx, state, params)
    if parts is not None:
        found = {
            part.name: _view(part.tx, part.state, part.params, path)
            for part in parts
            if path in tree.paths(part.params)
        }
        return found.get("", {}) if isinstance(tx, Masked) else found
    if isinstance(tx, Blocked):
        return block_views(tx, state, params, path)
    if len(tx.children) == 1 and hasattr(state, "inner"):
        cut = _cut_down(state._replace(inner=()), params, path)
        return cut._replace(inner=_view(tx.children[0], state.inner, params, path))
    return _cut_down(state, params, path)


@dataclass(frozen=True, slots=True)
class SubState:
    """A transformation inside another, its state, and the parameters that it sees.

    name: the stage's or the label; empty for what has none.
    """

    name: str
    tx: Transformation
    state: Any
    params: Tree


def sub_states(tx: Transformation, state: Any, params: Tree) -> list[SubState] | None:
    """Return what a chain, partition or mask is made of; None for anything else."""
    if isinstance(tx, Chain):
        return [SubState(name, stage, state[name], params) for name, stage in tx.stages]
    if isinstance(tx, Masked):
        partition = tx._partition(params)
        return [SubState("", tx.inner, state, partition._split(params, params)["chosen"])]
    if isinstance(tx, Partition):
        # inside, parameters are one dict keyed by whole paths
        groups = tx._split(params, params)
        return [
            SubState(name, inner, state[name], groups[name])
            for name, inner in tx.transformations
            if name in state
        ]
    return None


def block_views(
    tx: Blocked, state: Any, params: Tree, path: str, *, runs: int = 0
) -> list[BlockView]:
    """Return the blocks of a parameter in row-major order, each with its row of the state.

    On a mesh these are the blocks that this rank owns.

    Args:
        tx: The stage.
        state: Its state.
        params: The parameters of one run.
        path: The dotted path of one of them.
        runs: How many dimensions stand before the block dimension (one in a sweep).
    """
    views = []
    for block in tx.here(params)[tree.paths(params).index(path)]:
        own = tree.map(lambda leaf, row=block.row: leaf.select(runs, row), state[block.stack])
        views.append(BlockView(block.place, block.start, block.shape, own))
    return views


def _cut_down(state: Any, params: Tree, path: str) -> Any:
    """Replace every field of a state that is a tree over the parameters by one entry of it."""
    if not hasattr(state, "_fields"):
        return state
    index = tree.paths(params).index(path)
    return state._make(_entry(field, params, index) for field in state)


def _entry(field: Any, params: Tree, index: int) -> Any:
    if isinstance(field, Tensor) and not isinstance(params, Tensor):
        return field
    try:
        return tree.flatten_up_to(tree.flatten(params)[1], field, params)[index]
    except TreeMismatchError:
        return _cut_down(field, params, tree.paths(params)[index])
