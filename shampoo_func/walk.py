"""Walks over pytrees for torch.compile to trace.

Dynamo traces a pytree library's Python fallback at hundreds of instructions per leaf (a step
of AdamW on four parameters took 560,000); these walks take some fifteen, and no call: Dynamo pays
for a call what it pays for twenty other instructions. They know the containers that the library
promises (dict, OrderedDict, defaultdict, list, tuple, NamedTuple), in the
order and with the meaning that the pytree library gives them in eager code.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from shampoo_func.types import Tree

__all__ = ["collect", "collect_paths", "collect_up_to", "rebuild"]


def collect(node: Tree, found: list[Any]) -> list[Any]:
    """Append the leaves of a tree to `found`, and return it."""
    children: Sequence[Any]
    if isinstance(node, dict):
        children = [node[key] for key in _keys(node)]
    elif isinstance(node, list | tuple):
        children = node
    else:
        found.append(node)
        return found
    for child in children:
        if child is None or isinstance(child, torch.Tensor):
            found.append(child)
        else:
            collect(child, found)
    return found


def collect_paths(node: Tree, path: tuple[Any, ...], found: list[tuple[Any, ...]]) -> None:
    """Append the path of every leaf to `found`."""
    if isinstance(node, dict):
        for key in _keys(node):
            collect_paths(node[key], (*path, key), found)
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            collect_paths(child, (*path, index), found)
    else:
        found.append(path)


def collect_up_to(template: Tree, node: Tree, found: list[Any]) -> list[Any]:
    """Append the sub-trees of `node` that stand where `template` has leaves, and return `found`.

    Raises:
        ValueError, KeyError: If the containers differ.
    """
    if isinstance(template, dict):
        if not isinstance(node, dict) or len(node) != len(template):
            raise ValueError("dicts of different keys")
        keys = _keys(template)
        pairs = zip([template[key] for key in keys], [node[key] for key in keys], strict=True)
    elif isinstance(template, list | tuple):
        if type(node) is not type(template) or len(node) != len(template):
            raise ValueError("sequences of different type or length")
        pairs = zip(template, node, strict=True)
    else:
        found.append(node)
        return found
    for own, other in pairs:
        if own is None or isinstance(own, torch.Tensor):
            found.append(other)
        else:
            collect_up_to(own, other, found)
    return found


def rebuild(template: Tree, leaves: Iterator[Any]) -> Tree:
    """Return a tree of the containers of `template` with other leaves."""
    if isinstance(template, dict):
        children = {
            key: next(leaves)
            if template[key] is None or isinstance(template[key], torch.Tensor)
            else rebuild(template[key], leaves)
            for key in _keys(template)
        }
        ordered = {key: children[key] for key in template}
        if isinstance(template, OrderedDict):
            return OrderedDict(ordered)
        if isinstance(template, defaultdict):
            return defaultdict(template.default_factory, ordered)
        return ordered
    if isinstance(template, list | tuple):
        parts = [rebuild(child, leaves) for child in template]
        if hasattr(template, "_fields"):
            return type(template)(*parts)
        return parts if isinstance(template, list) else tuple(parts)
    return next(leaves)


def _keys(node: dict[Any, Any]) -> list[Any]:
    """Return the keys in flattening order: sorted, unless the dict is an ordered one."""
    if isinstance(node, OrderedDict):
        return list(node)
    try:
        return sorted(node)
    except TypeError:  # keys of several types
        return sorted(node, key=lambda key: (_type_name(key), key))


def _type_name(key: Any) -> str:
    return f"{type(key).__module__}.{type(key).__qualname__}"
