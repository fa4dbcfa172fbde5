"""torch.optim optimizers, thin over the pure functions."""

from shampoo_func.torch_optim.optimizer import FunctionalOptimizer
from shampoo_func.torch_optim.shells import ShampooOptimizer, as_optimizer

__all__ = [
    "FunctionalOptimizer",
    "ShampooOptimizer",
    "as_optimizer",
]
