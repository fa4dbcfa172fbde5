"""Shape annotations: jaxtyping where it is installed (tests), plain tensors elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

__all__ = ["Bool", "Float", "Int"]

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ImportError:

        class _Tensor:
            """Stands for `Float[Tensor, "n d"]` and is just a tensor."""

            def __class_getitem__(cls, item: Any) -> type[torch.Tensor]:
                return torch.Tensor

        Bool = Float = Int = _Tensor
