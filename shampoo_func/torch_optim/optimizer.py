"""A torch.optim.Optimizer whose step is a pure transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shampoo_func import tree
from shampoo_func.errors import OptimizerError, ParameterError
from shampoo_func.torch_optim import saving
from shampoo_func.torch_optim.averages import swapped_in
from shampoo_func.torch_optim.member import Member, Params, named_params
from shampoo_func.torch_optim.options import (
    Group,
    Recipe,
    check_keys,
    check_rate,
    complete,
    options_of,
    plain,
    shown_rate,
)
from shampoo_func.torch_optim.step import Ready, compiled_step, gathered, updated
from shampoo_func.transforms import check_failures
from shampoo_func.types import Schedule

__all__ = ["FunctionalOptimizer"]

COPIED = (
    *("defaults", "param_groups", "_recipe", "_living", "_schedule", "_compile"),
    *("_max_failures", "_members", "_trained"),
)


class FunctionalOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` around a recipe: what `as_optimizer` returns.

    Args:
        params: Parameters, named parameters, or a list of param groups, as torch.optim has it.
        recipe: The constructor of the transformation, and its arguments: the options of a group.
        living: Options that are 0-d tensors from the beginning, besides `lr`.
        schedule: The schedule of the learning rate, if it is inside the transformation.
        maximize: Whether to go up instead of down.
        compile: Whether to compile the whole update; a dict has the arguments of torch.compile.
        max_failures: How often in a row a root may fail before `step` raises; None for ever.
    """

    def __init__(
        self,
        params: Any,
        recipe: Recipe,
        *,
        living: frozenset[str] = frozenset(),
        schedule: Schedule | None = None,
        maximize: bool = False,
        compile: bool | Mapping[str, Any] = False,
        max_failures: int | None = None,
    ) -> None:
        self._recipe = recipe
        self._living = living | {"lr"}
        self._schedule = schedule
        self._compile = dict(compile) if isinstance(compile, Mapping) else compile
        self._max_failures = max_failures
        self._members: list[Member | None] = []
        self._trained: list[Params] | None = None
        self._compiled: tuple[list[Any], Any] | None = None
        super().__init__(params, {**dict(recipe.defaults), "maximize": maximize})

    @property  # type: ignore[override]
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """The state by parameter, as torch.optim has it: named views, made when asked for."""
        found = {}
        for index in range(len(self.param_groups)):
            params = self._params(index)
            named = saving.by_name(self._with_state(index), params)
            found.update({params[name]: own for name, own in named.items()})
        return found

    @state.setter
    def state(self, value: Any) -> None:
        """Let torch.optim's constructor set what is computed here."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own; also after steps.

        Raises:
            HyperparameterError: If an option is out of range, or there is none of that name.
            ParameterError: If a parameter is given twice, or is no real floating tensor.
        """
        if isinstance(param_group, dict):
            check_keys(param_group, self._recipe.names)
        super().add_param_group(param_group)
        try:
            self._check_new(len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        self._members.append(None)

    def _check_new(self, index: int) -> None:
        """Check a new group, and complete its options."""
        group, params = self.param_groups[index], self._params(index)
        others = [name for other in range(index) for name in self._params(other)]
        repeated = [name for name in params if name in others]
        if repeated or len({*params.values()}) < len(group["params"]):
            seen = repeated[0] if repeated else "a parameter"
            raise ParameterError(
                f"{seen!r} is given twice; give every parameter once, by one name."
            )
        tree.check_params(params)
        complete(group, self._recipe, self._schedule)
        self._recipe.build(options_of(self._recipe, group))

    def _params(self, index: int) -> Params:
        """Return a group's parameters by name."""
        offset = sum(len(group["params"]) for group in self.param_groups[:index])
        return named_params(self.param_groups[index], offset)

    def _member(self, index: int) -> Member:
        """Return what a group's options make; the one that is kept, if there is one."""
        group, kept = self.param_groups[index], self._members[index]
        check_rate(self._recipe, group)
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        if kept is None:
            return Member.of(self._recipe, group, self._living, device)
        self._members[index] = kept.follow(self._recipe, group, self._params(index), device)
        return self._members[index] or kept

    def _with_state(self, index: int) -> Member:
        """Return a member with a state: before the first step, one made for the moment.

        A state may begin as a copy of the parameters, so it is kept from the first step only:
        the model may still load other parameters.
        """
        member = self._member(index)
        member.admit(self._params(index))
        return member

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step with the gradients in `.grad`; a parameter without one is left alone.

        Args:
            closure: Computes the loss anew, with gradients; called once, its loss is returned.

        Raises:
            GradientError: If a gradient is sparse or complex; nothing has changed then.
            HyperparameterError: If an option of a group was set out of range.
            OptimizerError: If averaged parameters are in place (`eval`), or a learning rate was
                changed that is not the group's.
        """
        if self._trained is not None:
            raise OptimizerError("the averaged parameters are in place; call train() before step.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = [self._with_state(index) for index in range(len(self.param_groups))]
        ready = [self._gathered(index, member) for index, member in enumerate(members)]
        if self._compile:
            self._write_compiled(members, ready)
        else:
            self._write(members, ready)
        self._members = list(members)
        self._finish(members, ready)
        return loss

    def _gathered(self, index: int, member: Member) -> Ready:
        group, params = self.param_groups[index], self._params(index)
        own = {name: params[name] for name in member.names}
        return gathered(own, member.refresh(group["step"] + 1), maximize=group["maximize"])

    def _write(self, members: list[Member], ready: list[Ready]) -> None:
        """Update every group, and write only when all of them could be updated."""
        results = [
            updated(member.tx, member.state, own)
            for member, own in zip(members, ready, strict=True)
        ]
        for member, own, (updates, state) in zip(members, ready, results, strict=True):
            for name, update in updates.items():
                if update is not None:
                    own.params[name].add_(update)
            member.state = state

    def _write_compiled(self, members: list[Member], ready: list[Ready]) -> None:
        """Update all groups by one graph, compiled anew if the options ask for another."""
        used = [member.static for member in members]
        kept = self._compiled
        if kept is None or [*map(id, kept[0])] != [*map(id, used)]:
            options = self._compile if isinstance(self._compile, dict) else {}
            self._compiled = kept = (used, compiled_step(self._recipe, used, options))
        kept[1](
            [own.params for own in ready],
            [member.state for member in members],
            [own.grads for own in ready],
            [member.tensors for member in members],
            [own.refresh for own in ready],
        )

    def _finish(self, members: list[Member], ready: list[Ready]) -> None:
        """Count the step, show the rates of the next, and look for roots that keep failing."""
        for group in self.param_groups:
            group["step"] += 1
            shown = shown_rate(self._recipe, group)
            if shown is not None:
                group["lr"] = shown
        if self._max_failures is None:
            return
        for member, own in zip(members, ready, strict=True):
            if own.refresh is not False:
                check_failures(member.tx, member.state, own.params, limit=self._max_failures)

    def eval(self) -> None:
        """Put the averaged parameters in place, if a stage averages; `train` puts them back."""
        if self._trained is None:
            pairs = enumerate(self._members)
            self._trained = swapped_in([(member, self._params(i)) for i, member in pairs])

    def train(self, mode: bool = True) -> None:
        """Put the parameters that are trained back, bit for bit; with `mode=False`, as `eval`."""
        if not mode:
            self.eval()
        elif self._trained is not None:
            for index, kept in enumerate(self._trained):
                params = self._params(index)
                for name, value in kept.items():
                    params[name].detach().copy_(value)
            self._trained = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch.optim's shape, with plain values and named tensors only.

        `state` has, for every parameter, its part of the state by name; what belongs to none
        (the step of a schedule) is with the first of its group, as `shared:...`. `param_groups`
        has the options; one that is an object is there as its text. The tensors are not copies.

        Raises:
            OptimizerError: If the averaged parameters are in place (`eval`).
        """
        if self._trained is not None:
            raise OptimizerError(
                "the averaged parameters are in place; call train() before saving, so that the "
                "parameters belong to the state."
            )
        state_dict = super().state_dict()
        groups = [
            {key: plain(value) for key, value in group.items()}
            for group in state_dict["param_groups"]
        ]
        return {**state_dict, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned: options and state, all or nothing.

        Raises:
            CheckpointError: If it does not fit; the message names what differs.
            HyperparameterError: If an option is out of range.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        all_params = [self._params(index) for index in range(len(self.param_groups))]
        states = saving.named_groups(state_dict, all_params)
        groups: list[Group] = []
        members: list[Member | None] = []
        for index, params in enumerate(all_params):
            saved = state_dict["param_groups"][index]
            group = saving.loaded_group(self._recipe, self.param_groups[index], saved)
            device = next((param.device for param in params.values()), torch.device("cpu"))
            member = Member.of(self._recipe, group, self._living, device)
            saving.loaded_member(member, params, states[index])
            groups.append(group)
            # a state without a step is made when the first is done, see _with_state
            members.append(member if group["step"] else None)
        self._members = members
        for own, loaded in zip(self.param_groups, groups, strict=True):
            own.update(loaded)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out hooks, as torch.optim does, and what was compiled."""
        return {name: self.__dict__[name] for name in COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` returned."""
        super().__setstate__({**state, "_compiled": None})
