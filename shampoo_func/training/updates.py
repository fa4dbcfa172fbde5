"""Adding updates to parameters."""

from __future__ import annotations

from torch import Tensor

from shampoo_func import tree
from shampoo_func.types import Tree

__all__ = ["apply_updates"]


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Return `params + updates`, each in its parameter's dtype; None leaves a parameter alone.

    Args:
        params: The parameters; they are not changed.
        updates: What `update` returned: same structure and shapes, None allowed.

    Raises:
        ParameterError: If a parameter is no real floating tensor.
        TreeMismatchError: If structure or a shape differs.

    Example:
        >>> import torch
        >>> apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([0.5, -0.5])})["w"]
        tensor([1.5000, 0.5000])
    """
    tree.check_params(params)
    tree.check_updates(updates, params, what="the parameter")

    def add(param: Tensor, update: Tensor) -> Tensor:
        return (param + update).to(param.dtype)

    return tree.advance(add, params, updates)
