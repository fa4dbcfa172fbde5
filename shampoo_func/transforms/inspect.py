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

__all__ = ["BlockView", "parameter_state"]


@dataclass(frozen=True, slots=True)
class BlockView:
    """One block of a parameter and its state.

    start, shape: where the block lies in the merged parameter, and its shape. state: the state
    of the stage inside `blocked`, without the block dimension (factors are `[d, d]`).
    """

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
    if isinstance(tx, Chain):
        return {name: _view(stage, state[name], params, path) for name, stage in tx.stages}
    if isinstance(tx, Blocked):
        return _block_views(tx, state, params, path)
    if isinstance(tx, Masked):
        found = _view_part(tx._partition(params), {"chosen": state}, params, path)
        return found.get("chosen", {})
    if isinstance(tx, Partition):
        return _view_part(tx, state, params, path)
    if len(tx.children) == 1 and hasattr(state, "inner"):
        cut = _cut_down(state._replace(inner=()), params, path)
        return cut._replace(inner=_view(tx.children[0], state.inner, params, path))
    return _cut_down(state, params, path)


def _view_part(tx: Partition, state: dict[str, Any], params: Tree, path: str) -> dict[str, Any]:
    """Return the view under the label of the parameter, if its state is there."""
    flat = dict(zip(tree.paths(params), tree.leaves(params), strict=True))
    label = tx.label(path, flat[path])
    group = {name: leaf for name, leaf in flat.items() if tx.label(name, leaf) == label}
    inner = dict(tx.transformations)[label]
    # inside, parameters are one dict keyed by whole paths
    return {label: _view(inner, state[label], group, path)} if label in state else {}


def _block_views(tx: Blocked, state: dict[str, Any], params: Tree, path: str) -> list[BlockView]:
    """Return the blocks of a parameter in row-major order, each with its row of the state."""
    parameter = tx.plan(params).parameters[tree.paths(params).index(path)]
    views = []
    for start, shape, stack, row in parameter.blocks():
        own = tree.map(lambda leaf, row=row: leaf[row], state[stack])
        views.append(BlockView(start, shape, own))
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
