"""Inverse root solvers: batched functions of symmetric positive semi-definite matrices."""

from shampoo_func.linalg.roots.eigh_root import EighRoot, PseudoInverse, eigh_root

__all__ = ["EighRoot", "PseudoInverse", "eigh_root"]
