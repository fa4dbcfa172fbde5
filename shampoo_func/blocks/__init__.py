"""Parameters as stacks of equal-shaped blocks: plan, gather, scatter."""

from shampoo_func.blocks.gather import gather, present_rows, scatter
from shampoo_func.blocks.plan import (
    BlockPlan,
    LeafSpec,
    ParameterPlan,
    Tile,
    merge_small_dims,
    plan_blocks,
    plan_shapes,
)

__all__ = [
    "BlockPlan",
    "LeafSpec",
    "ParameterPlan",
    "Tile",
    "gather",
    "merge_small_dims",
    "plan_blocks",
    "plan_shapes",
    "present_rows",
    "scatter",
]
