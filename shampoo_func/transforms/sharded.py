"""Putting a whole optimizer on a mesh, or taking it off."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from shampoo_func.errors import HyperparameterError
from shampoo_func.sharding import Cost, Sharding, Transport, sharding
from shampoo_func.transforms.blocked import Blocked
from shampoo_func.types import Transformation

__all__ = ["sharded", "with_sharding"]


def sharded(
    tx: Transformation,
    mesh: DeviceMesh | None,
    *,
    transport: Transport | None = None,
    assignment: str = "bucket_lpt",
    cost: Cost | None = None,
    communication_dtype: torch.dtype | None = None,
) -> Transformation:
    """Return the same optimizer with all its blocks shared by the ranks of a mesh.

    Every `blocked` stage inside becomes `blocked(..., mesh=mesh)`; the other stages keep their
    state as the parameters are stored. The numbers are those of one process.

    Args:
        tx: A recipe such as `shampoo(3e-3)`, a chain, or any transformation.
        mesh: The ranks that share the blocks; None takes the optimizer off any mesh.
        transport: See `blocked`.
        assignment: See `blocked`.
        cost: See `blocked`.
        communication_dtype: See `blocked`.

    Raises:
        HyperparameterError: If there is no `blocked` stage inside, or an argument is of the
            wrong kind.
        ShardingError: If this rank is not in the mesh.

    Example:
        >>> from shampoo_func.recipes import shampoo
        >>> sharded(shampoo(3e-3), None) == shampoo(3e-3)
        True
    """
    own = None
    if mesh is not None:
        own = sharding(
            mesh,
            transport=transport,
            assignment=assignment,
            cost=cost,
            communication_dtype=communication_dtype,
        )
    found: list[Blocked] = []

    def choose(stage: Blocked) -> Sharding | None:
        found.append(stage)
        return own

    result = with_sharding(tx, choose)
    if not found:
        raise HyperparameterError(
            f"{tx.name} has no blocked stage whose blocks could be shared; wrap a stage in "
            "blocked(...), or leave the optimizer as it is: without blocks it works on the "
            "parameters as they are stored."
        )
    return result


def with_sharding(
    tx: Transformation, choose: Callable[[Blocked], Sharding | None]
) -> Transformation:
    """Return a transformation with other shardings; the same object if none is another.

    Args:
        tx: The transformation.
        choose: What each `blocked` stage is to have.
    """
    if isinstance(tx, Blocked):
        chosen = choose(tx)
        return tx if chosen is tx.sharding else dataclasses.replace(tx, sharding=chosen)
    changed: dict[str, Any] = {}
    # a transformation that is no dataclass has no fields to look into
    for name in getattr(tx, "__dataclass_fields__", ()):
        value = getattr(tx, name)
        new = _rebuilt(value, choose)
        if new is not value:
            changed[name] = new
    return dataclasses.replace(tx, **changed) if changed else tx  # type: ignore[type-var]


def _rebuilt(value: Any, choose: Callable[[Blocked], Sharding | None]) -> Any:
    """Return a field of a stage with the stages in it rebuilt; itself if there are none."""
    if isinstance(value, Transformation):
        return with_sharding(value, choose)
    if isinstance(value, tuple):
        parts = tuple(_rebuilt(part, choose) for part in value)
        return parts if any(a is not b for a, b in zip(parts, value, strict=True)) else value
    return value
