"""What the ranks of a pool do in `test_sharding_shell.py`: functions of `(rank, world, ...)`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from compiling import graph_count
from sharding_cases import grafted, mesh_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import shampoo_func as sf

STEPS = 6
OPTIONS: dict[str, Any] = {
    "beta2": 0.9,
    "epsilon": 1e-3,
    "weight_decay": 0.05,
    "momentum": 0.6,
    "block_size": 4,
    "refresh_every": 2,
}


def plain_model() -> nn.Module:
    """A small model, the same on every rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5))
    return model.double()


def distributed(mode: str, world: int) -> tuple[nn.Module, DeviceMesh]:
    """The same model, distributed; in "ddp" every rank simply sees the same batch."""
    model = plain_model()
    if mode == "fsdp_tp":
        mesh = mesh_of((2, -1), world, "dp", "tp")
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])
    elif mode == "hsdp":
        mesh = mesh_of((2, -1), world)
        fully_shard(model, mesh=mesh)
    else:
        mesh = mesh_of((-1,), world)
        if mode == "fsdp":
            fully_shard(model, mesh=mesh)
    return model, mesh


def shell(model: nn.Module, mesh: DeviceMesh | None, made: str, **options: Any) -> Any:
    """The shell around a transformation, or a recipe with its options in the param groups."""
    named = model.named_parameters()
    if made == "as_optimizer":
        tx = grafted() if mesh is None else sf.sharded(grafted(), mesh)
        return sf.as_optimizer(named, tx, **options)
    return sf.ShampooOptimizer(named, lr=0.05, mesh=mesh, **OPTIONS, **options)


def run(model: nn.Module, optimizer: Any, steps: range) -> None:
    """The plain loop, with a learning rate that changes every step."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in steps:
        x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def apart(model: nn.Module, twin: nn.Module) -> float:
    """The largest difference of two models' parameters."""
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return max((whole(own) - other).abs().max().item() for own, other in pairs)


def whole(leaf: Tensor) -> Tensor:
    return leaf.full_tensor() if isinstance(leaf, DTensor) else leaf


def train_shell(rank: int, world: int, mode: str, made: str) -> float:
    """Train with the shell on a mesh, and on one process."""
    twin = plain_model()
    model, mesh = distributed(mode, world)
    run(model, shell(model, mesh, made), range(STEPS))
    run(twin, shell(twin, None, made), range(STEPS))
    return apart(model, twin)


def resume_shell(rank: int, world: int, mode: str) -> float:
    """Stop in the middle, load model and optimizer into new ones, and go on."""
    twin = plain_model()
    model, mesh = distributed(mode, world)
    optimizer, other = shell(model, mesh, "named"), shell(twin, None, "named")
    run(model, optimizer, range(3))
    run(twin, other, range(3))
    saved: Mapping[str, Any] = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    later, mesh = distributed(mode, world)
    later.load_state_dict(weights)
    resumed = shell(later, mesh, "named")
    resumed.load_state_dict(saved)
    run(later, resumed, range(3, STEPS))
    run(twin, other, range(3, STEPS))
    return apart(later, twin)


def compiled_shell(rank: int, world: int, mode: str) -> tuple[float, int]:
    """The compiled step of the shell on a mesh: how far from one process, and how many graphs."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(6, 6, bias=False).double()  # tracing takes time: a block a rank
    twin = copy.deepcopy(model)
    mesh = mesh_of((-1,), world)
    if mode == "fsdp":
        fully_shard(model, mesh=mesh)
    small = {**OPTIONS, "block_size": 3, "grafting": None}
    optimizer = sf.ShampooOptimizer(
        model.named_parameters(), mesh=mesh, compile={"backend": "aot_eager"}, **small
    )
    run(model, optimizer, range(STEPS))
    run(twin, sf.ShampooOptimizer(twin.named_parameters(), **small), range(STEPS))
    assert optimizer._compiled is not None
    return apart(model, twin), graph_count(optimizer._compiled[1])


def grouped_shell(rank: int, world: int) -> float:
    """Two groups; a frozen parameter, and one that no gradient reaches."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        named = list(model.named_parameters())
        return [
            {"params": [pair for pair in named if "weight" in pair[0]], "lr": 0.1},
            {"params": [pair for pair in named if "bias" in pair[0]], "refresh_every": 3},
        ]

    def prepared(model: nn.Module) -> nn.Module:
        model.register_parameter("unused", nn.Parameter(torch.ones(3, 4, dtype=torch.float64)))
        model[0].bias.requires_grad_(False)  # type: ignore[index]
        return model

    twin = prepared(plain_model())
    mesh = mesh_of((-1,), world)
    model = prepared(plain_model())
    fully_shard(model, mesh=mesh)
    first = sf.ShampooOptimizer(groups(model), mesh=mesh, **OPTIONS)
    second = sf.ShampooOptimizer(groups(twin), **OPTIONS)
    run(model, first, range(STEPS))
    run(twin, second, range(STEPS))
    return apart(model, twin)


def failing_shell(rank: int, world: int, mode: str) -> str:
    """Give one block a gradient that is not finite, for longer than is tolerated."""
    model, mesh = distributed(mode, world)
    optimizer = shell(model, mesh, "named", max_failures=1)
    for _ in range(STEPS):
        model(torch.ones(8, 6, dtype=torch.float64)).square().mean().backward()
        for name, param in model.named_parameters():
            assert param.grad is not None
            own = param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad
            own.fill_(1.0)  # whatever has become of the weights
            if name == "0.weight" and (rank == 0 or mode == "ddp"):
                own[0, 0] = torch.nan
        optimizer.step()
        optimizer.zero_grad()
    return "no error"
