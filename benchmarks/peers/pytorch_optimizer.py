"""SOAP and Scalable Shampoo of https://github.com/kozistr/pytorch_optimizer."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import Case, Problem, optimizer_case

__all__ = ["pytorch_optimizer_shampoo", "pytorch_optimizer_soap"]

NEVER = 10**9


def _aim_soap(optimizer: torch.optim.Optimizer, refresh: bool) -> None:
    for state in optimizer.state.values():
        state["precondition_frequency"] = 1 if refresh else NEVER


def pytorch_optimizer_soap(problem: Problem) -> Case:
    """Time its SOAP with its defaults; it has no blocks."""
    package: Any = importlib.import_module("pytorch_optimizer")
    return optimizer_case("pytorch-optimizer-soap", problem, package.SOAP, _aim_soap)


def _aim_shampoo(optimizer: Any, refresh: bool) -> None:
    optimizer.preconditioning_compute_steps = 1 if refresh else NEVER


def pytorch_optimizer_shampoo(problem: Problem) -> Case:
    """Time its Scalable Shampoo with its defaults, in blocks, from the first step on."""
    package: Any = importlib.import_module("pytorch_optimizer")

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = package.ScalableShampoo(
            params,
            block_size=problem.block_size,
            start_preconditioning_step=1,
            preconditioning_compute_steps=1,
        )
        return optimizer

    return optimizer_case("pytorch-optimizer-shampoo", problem, make, _aim_shampoo)
