"""Optimizer states as flat dicts of named tensors and as checkpoints in folders, and back."""

from shampoo_func.checkpoint.background import save_checkpoint_async
from shampoo_func.checkpoint.contents import Checkpoint
from shampoo_func.checkpoint.entries import Entry, named_entries
from shampoo_func.checkpoint.files import load_checkpoint, save_checkpoint
from shampoo_func.checkpoint.fitting import fill
from shampoo_func.checkpoint.flat import (
    carried_over,
    first_state,
    from_state_dict,
    to_state_dict,
)
from shampoo_func.checkpoint.steps import checkpoint_path, latest_checkpoint

__all__ = [
    "Checkpoint",
    "Entry",
    "carried_over",
    "checkpoint_path",
    "fill",
    "first_state",
    "from_state_dict",
    "latest_checkpoint",
    "load_checkpoint",
    "named_entries",
    "save_checkpoint",
    "save_checkpoint_async",
    "to_state_dict",
]
