"""Rebuilding a transformation with some of the stages inside exchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from shampoo_func.types import Transformation

__all__ = ["rebuilt"]


def rebuilt(tx: Transformation, change: Callable[[Transformation], Any]) -> Transformation:
    """Return a transformation with other stages inside; the same object if none is another.

    Args:
        tx: The transformation.
        change: Called with every stage, the outer ones first; what it returns takes the stage's
            place, and None means to look inside.
    """
    result: Transformation = _visited(tx, change)[0]
    return result


def _visited(value: Any, change: Callable[[Transformation], Any]) -> tuple[Any, bool]:
    """Return a field of a stage with the stages in it exchanged, and whether any is another.

    The flag spares comparing tuples by identity, which torch.compile cannot trace.
    """
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        parts = [_visited(part, change) for part in value]
        changed = any(other for _, other in parts)
        return (tuple(part for part, _ in parts), True) if changed else (value, False)
    if not isinstance(value, Transformation):
        return value, False
    chosen = change(value)
    if chosen is not None:
        return chosen, chosen is not value
    fields: dict[str, Any] = {}
    # a transformation that is no dataclass has no fields to look into
    for name in getattr(value, "__dataclass_fields__", ()):
        new, other = _visited(getattr(value, name), change)
        if other:
            fields[name] = new
    if not fields:
        return value, False
    return dataclasses.replace(value, **fields), True  # type: ignore[type-var]
