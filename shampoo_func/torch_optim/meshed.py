"""A recipe whose transformations share their blocks on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shampoo_func.sharding import Sharding
from shampoo_func.transforms import with_sharding
from shampoo_func.types import Transformation

__all__ = ["OnMesh"]


@dataclass(frozen=True, slots=True)
class OnMesh:
    """Builds what `factory` builds, on a mesh.

    The mesh is looked at once, before anything is compiled; building is done in every graph.
    """

    factory: Callable[..., Transformation]
    sharding: Sharding

    def __call__(self, **options: Any) -> Transformation:
        """Return the transformation with these options."""
        return with_sharding(self.factory(**options), lambda stage: self.sharding)
