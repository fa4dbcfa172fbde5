"""Steps that write their results over their inputs, so that nothing new stays allocated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shampoo_func import tree
from shampoo_func.errors import DonationError, TreeMismatchError, check_count
from shampoo_func.sharding import as_local
from shampoo_func.types import Tree

__all__ = ["donate"]


def donate(step: Callable[..., tuple[Any, ...]], donated: int = 2) -> Callable[..., Any]:
    """Make a step copy its first results into its first arguments.

    Under `torch.compile` the copies melt into the kernels that compute the results: no new
    buffers, and the addresses of parameters and state never change. In eager code they cost a
    copy. Unlike in JAX the old handles stay valid; they see the new values.

    Args:
        step: `step(params, state, *rest) -> (params, state, *others)`, pure.
        donated: How many leading arguments and results are matched up and overwritten.

    Returns:
        A function of the same signature that returns its own (overwritten) arguments in the
        place of the results.

    Raises:
        HyperparameterError: If `donated` is no positive int.
        DonationError: (when called) if a result does not fit its input, or two leaves share
            memory, so that writing one would spoil another. Shared memory is found in eager
            calls only: try a new step once without `torch.compile`.

    Example:
        >>> def step(params, grads):
        ...     return params - 0.1 * grads, grads.sum()
        >>> params = torch.ones(2)
        >>> result, total = donate(step, donated=1)(params, torch.ones(2))
        >>> result is params, params
        (True, tensor([0.9000, 0.9000]))
    """
    check_count("donated", donated)

    @functools.wraps(step)
    def donated_step(*args: Any, **kwargs: Any) -> Any:
        results = step(*args, **kwargs)
        if not isinstance(results, tuple) or len(results) < donated or len(args) < donated:
            raise DonationError(
                f"a step with {donated} donated arguments must take at least as many by position "
                "and return a tuple that begins with their new values."
            )
        _overwrite(args[:donated], results[:donated])
        return (*args[:donated], *results[donated:])

    return donated_step


def _overwrite(old: tuple[Tree, ...], new: tuple[Tree, ...]) -> None:
    """Copy every leaf of `new` into its partner in `old`, after checking them all."""
    targets, structure = tree.flatten(old)
    try:
        sources = tree.flatten_up_to(structure, new, old)
    except TreeMismatchError as error:
        raise DonationError(
            f"the results have another structure than the donated arguments: {error}"
        ) from error
    _check_fit(old, targets, sources)
    if not torch.compiler.is_compiling():
        # addresses are unknown while tracing, and a guard on identity would tie the graph to
        # these very tensors
        _check_aliases(old, targets, sources)
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            if target is not source:
                # torch 2.13 loses a compiled write into a 0-d float64 tensor, not into its view
                (target.view(1) if target.ndim == 0 else target).copy_(source)


def _check_fit(old: Tree, targets: list[Tensor], sources: list[Any]) -> None:
    fits = [
        isinstance(target, Tensor)
        and isinstance(source, Tensor)
        and source.shape == target.shape
        and source.dtype == target.dtype
        for target, source in zip(targets, sources, strict=True)
    ]
    if False not in fits:
        return
    index = fits.index(False)
    target, source = targets[index], sources[index]
    if not isinstance(target, Tensor):
        raise DonationError(
            f"the donated leaf {tree.path_of(old, index)!r} is no tensor but "
            f"{type(target).__name__}; pass trees of tensors only."
        )
    seen = (
        f"{tuple(source.shape)} {source.dtype}"
        if isinstance(source, Tensor)
        else type(source).__name__
    )
    raise DonationError(
        f"the result for {tree.path_of(old, index)!r} is {seen}, but its input is "
        f"{tuple(target.shape)} {target.dtype}; a donated step must keep both."
    )


def _check_aliases(old: Tree, targets: list[Tensor], sources: list[Tensor]) -> None:
    """Refuse memory that is in two places: writing one leaf would spoil another."""
    owner: dict[Any, int] = {}
    for index, target in enumerate(targets):
        if _overlaps_itself(target):
            raise DonationError(
                f"the donated leaf {tree.path_of(old, index)!r} has several elements in one "
                f"place of memory (strides {target.stride()}); pass target.contiguous()."
            )
        first = owner.setdefault(_memory(target), index)
        if first != index and target.numel():
            raise DonationError(
                f"the donated leaves {tree.path_of(old, first)!r} and "
                f"{tree.path_of(old, index)!r} share memory; pass a clone of one."
            )
    for index, (target, source) in enumerate(zip(targets, sources, strict=True)):
        other = owner.get(_memory(source))
        if other is None or not source.numel() or (other == index and _same(target, source)):
            continue
        raise DonationError(
            f"the result for {tree.path_of(old, index)!r} is memory of the input "
            f"{tree.path_of(old, other)!r}; return a clone of it."
        )


def _memory(tensor: Tensor) -> Any:
    """Return what two tensors that share memory have in common."""
    # a DTensor itself has no memory
    return as_local(tensor).untyped_storage().data_ptr() or id(tensor)


def _same(target: Tensor, source: Tensor) -> bool:
    """Whether both are the same view of their memory."""
    return target is source or (
        target.storage_offset() == source.storage_offset() and target.stride() == source.stride()
    )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether some elements share a place, as in an expanded tensor."""
    sizes: tuple[int, ...] = tensor.shape
    strides: tuple[int, ...] = tensor.stride()
    extent = 0
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size > 1 and stride <= extent:
            return tensor.numel() > 0
        extent += stride * (size - 1)
    return False
