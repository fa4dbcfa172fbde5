"""What processes do in `test_checkpoint_files.py`: save, die at chosen places, resume."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sharding_cases as cases
import torch
from sharding_cases import SHAPES, STORAGES, Params
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import shampoo_func as sf
from shampoo_func import tree
from shampoo_func.errors import CheckpointError, ShampooFuncError

Tensor = torch.Tensor
FILE_CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def routed(**options: Any) -> sf.Transformation:
    """Stages that do the same arithmetic wherever an element is: they show what moves alone."""
    return sf.chain(
        sf.blocked(sf.trace(0.5), block_size=4, **options),
        ("outside", sf.trace(0.9)),
        sf.scale_by_learning_rate(0.05),
    )


MAKE = {"grafted": cases.grafted, "routed": routed}


class Run:
    """One of the training runs of `sharding_cases`, on a mesh or alone (no storage)."""

    def __init__(self, world: int, storage: str, kind: str = "grafted") -> None:
        self.mesh: DeviceMesh | None = None
        options: dict[str, Any] = {}
        if storage:
            shape, self.own, self.grad = STORAGES[storage]
            self.mesh = cases.mesh_of(shape, world)
            options["mesh"] = self.mesh
        self.tx = MAKE[kind](**options)

    def params(self, seed: int = 0) -> Params:
        """Return the parameters as they are stored."""
        whole = cases.random_tree(SHAPES, seed)
        if self.mesh is None:
            return whole
        return {key: cases.stored(leaf, self.mesh, self.own) for key, leaf in whole.items()}

    def grads(self, step: int) -> Params:
        """Return the gradients of a step, counted from 0."""
        whole = cases.random_tree(SHAPES, 1 + step)
        if self.mesh is None:
            return whole
        return {key: cases.stored(leaf, self.mesh, self.grad) for key, leaf in whole.items()}

    def train(self, params: Params, state: Any, steps: range) -> tuple[Params, Any]:
        """Return parameters and state after some steps."""
        for step in steps:
            updates, state = self.tx.update(self.grads(step), state, params)
            params = sf.apply_updates(params, updates)
        return params, state

    def start(self) -> tuple[Params, Any]:
        """Return the first parameters and state."""
        params = self.params()
        return params, self.tx.init(params)


def local(leaf: Tensor) -> Tensor:
    """Return what this rank has of a tensor."""
    return leaf.to_local() if isinstance(leaf, DTensor) else leaf


def same(one: Any, other: Any) -> bool:
    """Whether two trees have the same bits on this rank."""
    pairs = zip(tree.leaves(one), tree.leaves(other), strict=True)
    return tree.paths(one) == tree.paths(other) and all(
        torch.equal(local(a), local(b)) for a, b in pairs
    )


def train_and_save(
    rank: int, world: int, storage: str, path: str, steps: int, packed: bool = False
) -> None:
    """Train each kind for some steps and save it in a folder of its name."""
    own = {"step": steps, f"rank/{rank}": torch.tensor(rank), "plan": {"lr": [0.1, 0.2]}}
    for kind in MAKE:
        run = Run(world, storage, kind)
        params, state = run.train(*run.start(), range(steps))
        place = f"{path}/{kind}"
        sf.save_checkpoint(place, run.tx, state, params, extra=own, pack_symmetric=packed)


def resume_at(
    rank: int, world: int, storage: str, path: str, steps: int, kind: str = "grafted"
) -> tuple[bool, float]:
    """Load and train on: has it the bits of an unbroken run? how far is it from one process?"""
    run = Run(world, storage, kind)
    loaded = sf.load_checkpoint(path, run.tx, run.params(seed=99))
    done = int(loaded.extra["step"])
    params, state = run.train(loaded.params, loaded.state, range(done, steps))
    unbroken = run.train(*run.start(), range(steps))
    alone = Run(1, "", kind)
    wanted, _ = alone.train(*alone.start(), range(steps))
    if run.mesh is None:
        worst = max((params[key] - wanted[key]).abs().max().item() for key in wanted)
    else:
        worst = cases.difference(params, wanted, run.mesh, run.own)
    return same((params, state), unbroken), worst


def resume(
    rank: int, world: int, storage: str, path: str, steps: int
) -> list[tuple[bool, float, dict[str, Any]]]:
    """As `resume_at`, first what is routed only, with the extras."""
    answers = []
    for kind in ("routed", "grafted"):
        place = f"{path}/{kind}"
        bits, worst = resume_at(rank, world, storage, place, steps, kind)
        run = Run(world, storage, kind)
        extra = sf.load_checkpoint(place, run.tx, run.params()).extra
        told = {k: own.tolist() if isinstance(own, Tensor) else own for k, own in extra.items()}
        answers.append((bits, worst, told))
    return answers


def groups(rank: int, world: int, path: str) -> bool:
    """Save and load blocks that are shared in two groups, each of which has all of them."""
    mesh = cases.mesh_of((2, -1), world, "replica", "blocks")
    tx, params = cases.elementwise(mesh=mesh["blocks"]), cases.random_tree(SHAPES, 0)
    params, state = cases.train(tx, params, [cases.random_tree(SHAPES, 1)])
    sf.save_checkpoint(path, tx, state, params)
    loaded = sf.load_checkpoint(path, tx, params)
    return same((loaded.params, loaded.state), (params, state))


def save_alone(rank: int, world: int, path: str) -> bool:
    """Save and load on one rank only, in a group of several."""
    if rank:
        return True
    run = Run(1, "")
    params, state = run.train(*run.start(), range(1))
    sf.save_checkpoint(path, run.tx, state, params, alone=True)
    loaded = sf.load_checkpoint(path, run.tx, params, alone=True)
    return same((loaded.params, loaded.state), (params, state))


@contextlib.contextmanager
def full_disk(there: bool) -> Iterator[None]:
    """Let this process write no more than 100 bytes into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if there:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fail(rank: int, world: int, folder: str, how: str) -> tuple[str, bool]:
    """Fail on one rank, then save all the same: the error, and whether the second try worked."""
    run = Run(world, "shard0")
    params, state = run.train(*run.start(), range(2))
    path = Path(folder) / ("other" if how == "path" and rank == 1 else "saved")
    extra: dict[str, Any] = {"odd": object()} if how == "extra" and rank == 1 else {}
    told = ""
    try:
        with full_disk(how == f"disk {rank}"):
            if how == "async":
                odd = {"odd": object()} if rank == 1 else {}
                sf.save_checkpoint_async(path, run.tx, state, params, extra=odd).result()
            else:
                sf.save_checkpoint(path, run.tx, state, params, extra=extra)
    except ShampooFuncError as error:
        told = f"{type(error).__name__}: {error}"
    again = sf.save_checkpoint(Path(folder) / "again", run.tx, state, params)
    loaded = sf.load_checkpoint(again, run.tx, params)
    return told, same((loaded.params, loaded.state), (params, state))


