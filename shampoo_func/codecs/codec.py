"""What every codec is: two pure functions, and the roles it is fit for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from shampoo_func.errors import HyperparameterError
from shampoo_func.linalg._shapes import Float

__all__ = ["GENERAL", "ROLES", "SYMMETRIC", "Codec"]

SYMMETRIC = frozenset({"factor", "root"})
"""Roles of symmetric positive semi-definite matrices."""

GENERAL = frozenset({"basis", "eigenvalues", "second_moment", "momentum"})
"""Roles of all other leaves that may be stored in another form."""

ROLES = SYMMETRIC | GENERAL
"""Every role that a codec may serve; what has none of them ("other") is stored as it is."""


class Codec(ABC):
    """Two pure functions, `encode` and `decode`, with settings as frozen fields.

    Subclasses are frozen slotted dataclasses. A code is a NamedTuple of tensors that all have
    the leading dimensions of the value, so that a block is a row of a code as it is of a state.
    `decode` gives the shape, dtype and strides of what was encoded. Neither looks at a tensor's
    value on the host, and no codec hides a NaN or an infinity: what cannot be stored decodes to
    something that is not finite.

    Example:
        >>> from dataclasses import dataclass
        >>> from typing import NamedTuple
        >>> class HalfCode(NamedTuple):
        ...     half: torch.Tensor
        >>> @dataclass(frozen=True, slots=True)
        ... class Half(Codec):
        ...     @property
        ...     def roles(self):
        ...         return frozenset({"momentum"})
        ...
        ...     def encode(self, value, previous=None):
        ...         return HalfCode(value.half())
        ...
        ...     def decode(self, code):
        ...         return code.half.float()
        >>> codec = Half()
        >>> codec.decode(codec.encode(torch.ones(2))).dtype
        torch.float32
    """

    __slots__ = ()

    @property
    @abstractmethod
    def roles(self) -> frozenset[str]:
        """The roles that this codec serves."""

    @abstractmethod
    def encode(self, value: Float[Tensor, "*shape"], previous: Any = None) -> Any:
        """Return the code of a value.

        Args:
            value: A matrix or a stack of them for a symmetric role. For others one block, or,
                if `previous` is given, as many blocks as it is the code of.
            previous: The code that this one replaces, for codecs that learn from it.
        """

    @abstractmethod
    def decode(self, code: Any) -> Float[Tensor, "*shape"]:
        """Return the value of a code."""

    def like(self, code: Any) -> Tensor:
        """Return a tensor without data (device "meta") shaped as the decoded value."""
        return torch.empty_like(self.decode(code), device="meta")

    def for_role(self, role: str) -> Codec:
        """Return the codec to use for a role.

        Raises:
            HyperparameterError: If this one does not serve it.
        """
        if role not in self.roles:
            raise HyperparameterError(
                f"{self!r} does not serve the role {role!r}; use another codec for it, or leave it "
                f"out. This one serves {', '.join(sorted(self.roles))}."
            )
        return self
