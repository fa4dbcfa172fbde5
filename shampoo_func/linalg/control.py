"""Doing dear work only for the matrices that need it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, maybe_current_level

from shampoo_func.linalg.constant import constant_result

__all__ = ["choose", "compute_where", "is_recorded", "is_transformed"]

Tensors = tuple[Tensor, ...]


def choose(flags: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return `new` where the flag of its leading dimensions is set, else `old`.

    Args:
        flags: bool `[*batch]`.
        new: `[*batch, ...]`.
        old: The same shape.

    Example:
        >>> choose(torch.tensor([True, False]), torch.ones(2, 2), torch.zeros(2, 2))
        tensor([[1., 1.],
                [0., 0.]])
    """
    if new is old:
        return old
    return torch.where(flags.reshape(flags.shape + (1,) * (new.ndim - flags.ndim)), new, old)


def compute_where(
    flags: Tensor, compute: Callable[..., Tensors], operands: Tensors, fallback: Tensors
) -> Tensors:
    """Return `compute(*operands)` for the matrices that are flagged, else `fallback`.

    Eager code computes the flagged matrices alone; a compiled graph computes all or none
    (`torch.cond`); under `torch.func.vmap` all are computed.

    Args:
        flags: bool `[*batch]`.
        compute: Pure, from stacks to stacks, each matrix by itself.
        operands: Stacks with the leading dimensions of `flags`.
        fallback: Stacks shaped as the results.

    Example:
        >>> flags, x = torch.tensor([True, False]), torch.tensor([[4.0], [9.0]])
        >>> compute_where(flags, lambda x: (x.sqrt(),), (x,), (x,))
        (tensor([[2.],
                [9.]]),)
    """
    if torch.compiler.is_compiling():
        return _in_graph(flags, compute, operands, fallback)
    if is_batchedtensor(flags):
        return _chosen(flags, compute(*operands), fallback)
    if flags.ndim != 1:
        return _chosen(flags, compute(*operands), fallback) if bool(flags.any()) else fallback
    rows = flags.nonzero()[:, 0]
    if rows.numel() in (0, flags.numel()):  # none or all: nothing to pick and put back
        return compute(*operands) if rows.numel() else fallback
    results = compute(*(operand[rows] for operand in operands))
    return tuple(
        whole.index_copy(0, rows, part) for whole, part in zip(fallback, results, strict=True)
    )


def _in_graph(
    flags: Tensor, compute: Callable[..., Tensors], operands: Tensors, fallback: Tensors
) -> Tensors:
    given = len(operands)

    def taken(flags: Tensor, *tensors: Tensor) -> Tensors:
        chosen = _chosen(flags, compute(*tensors[:given]), tensors[given:])
        return tuple(_own(tensor) for tensor in chosen)

    def kept(flags: Tensor, *tensors: Tensor) -> Tensors:
        return tuple(_own(tensor) for tensor in tensors[given:])

    result: Tensors = torch.cond(flags.any(), taken, kept, (flags, *operands, *fallback))
    return tuple(result)


def _own(tensor: Tensor) -> Tensor:
    """Return a copy with the usual strides.

    torch.cond forbids outputs that alias inputs, and strides that differ between its branches,
    as those of a 1 x 1 matrix can.
    """
    return tensor.clone(memory_format=torch.contiguous_format)


def _chosen(flags: Tensor, new: Tensors, old: Tensors) -> Tensors:
    return tuple(choose(flags, *pair) for pair in zip(new, old, strict=True))


@constant_result  # known when a graph is traced, and guarded by Dynamo
def is_transformed() -> bool:
    """Whether the call is inside of a transform of torch.func: vmap, grad, jvp.

    Example:
        >>> is_transformed(), torch.vmap(lambda x: x + is_transformed())(torch.zeros(1))
        (False, tensor([1.]))
    """
    return maybe_current_level() is not None


def is_recorded(*tensors: Tensor) -> bool:
    """Whether autograd takes notes of what is done with one of the tensors.

    Example:
        >>> is_recorded(torch.ones(1)), is_recorded(torch.ones(1, requires_grad=True))
        (False, True)
    """
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
