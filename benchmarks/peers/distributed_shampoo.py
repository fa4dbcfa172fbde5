"""Distributed Shampoo, https://github.com/facebookresearch/optimizers."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import Case, Problem, optimizer_case

__all__ = ["distributed_shampoo", "unpacked_distributed_shampoo"]

NEVER = 10**9


def _aim(optimizer: torch.optim.Optimizer, refresh: bool) -> None:
    for group in optimizer.param_groups:
        group["precondition_frequency"] = 1 if refresh else NEVER


def _case(name: str, problem: Problem, *, packed: bool) -> Case:
    package: Any = importlib.import_module("distributed_shampoo")
    logging.getLogger("distributed_shampoo").setLevel(logging.ERROR)

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        config = package.RootInvShampooPreconditionerConfig(use_symmetric_packing=packed)
        optimizer: torch.optim.Optimizer = package.DistributedShampoo(
            params,
            lr=1e-3,
            betas=(0.9, 0.99),
            epsilon=1e-8,
            weight_decay=0.01,
            max_preconditioner_dim=problem.block_size,
            precondition_frequency=1,
            start_preconditioning_step=1,
            grafting_config=package.AdamPreconditionerConfig(beta2=0.99, epsilon=1e-8),
            preconditioner_config=config,
        )
        return optimizer

    return optimizer_case(name, problem, make, _aim)


def distributed_shampoo(problem: Problem) -> Case:
    """Time it as it comes: factors and roots packed as triangles, roots by eigh."""
    return _case("distributed-shampoo", problem, packed=True)


def unpacked_distributed_shampoo(problem: Problem) -> Case:
    """Time it without packing."""
    return _case("distributed-shampoo-unpacked", problem, packed=False)
