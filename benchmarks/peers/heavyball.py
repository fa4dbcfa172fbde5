"""HeavyBall's SOAP, https://github.com/HomebrewML/HeavyBall."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import Case, Problem, optimizer_case

__all__ = ["heavyball_soap"]


def _aim(optimizer: Any, refresh: bool) -> None:
    # the probability of a refresh; they come when the sum of it passes a whole number
    optimizer.precond_schedule = 1.0 if refresh else 0.0


def heavyball_soap(problem: Problem) -> Case:
    """Time it in blocks; eager on a CPU, where its compiler buys nothing and takes minutes."""
    package: Any = importlib.import_module("heavyball")
    if next(iter(problem.params.values())).device.type == "cpu":
        package.utils.compile_mode = None

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = package.SOAP(
            params, max_precond_dim=problem.block_size, split=True, precondition_frequency=1
        )
        return optimizer

    return optimizer_case("heavyball-soap", problem, make, _aim)
