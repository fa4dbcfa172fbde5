"""The stages of one stack of blocks with refreshes that ranks share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shampoo_func.errors import ShardingError
from shampoo_func.sharding import SharedRefresh, Shares
from shampoo_func.transforms.precondition import Precondition
from shampoo_func.transforms.rebuilt import rebuilt
from shampoo_func.types import Transformation

__all__ = ["check_shareable", "with_shared_refresh"]


def with_shared_refresh(tx: Transformation, shares: Shares) -> Transformation:
    """Return a transformation whose preconditioners refresh the own rows of a stack and gather.

    Args:
        tx: What runs on the stack.
        shares: Who refreshes which rows of it.
    """

    def change(stage: Transformation) -> Any:
        if not isinstance(stage, Precondition) or not stage.preconditioner.refreshes:
            return None
        return replace(stage, preconditioner=SharedRefresh(stage.preconditioner, shares))

    return rebuilt(tx, change)


def check_shareable(tx: Transformation) -> None:
    """Check that ranks can share the refreshes of a transformation.

    Raises:
        ShardingError: If a policy chooses some of the blocks, or there is nothing to refresh.
    """
    found: list[Precondition] = []

    def look(stage: Transformation) -> Any:
        if isinstance(stage, Precondition) and stage.preconditioner.refreshes:
            found.append(stage)
        return None

    rebuilt(tx, look)
    if not found:
        raise ShardingError(
            f"refresh_sharded shares refreshes, but {tx.name} has none; use another transport."
        )
    for stage in found:
        if stage.policy.keeps_clock:
            raise ShardingError(
                f"refresh_sharded shares the refreshes of whole stacks, but the policy "
                f"{stage.policy!r} refreshes some blocks of each; use every(...), or another "
                "transport."
            )
