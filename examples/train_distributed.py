"""Train the small GPT on several ranks: DDP, FSDP2, HSDP, or FSDP2 with tensor parallelism.

    torchrun --nproc-per-node 2 examples/train_distributed.py --mode fsdp2

Every rank owns a part of Shampoo's blocks. Whatever the mode and the number of ranks, the run is
the same one, to rounding; a checkpoint of one can be resumed by any other.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm.data import load_corpus, training_batch, validation_batches
from lm.model import GPT, SIZES
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import shampoo_func as sf
from shampoo_func.sharding import CountCollectives, as_local

MODES = ("ddp", "fsdp2", "hsdp", "fsdp2-tp")


def main() -> None:
    """Train, save, and print a line per rank."""
    options = _parse()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda" if cuda else "cpu")
    mesh, data = _meshes(options.mode, device)
    torch.manual_seed(options.seed)  # the same weights on every rank
    config = SIZES[options.size]
    model = _distributed(GPT(config).to(device), options.mode, mesh)
    params = _params(model)
    tx = sf.sharded(
        sf.shampoo(options.learning_rate, weight_decay=0.1, block_size=256, grafting="adam"),
        mesh,
    )
    optimizer = sf.as_optimizer(_named(model), tx) if options.shell else None
    state, first = (None if optimizer else tx.init(params)), 1
    if options.resume:
        state, first = _load(options, tx, params)
    saving: Future[Path] | None = None
    corpus = load_corpus()
    sent = CountCollectives()
    start = time.perf_counter()
    for step in range(first, options.steps + 1):
        windows = training_batch(
            corpus, step, seed=options.seed, batch=options.batch, context=config.context
        )
        share = windows.chunk(data.size())[data.get_local_rank()].to(device)
        loss = _loss(model, share)
        loss.backward()  # type: ignore[no-untyped-call]
        with sent if step > first else contextlib.nullcontext():  # the first call checks plans
            if optimizer:
                optimizer.step()
            else:
                state = _step(tx, state, model, step)
        model.zero_grad()
        if options.checkpoint and (step % options.save_every == 0 or step == options.steps):
            path = sf.checkpoint_path(options.checkpoint, step)
            if saving:
                saving.result()  # raises what went wrong with the one before
            saving = sf.save_checkpoint_async(path, tx, state, params, extra={"step": step})
    if saving:
        saving.result()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        losses = [
            _loss(model, own.to(device)) for own in validation_batches(corpus, config.context)
        ]
    held = sf.tree.leaves([*optimizer.state.values()] if optimizer else state)
    blocks = sf.state_report(tx, _params(model)).blocks[dist.get_rank()]
    steps = options.steps - first + 1
    _report(held, blocks, sent.bytes / max(steps - 1, 1), seconds / steps)
    if dist.get_rank() == 0:
        print(f"validation loss {torch.stack(losses).mean().item():.4f}")
    dist.destroy_process_group()


def _step(tx: sf.Transformation, state: Any, model: nn.Module, step: int) -> Any:
    """Update the weights in place, and return the next state."""
    params = _params(model)
    grads = {name: weight.grad for name, weight in _named(model)}
    updates, state = tx.update(grads, state, params, refresh=sf.refresh_due(tx, step))
    with torch.no_grad():
        for name, weight in params.items():
            weight.add_(updates[name])
    return state


def _meshes(mode: str, device: torch.device) -> tuple[DeviceMesh, DeviceMesh]:
    """Return the mesh of all ranks, and the part of it that splits the batch."""
    world = dist.get_world_size()
    if mode == "hsdp":
        mesh = init_device_mesh(device.type, (2, world // 2), mesh_dim_names=("replica", "shard"))
        return mesh, init_device_mesh(device.type, (world,))
    if mode == "fsdp2-tp":
        mesh = init_device_mesh(device.type, (world // 2, 2), mesh_dim_names=("dp", "tp"))
        return mesh, mesh["dp"]
    mesh = init_device_mesh(device.type, (world,))
    return mesh, mesh


def _distributed(model: GPT, mode: str, mesh: DeviceMesh) -> nn.Module:
    """Distribute a model; the optimizer sees how from its parameters."""
    if mode == "ddp":
        return DistributedDataParallel(model)
    own = mesh
    if mode == "fsdp2-tp":
        for block in model.blocks:
            plan = {"mlp_in": ColwiseParallel(), "mlp_out": RowwiseParallel()}
            parallelize_module(block, mesh["tp"], plan)
        own = mesh["dp"]
    for block in model.blocks:
        fully_shard(block, mesh=own)
    fully_shard(model, mesh=own)
    return model


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters under the same names in every mode."""
    return [(name.removeprefix("module."), own) for name, own in model.named_parameters()]


def _params(model: nn.Module) -> dict[str, Tensor]:
    return {name: own.detach() for name, own in _named(model)}


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, -2), windows[:, 1:].reshape(-1))


def _load(
    options: argparse.Namespace, tx: sf.Transformation, params: dict[str, Tensor]
) -> tuple[Any, int]:
    """Load weights, in place, and the state; return the latter and the next step."""
    path = sf.latest_checkpoint(options.checkpoint)
    if path is None:
        raise SystemExit(f"there is no complete checkpoint in {options.checkpoint}")
    loaded = sf.load_checkpoint(path, tx, params)
    for name, weight in params.items():
        weight.copy_(loaded.params[name])
    return loaded.state, loaded.extra["step"] + 1


def _report(held: list[Tensor], blocks: int, sent: float, seconds: float) -> None:
    """Print what every rank has and does: a line each."""
    size = sum(as_local(leaf).nbytes for leaf in held) / 2**20
    line = (
        f"{dist.get_rank():4d}  {size:12.2f}  {blocks:6d}  {sent / 2**20:13.2f}  "
        f"{1e3 * seconds:11.1f}"
    )
    lines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lines, line)
    if dist.get_rank() == 0:
        print("rank  MiB of state  blocks  MiB sent/step  ms per step", *lines, sep="\n")


def _parse() -> argparse.Namespace:
    parse = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parse.add_argument("--mode", choices=MODES, default="fsdp2")
    parse.add_argument("--size", choices=SIZES, default="tiny")
    parse.add_argument("--steps", type=int, default=50)
    parse.add_argument("--batch", type=int, default=16, help="windows per step, of all ranks")
    parse.add_argument("--learning-rate", type=float, default=1e-2)
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--checkpoint", type=Path, help="folder of checkpoints, one per step")
    parse.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parse.add_argument("--resume", action="store_true", help="go on from the latest checkpoint")
    parse.add_argument("--shell", action="store_true", help="step by a torch.optim optimizer")
    options = parse.parse_args()
    if options.resume and not options.checkpoint:
        parse.error("--resume needs --checkpoint")
    if options.shell and options.checkpoint:
        parse.error("--checkpoint saves the state of a transformation; leave out --shell")
    if options.checkpoint and not options.resume and sf.latest_checkpoint(options.checkpoint):
        parse.error(f"{options.checkpoint} has checkpoints; give --resume, or another folder")
    return options


if __name__ == "__main__":
    main()
