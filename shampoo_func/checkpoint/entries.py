"""The leaves of a state under names that say the parameter, the block and the role.

A name is the way to the leaf through the state, with two changes: a tree over the parameters is
one step, the parameter's dotted path; and a stack of blocks is two, the path and the block's
place in the parameter (`b0_1` is the second block of the first row). So it does not depend on
how parameters are nested or which of them share a stack.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shampoo_func import tree
from shampoo_func.errors import CheckpointError, TreeMismatchError
from shampoo_func.training.sweep import Sweep
from shampoo_func.transforms import Blocked, Precondition
from shampoo_func.transforms.inspect import BlockView, block_views, sub_states
from shampoo_func.types import Transformation, Tree

__all__ = ["Entry", "Walk", "named_entries"]


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a state: the names before the parameter, its path if any, the names after it.

    runs: how many dimensions of its leaves count the runs of a sweep. blocked: whether the first
    of the names after the parameter is that of a block.
    """

    before: tuple[str, ...] = ()
    path: str | None = None
    after: tuple[str, ...] = ()
    runs: int = 0
    blocked: bool = False

    def at(self, name: str) -> Place:
        """Go one step down; an empty name is none."""
        if not name:
            return self
        if self.path is None:
            return replace(self, before=(*self.before, name))
        return replace(self, after=(*self.after, name))

    def of(self, path: str) -> Place:
        """Go to what belongs to one parameter."""
        return self if self.path is not None else replace(self, path=path)


@dataclass(frozen=True, slots=True)
class Entry:
    """One leaf of a state, or one block's row of it: a view, so that it can be written.

    place: where it is. role: what it is, see `Preconditioner.roles`.
    """

    place: Place
    role: str
    tensor: Tensor

    @property
    def key(self) -> str:
        """The whole name, `state/trace/trace/layers.0.weight`."""
        own = (self.place.path,) if self.place.path else ()
        return "/".join(("state", *self.place.before, *own, *self.place.after))

    @property
    def local(self) -> str:
        """The name without the parameter's path, `trace/trace`."""
        return "/".join((*self.place.before, *self.place.after))

    @property
    def kind(self) -> str:
        """The name without parameter and block: `precondition/preconditioner/roots/0`."""
        after = self.place.after[1:] if self.place.blocked else self.place.after
        return "/".join((*self.place.before, *after))


class Walk:
    """A walk through a state along its transformation.

    entries: the leaves. blockings: block size and merging by the place of each `blocked` stage.
    """

    def __init__(self, tx: Transformation, state: Any, params: Tree) -> None:
        """Walk through the whole state."""
        self.entries: list[Entry] = []
        self.blockings: dict[str, dict[str, int | bool | None]] = {}
        self._visit(tx, state, params, Place())

    def _visit(self, tx: Transformation, state: Any, params: Tree, place: Place) -> None:
        parts = sub_states(tx, state, params)
        if parts is not None:
            for part in parts:
                self._visit(part.tx, part.state, part.params, place.at(part.name))
        elif isinstance(tx, Blocked):
            self._visit_blocks(tx, state, params, place)
        elif isinstance(tx, Sweep):
            one = tree.map(lambda leaf: leaf[0], params)
            self._visit(tx.children[0], state, one, replace(place, runs=place.runs + 1))
        elif isinstance(tx, Precondition):
            rest = self._visit_field("filter", tx.filter, state, params, place)
            for path, own in _by_parameter(rest.pop("preconditioner"), params):
                inside = place.at("preconditioner").of(path)
                self._add(own, tx.preconditioner.roles(own), inside)
            self._add_tree(rest, params, place)
        elif len(tx.children) == 1 and hasattr(state, "inner"):
            rest = self._visit_field("inner", tx.children[0], state, params, place)
            self._add_tree(rest, params, place)
        else:
            self._add_tree(state, params, place)

    def _visit_field(
        self, field: str, tx: Transformation, state: Any, params: Tree, place: Place
    ) -> dict[str, Any]:
        """Visit the transformation whose state is in one field, and return the other fields."""
        rest = state._asdict()
        self._visit(tx, rest.pop(field), params, place.at(field))
        return dict(rest)

    def _visit_blocks(self, tx: Blocked, state: Any, params: Tree, place: Place) -> None:
        """Visit every block's row of the state as the state of one tensor."""
        self.blockings["/".join(place.before)] = {
            "block_size": tx.block_size,
            "merge_dims": tx.merge_dims,
            "merge_to": tx.merge_to,
        }
        for path in tree.paths(params):
            views = block_views(tx, state, params, path, runs=place.runs)
            for name, view in zip(_block_names(views), views, strict=True):
                block = torch.empty(view.shape, device="meta")  # its shape is all that counts
                inside = replace(place.of(path).at(name), blocked=True)
                self._visit(tx.inner, view.state, block, inside)

    def _add_tree(self, node: Any, params: Tree, place: Place) -> None:
        """Add the leaves of a node that may be, or hold, a tree over the parameters."""
        if isinstance(node, Tensor):
            self._add(node, "other", place)
        elif _is_over(node, params):
            for path, own in _by_parameter(node, params):
                self._add(own, None, place.of(path))
        else:
            for name, child in _children(node, place):
                self._add_tree(child, params, place.at(name))

    def _add(self, node: Any, roles: Any, place: Place) -> None:
        """Add the leaves of a node with their roles, "other" where there are none."""
        if isinstance(node, Tensor):
            self.entries.append(Entry(place, roles or "other", node))
            return
        own_roles = dict(_children(roles, place)) if roles else {}
        for name, child in _children(node, place):
            self._add(child, own_roles.get(name), place.at(name))


