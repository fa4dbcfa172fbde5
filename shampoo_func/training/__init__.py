"""Around the optimizer: applying updates, donated steps, the refresh clock, sweeps."""

from shampoo_func.training.clock import refresh_due
from shampoo_func.training.donate import donate
from shampoo_func.training.sweep import Sweep, stack_copies, sweep
from shampoo_func.training.updates import apply_updates

__all__ = [
    "Sweep",
    "apply_updates",
    "donate",
    "refresh_due",
    "stack_copies",
    "sweep",
]
