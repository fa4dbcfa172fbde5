"""Averaged parameters in the place of those that are trained, and back."""

from __future__ import annotations

from shampoo_func.torch_optim.member import Member, Params
from shampoo_func.transforms import eval_params

__all__ = ["swapped_in"]


def swapped_in(groups: list[tuple[Member | None, Params]]) -> list[Params] | None:
    """Write the averages over the parameters, and return what was there; None for no average.

    Args:
        groups: Every group's member, if it has done a step, and its parameters.
    """
    swaps: list[tuple[Params, Params]] = []
    for member, params in groups:
        own = {name: params[name].detach() for name in (member.names if member else ())}
        means = eval_params(member.tx, member.state, own) if member else own
        swaps.append((own, {name: means[name] for name in own if means[name] is not own[name]}))
    if not any(changed for _, changed in swaps):
        return None
    kept = [{name: own[name].clone() for name in changed} for own, changed in swaps]
    for own, changed in swaps:
        for name, mean in changed.items():
            own[name].copy_(mean)
    return kept