def misfit(rank: int, world: int, path: str, how: str) -> str:
    """Load with something wrong on one rank only."""
    run = Run(world, "plain")
    params = run.params()
    if how == "path" and rank == 1:
        path += "_other"
    if how == "params" and rank == 1:
        params = {key: leaf for key, leaf in params.items() if key != "gain"}
        run = Run(world, "")  # its init asks nobody
    elif how == "params":
        run = Run(world, "")
    try:
        sf.load_checkpoint(path, run.tx, params)
    except ShampooFuncError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def save_in_background(rank: int, world: int, storage: str, path: str) -> bool:
    """Save while a donated step overwrites all that is saved, and collectives go on."""
    run = Run(world, storage)
    params, state = run.train(*run.start(), range(3))
    wanted = tree.map(lambda leaf: leaf.clone(), (params, state))

    def step(params: Params, state: Any, grads: Params) -> tuple[Params, Any]:
        updates, state = run.tx.update(grads, state, params)
        return sf.apply_updates(params, updates), state

    donated = sf.donate(step)
    saving = sf.save_checkpoint_async(path, run.tx, state, params, extra={"step": 3})
    other = sf.save_checkpoint_async(f"{path}_too", run.tx, state, params)
    for number in range(3, 9):
        params, state = donated(params, state, run.grads(number))
    changed = not same((params, state), wanted)
    other.result()
    loaded = sf.load_checkpoint(saving.result(), run.tx, params)
    return changed and same((loaded.params, loaded.state), wanted)


def own_dict(rank: int, world: int, storage: str, path: str) -> None:
    """Write this rank's part of the named state with torch.save."""
    run = Run(world, storage)
    params, state = run.train(*run.start(), range(3))
    whole = sf.to_state_dict(run.tx, state, params)
    torch.save({key: local(leaf) for key, leaf in whole.items()}, f"{path}.{rank}")


# Dying ------------------------------------------------------------------------------------------


def die() -> None:
    """End as by `kill -9`: no handler, no buffer and no `finally` runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_file_call(number: int, folder: str) -> None:
    """Die just before this process's file call of a number, counted from 1, in a folder."""
    seen = [0]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in FILE_CALLS and args and str(args[0]).startswith(folder):
            seen[0] += 1
            if seen[0] == number:
                die()

    sys.addaudithook(watch)


