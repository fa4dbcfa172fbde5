"""Shape annotations: jaxtyping where its hook checks them (tests), plain tensors elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

__all__ = ["Bool", "Float", "Int"]

if TYPE_CHECKING or "jaxtyping" in sys.modules:  # its hook was imported first; else spare the time
    from jaxtyping import Bool, Float, Int
else:

    class _Tensor:
        """Stands for `Float[Tensor, "n d"]` and is just a tensor."""

        def __class_getitem__(cls, item: Any) -> type[torch.Tensor]:
            return torch.Tensor

    Bool = Float = Int = _Tensor
