"""Whole optimizers: short sentences over the stages."""

from shampoo_func.recipes.first_order import adagrad, adamw, rmsprop, sgd
from shampoo_func.recipes.kl_shampoo import kl_shampoo
from shampoo_func.recipes.muon import muon, sign_sgd, spectral_descent
from shampoo_func.recipes.shampoo import shampoo
from shampoo_func.recipes.soap import kl_soap, soap

__all__ = [
    "adagrad",
    "adamw",
    "kl_shampoo",
    "kl_soap",
    "muon",
    "rmsprop",
    "sgd",
    "shampoo",
    "sign_sgd",
    "soap",
    "spectral_descent",
]
