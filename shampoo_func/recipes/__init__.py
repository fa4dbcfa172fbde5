"""Whole optimizers: short sentences over the stages."""

from shampoo_func.recipes.first_order import adagrad, adamw, rmsprop, sgd
from shampoo_func.recipes.muon import muon, sign_sgd, spectral_descent
from shampoo_func.recipes.shampoo import shampoo

__all__ = [
    "adagrad",
    "adamw",
    "muon",
    "rmsprop",
    "sgd",
    "shampoo",
    "sign_sgd",
    "spectral_descent",
]
