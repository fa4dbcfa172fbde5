"""What a block costs its owner: time to refresh, or bytes to keep."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from shampoo_func.errors import check_count

__all__ = ["ByteCost", "Cost", "CubicCost", "byte_cost", "cubic_cost"]


class Cost(ABC):
    """What owners are balanced by: a frozen value that prices a block by its shape.

    Example:
        >>> @dataclass(frozen=True, slots=True)
        ... class Elements(Cost):
        ...     def of(self, shape, itemsize):
        ...         return float(math.prod(shape))
        >>> Elements().of((4, 2), 8)
        8.0
    """

    __slots__ = ()

    @abstractmethod
    def of(self, shape: tuple[int, ...], itemsize: int) -> float:
        """Return the cost of one block.

        Args:
            shape: The block's shape.
            itemsize: Bytes per element.
        """


@dataclass(frozen=True, slots=True)
class CubicCost(Cost):
    """See `cubic_cost`."""

    def of(self, shape: tuple[int, ...], itemsize: int) -> float:
        """Return the sum of the cubes of the sizes."""
        return float(sum(size**3 for size in shape))


@dataclass(frozen=True, slots=True)
class ByteCost(Cost):
    """See `byte_cost`."""

    matrices: int = 2

    def of(self, shape: tuple[int, ...], itemsize: int) -> float:
        """Return the bytes of the block and of its square matrices."""
        squares = sum(size * size for size in shape)
        return float(itemsize * (math.prod(shape) + self.matrices * squares))


def cubic_cost() -> CubicCost:
    """Time: d1^3 + ... + dk^3, what roots and eigenbases of a block's factors take.

    Source: arXiv 2309.06497, section 4 (balance by the cost of the computation).

    Example:
        >>> cubic_cost().of((2, 3), 4)
        35.0
    """
    return CubicCost()


def byte_cost(matrices: int = 2) -> ByteCost:
    """Memory: the bytes of a block and of `matrices` square matrices per dimension.

    b (d1 ... dk + matrices (d1^2 + ... + dk^2)) with b bytes per element.

    Args:
        matrices: How many per dimension: 2 for factors and roots, 0 for the block alone
            (what is sent).

    Raises:
        HyperparameterError: If it is no int of at least 0.

    Example:
        >>> byte_cost().of((2, 3), 4), byte_cost(0).of((2, 3), 4)
        (128.0, 24.0)
    """
    check_count("matrices", matrices, low=0)
    return ByteCost(matrices)
