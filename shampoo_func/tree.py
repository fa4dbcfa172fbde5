"""Pytrees of tensors: the only module that imports a pytree library.

A leaf of an update tree may be None, which means "no gradient this step". Every function here
treats None as a leaf and, unless it says otherwise, passes it through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import optree
import torch

from shampoo_func import walk
from shampoo_func.errors import GradientError, ParameterError, ShampooFuncError, TreeMismatchError
from shampoo_func.types import Tree

__all__ = [
    "advance",
    "advance_counters",
    "check_params",
    "check_updates",
    "counters",
    "filled",
    "flatten",
    "leaves",
    "map",
    "map_params",
    "materialized",
    "paths",
    "select",
    "unflatten",
    "zeros_like",
]

Structure = Any
"""An optree treespec; while torch.compile traces, a tree that has the structure."""


def flatten(tree: Tree) -> tuple[list[Any], Structure]:
    """Return the leaves of `tree`, None among them, and its structure."""
    if torch.compiler.is_compiling():
        return walk.collect(tree, []), tree
    flat, structure = optree.tree_flatten(tree, none_is_leaf=True)
    return flat, structure


def unflatten(structure: Structure, flat: list[Any]) -> Tree:
    """Rebuild the tree of the given structure from its leaves."""
    if torch.compiler.is_compiling():
        return walk.rebuild(structure, iter(flat))
    return optree.tree_unflatten(structure, flat)


def leaves(tree: Tree) -> list[Any]:
    """Return the leaves of `tree`, None among them."""
    return flatten(tree)[0]


def paths(tree: Tree) -> list[str]:
    """Return the dotted path of every leaf, in the order of `leaves`.

    Example:
        >>> paths({"layer": {"weight": torch.ones(2), "bias": None}})
        ['layer.bias', 'layer.weight']
    """
    found: list[tuple[Any, ...]] = []
    if torch.compiler.is_compiling():
        walk.collect_paths(tree, (), found)
    else:
        found = optree.tree_flatten_with_path(tree, none_is_leaf=True)[0]
    return [".".join(str(key) for key in path) for path in found]


def path_of(tree: Tree, index: int) -> str:
    """Return the path of leaf number `index`; a bare tensor is called `<tensor>`."""
    return paths(tree)[index] or "<tensor>"


def flatten_up_to(structure: Structure, tree: Tree, reference: Tree) -> list[Any]:
    """Return the sub-trees of `tree` that stand where `reference` has its leaves.

    Raises:
        TreeMismatchError: If `tree` lacks a place that `reference` has, or has another.
    """
    try:
        if torch.compiler.is_compiling():
            return walk.collect_up_to(structure, tree, [])
        subtrees = structure.flatten_up_to(tree)
    except (ValueError, TypeError, KeyError) as error:
        raise _mismatch(tree, reference) from error
    return list(subtrees)


def map(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply `function` to every leaf of `tree` and its partners in `rest`; None stays None."""
    flat, structure = flatten(tree)
    partners = [flatten_up_to(structure, other, tree) for other in rest]
    return unflatten(
        structure,
        [
            None if leaf is None else function(leaf, *others)
            for leaf, *others in zip(flat, *partners, strict=True)
        ],
    )


def advance(function: Callable[..., Any], state: Tree, updates: Tree, *rest: Tree) -> Tree:
    """Return `function(state, update, ...)` at every leaf of `updates`; None keeps the old state.

    `state` may hold a whole sub-tree where `updates` has one leaf.
    """
    flat, structure = flatten(updates)
    partners = [flatten_up_to(structure, other, updates) for other in (state, *rest)]
    return unflatten(
        structure,
        [
            old if leaf is None else function(old, leaf, *others)
            for leaf, old, *others in zip(flat, *partners, strict=True)
        ],
    )


def map_params(function: Callable[[torch.Tensor], Any], params: Tree) -> Tree:
    """Apply `function` to every parameter, after checking them all."""
    check_params(params)
    return map(function, params)


def materialized(state: Tree) -> Tree:
    """Give every leaf memory of its own: what `vmap` returns may be expanded, with stride 0."""
    return map(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), state)


def filled(present: list[bool], values: Iterable[Any]) -> list[Any]:
    """Return the values in the places that are present, and None in the others."""
    given = iter(values)
    return [next(given) if here else None for here in present]


def zeros_like(params: Tree) -> Tree:
    """Return zeros of every parameter's shape, dtype, device and strides."""
    return map_params(torch.zeros_like, params)


