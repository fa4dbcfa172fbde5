"""The two ways to a torch.optim optimizer: by name, and from any transformation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from shampoo_func.errors import HyperparameterError
from shampoo_func.recipes import shampoo
from shampoo_func.sharding import sharding
from shampoo_func.torch_optim.meshed import OnMesh
from shampoo_func.torch_optim.optimizer import FunctionalOptimizer
from shampoo_func.torch_optim.options import Recipe
from shampoo_func.torch_optim.rates import WithoutRate, WithRate, constant_rates, scheduled_rate
from shampoo_func.transforms import WithHyperparams
from shampoo_func.types import Scalar, Schedule, Transformation

__all__ = ["ShampooOptimizer", "as_optimizer"]


class ShampooOptimizer(FunctionalOptimizer):
    """Shampoo as a `torch.optim.Optimizer`: `shampoo(...)` behind `loss.backward(); opt.step()`.

    The options of `shampoo` are the options of a param group, under their own names, and
    `learning_rate` as `lr`. Each group may have its own; each number may be changed in the group
    at any time, by hand or by a scheduler of torch.optim, and holds from the next step on.

    Args:
        params: Parameters, `model.named_parameters()`, or a list of param groups.
        lr: A number, a 0-d tensor, or a schedule of the step; a schedule excludes a scheduler of
            torch.optim.
        maximize: Whether to go up instead of down.
        compile: Whether to compile the whole update; a dict has the arguments of torch.compile.
        max_failures: How often in a row a root may fail before `step` raises an error that
            names the parameter and the block; None for ever.
        mesh: The ranks that share the blocks, see `sharded`. Every rank of it makes the optimizer
            and calls its methods, `state_dict` and `load_state_dict` too.
        **options: Options of `shampoo`.

    Raises:
        HyperparameterError: If an option is out of range, or there is none of that name.
        ParameterError: If a parameter is no real floating tensor, or given twice.
        ShardingError: If this rank is not in the mesh.

    Source: arXiv 2309.06497, section 3.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> opt = ShampooOptimizer(model.named_parameters(), lr=0.1, weight_decay=0.01)
        >>> model(torch.ones(3, 4)).square().mean().backward()
        >>> opt.step()
        >>> opt.param_groups[0]["lr"] = 0.05
        >>> sorted(opt.state_dict())
        ['param_groups', 'state']
    """

    def __init__(
        self,
        params: Any,
        lr: Scalar | Schedule = 1e-2,
        *,
        maximize: bool = False,
        compile: bool | Mapping[str, Any] = False,
        max_failures: int | None = 3,
        mesh: DeviceMesh | None = None,
        **options: Any,
    ) -> None:
        recipe = Recipe.of(shampoo, {"learning_rate": lr, **options})
        if mesh is not None:
            recipe = dataclasses.replace(recipe, factory=OnMesh(shampoo, sharding(mesh)))
        super().__init__(
            params,
            recipe,
            maximize=maximize,
            compile=compile,
            max_failures=max_failures,
        )


def as_optimizer(
    params: Any,
    tx: Transformation,
    *,
    maximize: bool = False,
    compile: bool | Mapping[str, Any] = False,
    max_failures: int | None = 3,
) -> FunctionalOptimizer:
    """Make a `torch.optim.Optimizer` of a transformation.

    What can be changed in a param group depends on the transformation:

    - `with_hyperparams(recipe, ...)`: every argument of the recipe, as in `ShampooOptimizer`.
    - Any other with constant learning rates inside: `lr`, the largest of them; changing it
      changes all in proportion. Decay that was computed from a learning rate when the
      transformation was built ("corrected") does not follow; use `with_hyperparams` for that.
    - One whose learning rate is a schedule, or that has none: nothing. `lr` shows the rate, and
      changing it is an error.

    Every param group has a state of its own: a global norm is one of the group.

    Args:
        params: Parameters, `model.named_parameters()`, or a list of param groups.
        tx: The transformation; one on a mesh is called by every rank of it.
        maximize: Whether to go up instead of down.
        compile: Whether to compile the whole update; a dict has the arguments of torch.compile.
        max_failures: How often in a row a root may fail before `step` raises; None for ever.

    Raises:
        HyperparameterError: If `tx` is no transformation.
        ParameterError: If a parameter is no real floating tensor, or given twice.

    Example:
        >>> import torch
        >>> from shampoo_func.recipes import sgd
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> opt = as_optimizer([weight], sgd(0.1))
        >>> scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.5)
        >>> for _ in range(2):
        ...     opt.zero_grad()
        ...     weight.sum().backward()
        ...     opt.step()
        ...     scheduler.step()
        >>> weight.data, opt.param_groups[0]["lr"]
        (tensor([0.8500, 0.8500]), 0.025)
    """
    if not isinstance(tx, Transformation):
        raise HyperparameterError(f"as_optimizer needs a transformation, got {tx!r}.")
    living: frozenset[str] = frozenset()
    schedule = scheduled_rate(tx)
    rates = constant_rates(tx)
    if isinstance(tx, WithHyperparams):
        numbers = {name: _number(value) for name, value in tx.hyperparams}
        recipe = Recipe.of(tx.factory, {**numbers, **dict(tx.static)})
        living = frozenset(name for name in numbers if name != "learning_rate")
    elif rates and schedule is None:
        reference = max(rates)
        recipe = Recipe.of(WithRate(tx, reference), {"learning_rate": reference})
    else:
        recipe = Recipe.of(WithoutRate(tx), {})
    return FunctionalOptimizer(
        params,
        recipe,
        living=living,
        schedule=schedule,
        maximize=maximize,
        compile=compile,
        max_failures=max_failures,
    )


def _number(value: Any) -> Any:
    """Return a hyper-parameter as a number, so that every group has its own tensor of it."""
    return float(value)
