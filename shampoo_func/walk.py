"""Walks over pytrees for torch.compile to trace.

Dynamo traces a pytree library's Python fallback at hundreds of instructions per leaf (a step
of AdamW on four parameters took 560,000); these walks take some twenty. They know the containers
that the library promises (dict, OrderedDict, defaultdict, list, tuple, NamedTuple), in the
order and with the meaning that the pytree library gives them in eager code.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from shampoo_func.types import Tree

__all__ = ["collect", "collect_paths", "collect_up_to", "rebuild"]


def collect(node: Tree, found: list[Any]) -> list[Any]:
    """Append the leaves of a tree to `found`, and return it."""
    if node is None or isinstance(node, torch.Tensor):
        found.append(node)
    elif isinstance(node, dict):
        for key in _keys(node):
            collect(node[key], found)
    elif isinstance(node, list | tuple):
        for child in node:
            collect(child, found)
    else:
        found.append(node)
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
        ValueError: If the containers differ.
    """
    if isinstance(template, dict):
        if not isinstance(node, dict) or template.keys() != node.keys():
            raise ValueError("dicts of different keys")
        for key in _keys(template):
            collect_up_to(template[key], node[key], found)
    elif isinstance(template, list | tuple):
        if type(node) is not type(template) or len(node) != len(template):
            raise ValueError("sequences of different type or length")
        for own, other in zip(template, node, strict=True):
            collect_up_to(own, other, found)
    else:
        found.append(node)
    return found


def rebuild(template: Tree, leaves: Iterator[Any]) -> Tree:
    """Return a tree of the containers of `template` with other leaves."""
    if isinstance(template, dict):
        children = {key: rebuild(template[key], leaves) for key in _keys(template)}
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
