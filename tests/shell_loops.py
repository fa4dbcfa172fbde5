"""What the tests of the torch.optim shell share: small models and the two kinds of loop."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import shampoo_func as sf

SETTINGS: dict[str, Any] = {
    "beta2": 0.9,
    "epsilon": 1e-4,
    "weight_decay": 0.05,
    "momentum": 0.6,
    "block_size": 12,
    "refresh_every": 4,
}


class Net(nn.Module):
    """A small convolutional net: parameters of order 1, 2 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.GroupNorm(1, 3)
        self.head = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.conv(images)).relu().mean((-2, -1))
        return self.head(hidden)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(steps: int, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets of every step."""
    conv = isinstance(model, Net)
    shape = (4, 1, 6, 6) if conv else (4, 6)
    return [(torch.randn(shape), torch.randn(4, 5 if conv else 3)) for _ in range(steps)]


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    model.zero_grad()
    loss = (model(batch[0]) - batch[1]).square().mean()
    loss.backward()
    return loss


def train(
    model: nn.Module, optimizer: Any, data: list[tuple[Tensor, Tensor]], scheduler: Any = None
) -> list[dict[str, Tensor]]:
    """The plain loop; returns the parameters after every step."""
    trajectory = []
    for batch in data:
        backward(model, batch)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        trajectory.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return trajectory


def functional(
    model: nn.Module,
    groups: list[tuple[Callable[[int], sf.Transformation], list[str]]],
    data: list[tuple[Tensor, Tensor]],
) -> list[dict[str, Tensor]]:
    """The functional loop with one transformation per step and group, and the refresh clock."""
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    states = [make(0).init({name: params[name] for name in names}) for make, names in groups]
    trajectory = []
    for step, batch in enumerate(data):
        own = {name: p.clone().requires_grad_() for name, p in params.items()}
        loss = (torch.func.functional_call(model, own, (batch[0],)) - batch[1]).square().mean()
        found = torch.autograd.grad(loss, list(own.values()))
        grads = dict(zip(own, found, strict=True))
        for index, (make, names) in enumerate(groups):
            part = {name: params[name] for name in names}
            tx = make(step)
            own_grads = {name: grads[name] for name in names}
            due = {"refresh": sf.refresh_due(tx, step + 1)} if "refresh" in tx.extras else {}
            updates, states[index] = tx.update(own_grads, states[index], part, **due)
            params = {**params, **sf.apply_updates(part, updates)}
        trajectory.append(params)
    return trajectory


def check_equal(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> None:
    """Every parameter after every step has the same bits."""
    assert len(one) == len(other) > 0
    for ours, theirs in zip(one, other, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices and the rest, with options of their own."""
    named = list(model.named_parameters())
    return [
        {"params": [pair for pair in named if pair[1].ndim > 1], "lr": 0.05},
        {
            "params": [pair for pair in named if pair[1].ndim < 2],
            "weight_decay": 0.0,
            "beta1": 0.5,
            "refresh_every": 3,
        },
    ]


def saved_and_loaded(state_dict: Any) -> Any:
    """Through a file, as a careful reader reads it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def fixed_run(
    optimizer: Any, params: dict[str, nn.Parameter], grads: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Steps with given gradients."""
    for grad in grads:
        for name, param in params.items():
            param.grad = grad[name].clone()
        optimizer.step()
    return {name: param.detach().clone() for name, param in params.items()}


def two_params() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.randn(5, 3).double()) for name in ("a", "b")}


def random_grads(params: dict[str, Any], steps: int) -> list[dict[str, Tensor]]:
    return [{name: torch.randn_like(p) for name, p in params.items()} for _ in range(steps)]