def counters(params: Tree) -> Tree:
    """Return one 0-d int64 zero per parameter, on the parameter's device."""
    return map_params(lambda leaf: torch.zeros((), dtype=torch.int64, device=leaf.device), params)


def advance_counters(step: Tree, updates: Tree) -> Tree:
    """Add one to the counter of every parameter that has a gradient."""
    return advance(lambda count, _: count + 1, step, updates)


def select(predicate: torch.Tensor, new: Tree, old: Tree) -> Tree:
    """Choose leaf by leaf: `new` where `predicate` holds, else `old`.

    `predicate` may carry the leading (block) dimensions of the leaves.
    """

    def choose(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        if after is before:
            return before
        shape = predicate.shape + (1,) * (after.ndim - predicate.ndim)
        return torch.where(predicate.reshape(shape), after, before)

    return map(choose, new, old)


def check_params(params: Tree) -> None:
    """Check that every leaf is a real, floating, strided tensor.

    Raises:
        ParameterError: For the first leaf that is not; the message has its path.
    """
    flat = leaves(params)
    usable = [_is_usable(leaf) for leaf in flat]
    if False in usable:
        index = usable.index(False)
        raise ParameterError(
            f"parameter {path_of(params, index)!r} is {_described(flat[index])}; parameters must "
            "be real floating-point strided tensors. Leave it out of the tree that is optimized."
        )


def check_updates(updates: Tree, like: Tree | None = None, *, what: str = "the state") -> None:
    """Check gradients: real floating strided tensors or None, shaped as `like`.

    Args:
        updates: The tree of gradients or updates.
        like: A tree of tensors of the same structure and shapes (parameters or momenta).
        what: What `like` is, for the message.

    Raises:
        GradientError: For the first leaf that is no usable tensor.
        TreeMismatchError: If structure or a shape differs from `like`.
    """
    flat, structure = flatten(updates)
    usable = [leaf is None or _is_usable(leaf) for leaf in flat]
    if False in usable:
        index = usable.index(False)
        raise GradientError(
            f"the gradient of {path_of(updates, index)!r} is {_described(flat[index])}; gradients "
            "must be real floating-point strided tensors (or None). Convert it, e.g. with "
            ".to_dense() or torch.view_as_real, before the update."
        )
    if like is None:
        return
    partners = flatten_up_to(structure, like, updates)
    if False in [isinstance(partner, torch.Tensor) for partner in partners]:
        raise _mismatch(like, updates)
    fits = [
        leaf is None or leaf.shape == partner.shape
        for leaf, partner in zip(flat, partners, strict=True)
    ]
    if False in fits:
        index = fits.index(False)
        leaf, partner = flat[index], partners[index]
        raise TreeMismatchError(
            f"the gradient of {path_of(updates, index)!r} has shape {tuple(leaf.shape)}, but "
            f"{what} was made for shape {tuple(partner.shape)}; pass the gradient of that "
            "parameter, or call init again with the new parameters."
        )


def _is_usable(leaf: Any) -> bool:
    """Whether a leaf can be optimized."""
    return (
        isinstance(leaf, torch.Tensor)
        and leaf.is_floating_point()  # so not complex either
        and leaf.layout == torch.strided
    )


def _described(leaf: Any) -> str:
    """Say what is wrong with a leaf that cannot be optimized."""
    if leaf is None:
        return "None"
    if not isinstance(leaf, torch.Tensor):
        return f"no tensor but {type(leaf).__name__}"
    if leaf.layout != torch.strided:
        return f"a sparse tensor ({leaf.layout})"
    return f"{'complex' if leaf.is_complex() else 'not floating-point'} ({leaf.dtype})"


def _mismatch(tree: Tree, reference: Tree) -> ShampooFuncError:
    """Describe how two trees differ, by path."""
    have, want = set(paths(tree)), set(paths(reference))
    only_here, only_there = sorted(want - have)[:3], sorted(have - want)[:3]
    parts = []
    if only_here:
        parts.append(f"{', '.join(map_repr(only_here))} only in the updates")
    if only_there:
        parts.append(f"{', '.join(map_repr(only_there))} only in the other tree")
    detail = "; ".join(parts) or "the containers differ in kind"
    return TreeMismatchError(
        f"the tree of updates does not match the tree it is used with: {detail}. Pass trees of "
        "one structure, and call init again if the parameters have changed."
    )


def map_repr(names: list[str]) -> list[str]:
    """Quote names for a message."""
    return [repr(name) for name in names]
