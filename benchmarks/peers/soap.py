"""SOAP's own code, https://github.com/nikhilvyas/SOAP: the file soap.py on the path."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from benchmarks.problem import Case, Problem, optimizer_case

__all__ = ["soap"]

NEVER = 10**9


def _aim(optimizer: torch.optim.Optimizer, refresh: bool) -> None:
    for state in optimizer.state.values():
        state["precondition_frequency"] = 1 if refresh else NEVER


def soap(problem: Problem) -> Case:
    """Time it with its defaults; it has no blocks, only a largest dimension of 10,000."""
    module: Any = importlib.import_module("soap")
    return optimizer_case("soap-own-code", problem, module.SOAP, _aim)