def die_at_sync(number: int, folder: str) -> None:
    """Die instead of the sync of a number, counted from 1, and lose half of what was written."""
    sync, seen = os.fsync, [0]

    def watched(file: Any) -> None:
        seen[0] += 1
        if seen[0] == number:
            size = os.fstat(file).st_size
            if size > 1:
                with contextlib.suppress(OSError):  # a folder
                    os.ftruncate(file, size // 2)
            die()
        sync(file)

    os.fsync = watched  # type: ignore[assignment]


def die_everywhere(folder: str, by: str) -> list[tuple[int, str]]:
    """Save a second checkpoint again and again, and die at each file call (or sync) in turn.

    Returns:
        The signal of every try, and what is left of the second checkpoint.
    """
    torch.set_num_threads(1)
    run = Run(1, "")
    first, second = (sf.checkpoint_path(folder, step) for step in (1, 2))
    after_one = run.train(*run.start(), range(1))
    after_two = run.train(*after_one, range(1, 2))
    sf.save_checkpoint(first, run.tx, after_one[1], after_one[0])
    found: list[tuple[int, str]] = []
    while not found or found[-1][0]:
        number = len(found) + 1
        child = os.fork()
        if child == 0:
            (die_at_file_call if by == "call" else die_at_sync)(number, folder)
            sf.save_checkpoint(second, run.tx, after_two[1], after_two[0])
            os._exit(0)
        end = os.waitpid(child, 0)[1]
        loaded = sf.load_checkpoint(first, run.tx, run.params())
        intact = same((loaded.params, loaded.state), after_one)
        found.append((end, state_of(second, run, after_two) if intact else "the first is spoilt"))
    return found


def state_of(path: Path, run: Run, wanted: tuple[Params, Any]) -> str:
    """Say whether a checkpoint is absent, and refused, or whole; remove it."""
    partial = list(path.parent.glob(".*.partial"))
    try:
        for left in partial:
            sf.load_checkpoint(left, run.tx, run.params())
            return f"{left} loads"
    except CheckpointError:
        pass
    if not path.exists():
        latest = sf.latest_checkpoint(path.parent)
        try:
            sf.load_checkpoint(path, run.tx, run.params())
        except CheckpointError:
            return "absent" if latest and latest != path else "no latest"
    loaded = sf.load_checkpoint(path, run.tx, run.params())
    whole = same((loaded.params, loaded.state), wanted)
    shutil.rmtree(path)
    return "whole" if whole else "spoilt"


def save_for_ever(folder: str) -> None:
    """Save step after step, until somebody ends it."""
    torch.set_num_threads(1)
    run = Run(1, "", "routed")
    params, state = run.start()
    for step in range(100_000):
        params, state = run.train(params, state, range(step, step + 1))
        path = sf.checkpoint_path(folder, step + 1)
        sf.save_checkpoint(path, run.tx, state, params, extra={"step": step + 1})


def die_while_saving(rank: int, world: int, folder: str, call: int) -> tuple[str, bool]:
    """Save twice; the last rank dies in the second: the error, and does the first one load?"""
    run = Run(world, "shard0")
    params, state = run.train(*run.start(), range(2))
    sf.save_checkpoint(sf.checkpoint_path(folder, 2), run.tx, state, params)
    if rank == world - 1:
        die_at_file_call(call, folder)
    told = ""
    try:
        sf.save_checkpoint(sf.checkpoint_path(folder, 4), run.tx, state, params)
    except ShampooFuncError as error:
        told = type(error).__name__
    latest = sf.latest_checkpoint(folder)
    return told, latest == sf.checkpoint_path(folder, 2)


class DieAtCollective(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dies before the functional collective of a number, counted from 1."""

    def __init__(self, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("_c10d_functional::") and "wait" not in func.name():
            self.left -= 1
            if self.left == 0:
                die()
        return func(*args, **(kwargs or {}))


def die_in_a_step(
    rank: int, world: int, storage: str, folder: str, collective: int
) -> tuple[str, int]:
    """Train and save every second step; the last rank dies in the midst of the sixth."""
    run = Run(world, storage)
    params, state = run.start()
    for step in range(8):
        last = step == 5 and rank == world - 1
        try:
            with DieAtCollective(collective) if last else contextlib.nullcontext():
                params, state = run.train(params, state, range(step, step + 1))
        except ShampooFuncError as error:
            return type(error).__name__, step
        if step % 2:
            path = sf.checkpoint_path(folder, step + 1)
            sf.save_checkpoint(path, run.tx, state, params, extra={"step": step + 1})
    return "", 8
