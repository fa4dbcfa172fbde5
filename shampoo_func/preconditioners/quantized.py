"""Another preconditioner's state in fewer bytes: codes between steps, numbers inside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from shampoo_func.codecs import ROLES, Codec
from shampoo_func.errors import HyperparameterError
from shampoo_func.preconditioners.leaves import map_leaves
from shampoo_func.types import Preconditioner

__all__ = ["Encoded", "Quantized", "quantized"]


class Encoded(NamedTuple):
    """Stands in the place of a leaf. code: what its codec made of it, a NamedTuple of tensors."""

    code: Any


@dataclass(frozen=True, slots=True)
class Quantized(Preconditioner):
    """See `quantized`."""

    inner: Preconditioner
    codecs: tuple[tuple[str, Codec], ...]

    def init(self, block: Tensor) -> Any:
        """Return the inner state of one block with codes in the place of leaves."""
        state = self.inner.init(block)
        return self._encoded(state, self.inner.roles(state))

    def accumulate(self, state: Any, grads: Tensor) -> Any:
        """Decode what is read, take in the gradient, encode what has changed."""
        return self._changed("accumulate", state, lambda own: self.inner.accumulate(own, grads))

    def refresh(self, state: Any) -> Any:
        """Decode what is read, recompute, encode what has changed."""
        return self._changed("refresh", state, self.inner.refresh)

    def correct(self, state: Any, grads: Tensor) -> Any:
        """Decode what is read, take in the gradient, encode what has changed."""
        if type(self.inner).correct is Preconditioner.correct:
            return state  # the default does nothing, so nothing need be decoded for it
        return self._changed("correct", state, lambda own: self.inner.correct(own, grads))

    def apply(self, state: Any, updates: Tensor) -> Tensor:
        """Decode what is read, and precondition."""
        roles = self.inner.roles(state)
        return self.inner.apply(self._decoded(state, roles, self.inner.reads("apply")), updates)

    @property
    def refreshes(self) -> bool:
        """Whether the inner one has anything to recompute."""
        return self.inner.refreshes

    def block_shape(self, state: Any) -> tuple[int | None, ...] | None:
        """Return what the inner one says; shapes need no data."""
        return self.inner.block_shape(self._decoded(state, self.inner.roles(state), frozenset()))

    def roles(self, state: Any) -> Any:
        """Return the inner roles; the tensors of a code have that of their leaf, and " code"."""

        def name(leaf: Any, role: Any) -> Any:
            codec = self._codec(role)
            return role if codec is None else _everywhere(leaf, f"{_name(role)} code")

        return _map(name, state, self.inner.roles(state))

    def reads(self, function: str) -> frozenset[str] | None:
        """Return what the inner one reads, as it is called outside."""
        roles = self.inner.reads(function)
        return None if roles is None else roles | {f"{role} code" for role in roles}

    def with_tolerance(self, tolerance: float) -> Preconditioner | None:
        """Wrap what the inner one returns."""
        inner = self.inner.with_tolerance(tolerance)
        return None if inner is None else replace(self, inner=inner)

    def _codec(self, role: Any) -> Codec | None:
        """Return the codec of a leaf of the state, or None if it is kept as it is."""
        return dict(self.codecs).get(_name(role))

    def _changed(self, function: str, state: Any, run: Callable[[Any], Any]) -> Any:
        """Run a function of the inner one on decoded leaves; keep the codes of the others."""
        roles = self.inner.roles(state)
        before = self._decoded(state, roles, self.inner.reads(function))
        return self._encoded(run(before), roles, before, state)

    def _decoded(self, state: Any, roles: Any, read: frozenset[str] | None) -> Any:
        """Return the inner state; what is not read has a shape, a dtype, and no data."""

        def decode(leaf: Any, role: Any) -> Any:
            codec = self._codec(role)
            if codec is None:
                return leaf
            wanted = read is None or _name(role) in read
            return codec.decode(leaf.code) if wanted else codec.like(leaf.code)

        return _map(decode, state, roles)

    def _encoded(self, state: Any, roles: Any, *before: Any) -> Any:
        """Return the state with codes in it.

        `before` are the decoded and the encoded state that it came from: a leaf that is still
        the same object keeps its code, since rounding it again would cost time and let it drift.
        """

        def encode(leaf: Any, role: Any, decoded: Any = None, old: Any = None) -> Any:
            codec = self._codec(role)
            if codec is None:
                return leaf
            if leaf is decoded:
                return old
            return Encoded(codec.encode(leaf, None if old is None else old.code))

        return _map(encode, state, roles, *before)


def _map(function: Callable[..., Any], node: Any, *others: Any) -> Any:
    """Apply a function to the leaves of a state, tensors and codes, and what stands beside them."""
    return map_leaves(function, node, *others, leaf=(Tensor, Encoded))


def _everywhere(node: Any, role: str) -> Any:
    """Return a code with the role in the place of every tensor."""
    return role if isinstance(node, Tensor) else type(node)(*(_everywhere(n, role) for n in node))


def _name(role: Any) -> str:
    """Return the one role that stands beside a leaf, or in all places of a code."""
    while not isinstance(role, str):
        role = role[0]
    return role


def quantized(inner: Preconditioner, codec: Codec | Mapping[str, Codec]) -> Quantized:
    """Store a preconditioner's state by codecs between its steps.

    The state is that of `inner` with codes in the place of leaves, chosen by the role that
    `inner.roles` gives them. Each function decodes the leaves that it reads, and encodes those
    that it has changed; a leaf that nothing has changed keeps its code, bit for bit.

    Args:
        inner: `kronecker()`, `graft(...)`, `second_moment()`, or one of your own.
        codec: One codec, for every role that it serves, or codecs by role: "factor", "root",
            "basis", "eigenvalues", "second_moment", "momentum". What has no codec stays as it
            is.

    Raises:
        HyperparameterError: If an argument is of the wrong kind, or a codec does not serve the
            role that it is given for.

    Source: arXiv 2405.18144 (what is computed in full is stored in few bits).

    Example:
        >>> import torch
        >>> from shampoo_func.codecs import eight_bit, symmetric_packing
        >>> from shampoo_func.preconditioners import kronecker
        >>> tx = quantized(kronecker(), {"factor": symmetric_packing(), "root": eight_bit()})
        >>> state = tx.init(torch.zeros(4, 4))
        >>> state.factors[0].code.triangle.shape, state.roots[0].code.byte.dtype
        (torch.Size([10]), torch.int8)
    """
    if not isinstance(inner, Preconditioner):
        raise HyperparameterError(
            f"quantized needs a preconditioner such as kronecker(), got {inner!r}."
        )
    if isinstance(codec, Codec):
        return Quantized(inner, _checked(dict.fromkeys(codec.roles, codec)))
    if not isinstance(codec, Mapping):
        raise HyperparameterError(
            "codec must be a codec such as symmetric_packing(), or a mapping from roles to "
            f"codecs, got {codec!r}."
        )
    return Quantized(inner, _checked(codec))


def _checked(codecs: Mapping[str, Codec]) -> tuple[tuple[str, Codec], ...]:
    """Return the codecs as a tuple by role, each in its form for the role."""
    for role, codec in codecs.items():
        if role not in ROLES:
            raise HyperparameterError(
                f"there is no role {role!r}; use one of {', '.join(sorted(ROLES))}."
            )
        if not isinstance(codec, Codec):
            raise HyperparameterError(
                f"the codec for {role!r} must be one such as eight_bit(), got {codec!r}."
            )
    return tuple((role, codecs[role].for_role(role)) for role in sorted(codecs))
