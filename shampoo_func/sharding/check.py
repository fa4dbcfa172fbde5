"""Do all ranks plan the same? One small collective, before any that could hang or abort."""

from __future__ import annotations

import torch
import torch.distributed as dist

from shampoo_func.errors import PlanMismatchError, ShampooFuncError, ShardingError
from shampoo_func.sharding import collectives
from shampoo_func.sharding.plan import ShardPlan

__all__ = ["agree", "check_plan", "check_started"]


def check_started() -> None:
    """Check that there is a process group.

    Raises:
        ShardingError: If there is none, or none any more.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ShardingError(
            "a mesh needs a process group, and there is none: call "
            "torch.distributed.init_process_group() before, and destroy it after, all that is on "
            "a mesh."
        )


def agree(
    fingerprint: int, group: str, device: torch.device, problem: ShampooFuncError | None = None
) -> None:
    """Raise on all ranks if one of them has a problem, or another fingerprint.

    Args:
        fingerprint: Of what must be the same everywhere, non-negative and below 2^62.
        group: The name of the process group; every rank of it must call.
        device: Where its collectives work.
        problem: What this rank would have raised alone, leaving the others to wait.

    Raises:
        PlanMismatchError: If the fingerprints differ or another rank has a problem.
    """
    check_started()
    mine = 0 if problem is not None else fingerprint
    seen = collectives.all_max(
        torch.tensor([mine, -mine, problem is not None], dtype=torch.int64, device=device), group
    ).tolist()
    if problem is not None:
        raise problem
    if seen[2]:
        raise PlanMismatchError(
            "another rank of the mesh cannot share the blocks; its own error says why. Nothing was "
            "sent."
        )
    if seen[0] != -seen[1]:
        raise PlanMismatchError(
            "the ranks of the mesh have planned different blocks or owners (this one has the "
            f"fingerprint {fingerprint:x}): give all of them the same block size, merging, "
            "transport, assignment and cost, and parameters of the same names, order, shapes "
            "and dtypes."
        )


def check_plan(plan: ShardPlan, group: str, *, device: torch.device | None = None) -> None:
    """Check that every rank has the same plan.

    Args:
        plan: This rank's plan.
        group: The name of the process group (`ProcessGroup.group_name`); every rank of it must
            call.
        device: Where its collectives work; the CPU if not given.

    Raises:
        PlanMismatchError: On every rank, if they differ.
    """
    agree(plan.fingerprint(), group, device or torch.device("cpu"))
