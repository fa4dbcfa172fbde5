"""Optimizer states as flat dicts of named tensors, and back."""

from shampoo_func.checkpoint.entries import Entry, named_entries
from shampoo_func.checkpoint.flat import (
    carried_over,
    fill,
    first_state,
    from_state_dict,
    to_state_dict,
)

__all__ = [
    "Entry",
    "carried_over",
    "fill",
    "first_state",
    "from_state_dict",
    "named_entries",
    "to_state_dict",
]
