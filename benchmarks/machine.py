"""What the numbers were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from typing import Any

import torch

import shampoo_func as sf

__all__ = ["describe", "slug"]

PEER_PACKAGES = ("heavyball", "ista-daslab-optimizers", "pytorch-optimizer", "torch-shampoo")


def _cpu() -> str:
    """Return how many cores of which kind this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{count}-core {platform.machine().replace('_', '-')} CPU"


def describe(device: str) -> dict[str, Any]:
    """Return the kind of machine, the date, and the versions of what was run."""
    versions = {
        "shampoo_func": sf.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for package in PEER_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "device": device,
        "system": platform.system(),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "versions": versions,
    }


def slug(machine: str) -> str:
    """Return a file name for a kind of machine.

    Example:
        >>> slug("2-core x86-64 CPU")
        '2-core-x86-64-cpu'
    """
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
