"""DASH of https://github.com/IST-DASLab/ISTA-DASLab-Optimizers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from benchmarks.problem import Case, Problem, optimizer_case

__all__ = ["dash"]

PACKAGE = "ista_daslab_optimizers"
NEVER = 10**9


@contextmanager
def _stand_ins(*names: str) -> Iterator[None]:
    """Put stand-ins where modules are missing, while something that mentions them is imported."""
    missing = [name for name in names if importlib.util.find_spec(name.split(".")[0]) is None]
    sys.modules |= {name: MagicMock() for name in missing}
    try:
        yield
    finally:
        # torch asks for Triton too, and is not to find this one
        for name in missing:
            del sys.modules[name]


def _import() -> Any:
    """Import the subpackage of DASH alone.

    The package itself imports optimizers that need CUDA extensions; the subpackage a logger of
    experiments, and kernels for a GPU. A step on a CPU uses none of them.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise ImportError(f"No module named {PACKAGE!r}")
    if PACKAGE not in sys.modules:
        bare = types.ModuleType(PACKAGE)
        bare.__path__ = list(spec.submodule_search_locations or [])
        bare.__spec__ = spec
        sys.modules[PACKAGE] = bare
    # Inductor looks for Triton while it is imported, so that has to be done before
    importlib.import_module("torch._inductor.compile_fx")
    with _stand_ins("wandb", "triton", "triton.language"):
        return importlib.import_module(f"{PACKAGE}.dash")


def _aim(optimizer: Any, refresh: bool) -> None:
    optimizer.config.inv_root_freq = 1 if refresh else NEVER


def dash(problem: Problem) -> Case:
    """Time DASH-GPU, the variant that stacks all layers, with roots by eigendecomposition."""
    package = _import()

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        config = package.DashConfig(
            beta_G=0.9,
            beta_LR=0.99,
            beta_graft=0.99,
            eps_inv_root=1e-8,
            block_size=problem.block_size,
            inv_root_freq=1,
            start_prec_step=1,
        )
        optimizer: torch.optim.Optimizer = package.DashGpu(
            params, lr=1e-3, weight_decay=0.01, config=config
        )
        return optimizer

    return optimizer_case("dash", problem, make, _aim)
