"""Whole optimizers: short sentences over the stages."""

from shampoo_func.recipes.first_order import adagrad, adamw, rmsprop, sgd
from shampoo_func.recipes.shampoo import shampoo

__all__ = ["adagrad", "adamw", "rmsprop", "sgd", "shampoo"]
