"""A pool of gloo processes that lives for the whole test session, so that a task costs little."""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 30.0
"""Seconds that a collective may take before the group gives up."""


@dataclass(frozen=True)
class Failure:
    """How a task failed on one rank; `kind` is empty if the process ended or gave no answer."""

    kind: str
    message: str
    trace: str = ""


def serve(rank: int, world: int, store: str, pipe: Connection, patience: float) -> None:
    """Answer tasks, functions of `(rank, world, *args)`, until there are no more."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=patience),
        )
        while (task := pipe.recv()) is not None:
            function, args = task
            try:
                answer = function(rank, world, *args)
            except BaseException as error:
                answer = Failure(type(error).__name__, str(error), traceback.format_exc())
            pipe.send(answer)
        dist.destroy_process_group()
    except EOFError:  # the session has ended
        pass
    finally:
        os._exit(0)  # gloo's threads may abort a process that ends in the ordinary way


class Pool:
    """`world` processes in one group, started when first needed and after a failure anew."""

    def __init__(self, world: int, patience: float = PATIENCE) -> None:
        self.world = world
        self.patience = patience
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        atexit.register(self.close)

    def run(self, function: Callable[..., Any], *args: object, seconds: float = 120.0) -> list[Any]:
        """Return what the function returns on every rank; raise if it fails on one."""
        answers = self.outcomes(function, *args, seconds=seconds)
        failed = {rank: own for rank, own in enumerate(answers) if isinstance(own, Failure)}
        if failed:
            told = "\n".join(
                f"rank {rank}: {own.kind}: {own.message}\n{own.trace}"
                for rank, own in failed.items()
            )
            raise AssertionError(f"{len(failed)} of {self.world} ranks failed\n{told}")
        return answers

    def outcomes(
        self, function: Callable[..., Any], *args: object, seconds: float = 120.0
    ) -> list[Any]:
        """Return every rank's result or `Failure`; a rank that gives no answer is killed."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers: dict[int, Any] = {}
        while len(answers) < self.world:
            open_pipes = [own for rank, own in enumerate(self._pipes) if rank not in answers]
            ready: list[Any] = wait(open_pipes, timeout=seconds)
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    answers[rank] = self._pipes[rank].recv()
                except EOFError:
                    answers[rank] = Failure("", "the process ended")
        for rank in range(self.world):
            answers.setdefault(rank, Failure("", f"no answer within {seconds} s"))
        if any(isinstance(own, Failure) and not own.kind for own in answers.values()):
            self.close()
        return [answers[rank] for rank in range(self.world)]

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["shampoo_func.torch_optim"])
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.world):
            own, theirs = context.Pipe()
            process = context.Process(
                target=serve,
                args=(rank, self.world, str(store), theirs, self.patience),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(own)

    def close(self) -> None:
        """End the processes, by force if they do not."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            try:
                pipe.send(None)
            except OSError:
                process.kill()
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()
        self._pipes, self._processes = [], []


_POOLS: dict[int, Pool] = {}


def pool(world: int) -> Pool:
    """Return the session's pool of so many processes."""
    return _POOLS.setdefault(world, Pool(world))