def named_entries(tx: Transformation, state: Any, params: Tree) -> dict[str, Entry]:
    """Return every leaf of a state by its name.

    Args:
        tx: The transformation.
        state: Its state.
        params: The parameters it was made for.

    Raises:
        CheckpointError: If two leaves get the same name, or something is no tensor.
    """
    return by_key(Walk(tx, state, params).entries)


def by_key(entries: list[Entry]) -> dict[str, Entry]:
    """Return the entries by their names.

    Raises:
        CheckpointError: If two have the same.
    """
    found: dict[str, Entry] = {}
    for entry in entries:
        if entry.key in found:
            raise CheckpointError(
                f"two leaves of the state have the name {entry.key!r}; rename the parameter whose "
                "path contains a slash, or that has the path of another."
            )
        found[entry.key] = entry
    return found


def _by_parameter(node: Any, params: Tree) -> list[tuple[str, Any]]:
    """Return what a tree over the parameters holds for each of them, with its path."""
    structure = tree.flatten(params)[1]
    return list(zip(tree.paths(params), tree.flatten_up_to(structure, node, params), strict=True))


def _is_over(node: Any, params: Tree) -> bool:
    """Whether a node is a tree over the parameters; a bare parameter has none."""
    if isinstance(params, Tensor):
        return False
    try:
        tree.flatten_up_to(tree.flatten(params)[1], node, params)
    except TreeMismatchError:
        return False
    return True


def _children(node: Any, place: Place) -> Iterator[tuple[str, Any]]:
    """Yield the children of a node with their names.

    Raises:
        CheckpointError: If it is neither a container nor a tensor.
    """
    if hasattr(node, "_fields"):
        yield from zip(node._fields, node, strict=True)
    elif isinstance(node, dict):
        yield from ((str(key), child) for key, child in node.items())
    elif isinstance(node, list | tuple):
        yield from ((str(index), child) for index, child in enumerate(node))
    else:
        where = "/".join((*place.before, place.path or "", *place.after))
        raise CheckpointError(
            f"the state holds {node!r} of type {type(node).__name__} at {where!r}; a state is made "
            "of tensors in dicts, tuples and NamedTuples."
        )


def _block_names(views: list[BlockView]) -> list[str]:
    """Name the blocks of a parameter by their place in its grid, `b0_1`."""
    return ["b" + "_".join(map(str, view.place)) for view in views]
