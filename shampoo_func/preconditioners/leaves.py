"""Walking through the state of another preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["map_leaves"]


def map_leaves(
    function: Callable[..., Any],
    node: Any,
    *others: Any,
    leaf: type | tuple[type, ...] = Tensor,
) -> Any:
    """Apply a function to the leaves of a state and what stands beside them, in a fixed order.

    Args:
        function: Of a leaf and its partners.
        node: The state.
        *others: Trees that have something in the place of every leaf, such as roles.
        leaf: What is a leaf.
    """
    if isinstance(node, leaf):
        return function(node, *others)
    if isinstance(node, Mapping):
        return {
            key: map_leaves(function, node[key], *(o[key] for o in others), leaf=leaf)
            for key in node
        }
    parts = [
        map_leaves(function, *children, leaf=leaf) for children in zip(node, *others, strict=True)
    ]
    return type(node)(*parts) if hasattr(node, "_fields") else type(node)(parts)
