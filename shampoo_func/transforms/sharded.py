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
from shampoo_func.transforms.rebuilt import rebuilt
from shampoo_func.types import Transformation

__all__ = ["sharded", "shardings", "with_sharding"]


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


def shardings(tx: Transformation) -> list[Sharding]:
    """Return the shardings of the `blocked` stages inside that are on a mesh."""
    found: list[Sharding] = []

    def note(stage: Blocked) -> Sharding | None:
        if stage.sharding is not None:
            found.append(stage.sharding)
        return stage.sharding

    with_sharding(tx, note)
    return found


def with_sharding(
    tx: Transformation, choose: Callable[[Blocked], Sharding | None]
) -> Transformation:
    """Return a transformation with other shardings; the same object if none is another.

    Args:
        tx: The transformation.
        choose: What each `blocked` stage is to have.
    """

    def change(stage: Transformation) -> Any:
        if not isinstance(stage, Blocked):
            return None
        chosen = choose(stage)
        return stage if chosen is stage.sharding else dataclasses.replace(stage, sharding=chosen)

    return rebuilt(tx, change)
