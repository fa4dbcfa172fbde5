"""Other optimizers to compare with, one small adapter each; none of them is a dependency."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.peers.dash import dash
from benchmarks.peers.distributed_shampoo import distributed_shampoo, unpacked_distributed_shampoo
from benchmarks.peers.heavyball import heavyball_soap
from benchmarks.peers.pytorch_optimizer import pytorch_optimizer_shampoo, pytorch_optimizer_soap
from benchmarks.peers.soap import soap
from benchmarks.problem import Case, Problem

__all__ = ["PEERS", "Absent", "available"]

PEERS: dict[str, Callable[[Problem], Case]] = {
    "distributed-shampoo": distributed_shampoo,
    "distributed-shampoo-unpacked": unpacked_distributed_shampoo,
    "dash": dash,
    "soap-own-code": soap,
    "heavyball-soap": heavyball_soap,
    "pytorch-optimizer-soap": pytorch_optimizer_soap,
    "pytorch-optimizer-shampoo": pytorch_optimizer_shampoo,
}


@dataclass(frozen=True, slots=True)
class Absent:
    """A peer that cannot be run, and why. failed: it is installed and raised an error."""

    name: str
    reason: str
    failed: bool


def available(problem: Problem, names: Sequence[str] | None = None) -> Iterator[Case | Absent]:
    """Yield every peer that is installed and takes the parameters; else why it is absent.

    The first step of each is taken here, where what it raises does not stop the others.
    """
    for name in PEERS if names is None else names:
        try:
            case = PEERS[name](problem)
            for job in case.jobs:
                if job.prepare is not None:
                    job.prepare(0)
                job.run(0)
        except ImportError as error:
            yield Absent(name, f"not importable: {error}", False)
        except Exception as error:
            yield Absent(name, f"{type(error).__name__}: {error}", True)
        else:
            yield case
