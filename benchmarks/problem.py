"""What every optimizer is given: parameters, gradients in turn, and the block size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import Settings
from benchmarks.sets import LARGE, SETS, fill, random_like
from benchmarks.shapes import Shapes
from benchmarks.timing import Job

__all__ = ["Case", "Problem", "bytes_of", "optimizer_case"]

DIFFERENT_GRADIENTS = 4


@dataclass(frozen=True, slots=True)
class Problem:
    """A parameter set, a pool of gradients, and the block size of Shampoo.

    grads are the buffers that every optimizer reads; `refill` writes those of a step into them.
    backend: what compiles our steps; None leaves them donated and eager.
    """

    params: dict[str, Tensor]
    pool: tuple[dict[str, Tensor], ...]
    grads: dict[str, Tensor]
    block_size: int
    backend: str | None = "inductor"

    @classmethod
    def of(cls, name: str, settings: Settings) -> Problem:
        """Return the problem of the set of that name."""
        return cls.of_shapes(SETS[name](), settings.block_size, settings.device, settings.backend)

    @classmethod
    def of_shapes(
        cls, shapes: Shapes, block_size: int, device: str, backend: str | None = "inductor"
    ) -> Problem:
        """Return the problem of parameters of these shapes."""
        params = fill(shapes, device)
        large = sum(leaf.numel() for leaf in params.values()) > LARGE
        pool = tuple(
            random_like(params, seed) for seed in range(2 if large else DIFFERENT_GRADIENTS)
        )
        buffers = {name: grad.clone() for name, grad in pool[0].items()}
        return cls(params, pool, buffers, block_size, backend)

    @property
    def numbers(self) -> int:
        """How many numbers the parameters have."""
        return sum(leaf.numel() for leaf in self.params.values())

    @property
    def bytes(self) -> int:
        """What the parameters take."""
        return sum(leaf.numel() * leaf.element_size() for leaf in self.params.values())

    def refill(self, number: int) -> None:
        """Write the gradients of one step into the buffers."""
        for name, grad in self.pool[number % len(self.pool)].items():
            self.grads[name].copy_(grad)

    def copy(self) -> dict[str, Tensor]:
        """Return parameters of one's own."""
        return {name: leaf.clone() for name, leaf in self.params.items()}


@dataclass(frozen=True, slots=True)
class Case:
    """An optimizer at work: its jobs, in the order of their first calls, and what it keeps."""

    jobs: list[Job]
    state: Callable[[], Any]

    def job(self, step: str) -> Job:
        """Return the job of that kind."""
        return next(job for job in self.jobs if job.step == step)


def optimizer_case(
    name: str,
    problem: Problem,
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    aim: Callable[[torch.optim.Optimizer, bool], None] | None = None,
) -> Case:
    """Return the case of a `torch.optim.Optimizer`.

    Args:
        name: What it is called.
        problem: Whose parameters it gets, as a copy.
        make: Constructs it.
        aim: Sets its clock so that the next step refreshes, or does not; None if all its steps
            are alike.
    """
    params = {key: leaf.requires_grad_() for key, leaf in problem.copy().items()}
    optimizer = make(list(params.values()))

    def job(step: str, refresh: bool) -> Job:
        def prepare(number: int) -> None:
            problem.refill(number)
            for key, leaf in params.items():
                leaf.grad = problem.grads[key]
            if aim is not None:
                aim(optimizer, refresh)

        return Job(name, step, lambda number: optimizer.step(), prepare)

    # the refresh is the first to run, so that plain steps have roots to apply
    jobs = [job("refresh", True)] if aim is not None else []
    return Case([*jobs, job("plain", False)], lambda: optimizer)


def bytes_of(state: Any, problem: Problem) -> int:
    """Return the bytes of all tensors in a state, which may be a tree or an optimizer.

    Parameters, their gradients, and what shares memory with them are not counted.
    """
    sizes: dict[int, int] = {}
    shared = {leaf.untyped_storage().data_ptr() for leaf in problem.grads.values()}
    if isinstance(state, torch.optim.Optimizer):
        for group in state.param_groups:
            shared |= {leaf.untyped_storage().data_ptr() for leaf in group["params"]}
    for leaf in _tensors(state, set()):
        storage = leaf.untyped_storage()
        if storage.data_ptr() not in shared:
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _tensors(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Find the tensors in containers and in the attributes of objects."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    if isinstance(thing, dict):
        children = [*thing.values()]
    elif isinstance(thing, list | tuple | set | frozenset):
        children = [*thing]
    else:
        children = []
    if not isinstance(thing, type | FunctionType | ModuleType):
        children += list(getattr(thing, "__dict__", {}).values())
        if dataclasses.is_dataclass(thing):
            children += [getattr(thing, f.name, None) for f in dataclasses.fields(thing)]
    for child in children:
        yield from _tensors(child, seen)
