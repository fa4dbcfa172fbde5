"""The two protocols: a transformation is two pure functions, a preconditioner four."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from shampoo_func.errors import MissingParamsError, check_extra

__all__ = [
    "EmptyState",
    "Preconditioner",
    "RefreshPolicy",
    "Scalar",
    "Schedule",
    "Transformation",
    "Tree",
    "named_roles",
]

Tree = Any
"""A pytree of tensors: nested dicts, lists, tuples, NamedTuples and OrderedDicts."""

Scalar = float | torch.Tensor
"""A Python number or a 0-d tensor; tensors may be swept, differentiated, and changed freely."""

Schedule = Callable[[Any], Any]
"""A function from a step (int or integer tensor, 0 at the first update) to a value."""


class EmptyState(NamedTuple):
    """The state of a stage that remembers nothing."""


class RefreshPolicy(ABC):
    """When blocks are refreshed, and which; a frozen value.

    `due` answers for a loop on the host. It may be asked with an int or with an integer tensor.

    Example:
        >>> from shampoo_func.transforms import every
        >>> policy = every(10, start=15)
        >>> [step for step in range(1, 41) if policy.due(step)]
        [15, 20, 30, 40]
    """

    __slots__ = ()

    calls: int
    """Calls of `update` per update of the stage (more than one under `accumulate`)."""

    start: float
    """The first update that refreshes anything; `math.inf` for never."""

    @abstractmethod
    def due_at(self, step: Any) -> Any:
        """Whether update number `step` of the stage, from 1, refreshes anything."""

    def due(self, step: Any) -> Any:
        """Whether call number `step` of `update`, from 1, refreshes anything."""
        return (step % self.calls == 0) & self.due_at(step // self.calls)


class Transformation(ABC):
    """Two pure functions, `init` and `update`, with hyper-parameters as frozen fields.

    Subclasses are frozen slotted dataclasses. A subclass that wraps others lists them in
    `children`; what it needs and takes then follows from them.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, slots=True)
        ... class Negate(Transformation):
        ...     def init(self, params):
        ...         return EmptyState()
        ...
        ...     def update(self, updates, state, params=None, **extra):
        ...         self.check_call(params, extra)
        ...         return tree.map(torch.neg, updates), state
        >>> from shampoo_func import tree
        >>> Negate().update({"w": torch.ones(2)}, EmptyState())[0]["w"]
        tensor([-1., -1.])
    """

    __slots__ = ()

    @abstractmethod
    def init(self, params: Tree) -> Any:
        """Return the state for `params`: NamedTuples and dicts of tensors."""

    @abstractmethod
    def update(
        self, updates: Tree, state: Any, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, Any]:
        """Return the transformed updates and the next state; change nothing in place."""

    @property
    def name(self) -> str:
        """The name under which `chain` keeps this stage's state."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def children(self) -> tuple[Transformation, ...]:
        """The transformations that this one wraps."""
        return ()

    @property
    def extras(self) -> frozenset[str]:
        """The extra keyword arguments that `update` understands."""
        return frozenset().union(*(child.extras for child in self.children))

    @property
    def needs_params(self) -> bool:
        """Whether `update` must be given `params`."""
        return any(child.needs_params for child in self.children)

    @property
    def refresh_policies(self) -> frozenset[RefreshPolicy]:
        """The refresh policies of the stages inside, for a clock on the host."""
        return frozenset().union(*(child.refresh_policies for child in self.children))

    def check_call(self, params: Tree | None, extra: dict[str, Any]) -> None:
        """Check the arguments of `update` that are no trees, before any work.

        Raises:
            UnknownArgumentError: If `extra` holds an argument that nobody declares.
            MissingParamsError: If `params` is None but needed.
        """
        check_extra(self.name, self.extras, extra)
        if params is None and self.needs_params:
            raise MissingParamsError(
                f"{self.name} needs the parameters (for weight decay, for instance): call "
                "update(updates, state, params)."
            )


class Preconditioner(ABC):
    """Four pure functions on blocks, with different costs and different clocks.

    `init` sees one block `[d1, ..., dk]`. The other three see a block or a stack of them with
    leading batch dimensions, `[n, d1, ..., dk]`; every leaf of the state then has the same
    leading dimensions.

    A preconditioner that keeps statistics in a basis that `refresh` changes has a fifth,
    `correct`, which takes in the raw gradient after the refresh.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, slots=True)
        ... class Sign(Preconditioner):
        ...     def init(self, block):
        ...         return EmptyState()
        ...
        ...     def accumulate(self, state, grads):
        ...         return state
        ...
        ...     def refresh(self, state):
        ...         return state
        ...
        ...     def apply(self, state, updates):
        ...         return updates.sign()
        >>> from shampoo_func.transforms import precondition
        >>> tx = precondition(Sign())
        >>> tx.update(torch.tensor([3.0, -4.0]), tx.init(torch.zeros(2)))[0]
        tensor([ 1., -1.])
    """

    __slots__ = ()

    @abstractmethod
    def init(self, block: torch.Tensor) -> Any:
        """Return the state of one block."""

    @abstractmethod
    def accumulate(self, state: Any, grads: torch.Tensor) -> Any:
        """Take a raw gradient into the statistics: cheap, every step."""

    @abstractmethod
    def refresh(self, state: Any) -> Any:
        """Recompute what is derived from the statistics: dear, every few steps.

        The statistics themselves, leaves of the role "factor", stay as they are.
        """

    def correct(self, state: Any, grads: torch.Tensor) -> Any:
        """Take a raw gradient into what is kept in the refreshed basis: every step."""
        return state

    @abstractmethod
    def apply(self, state: Any, updates: torch.Tensor) -> torch.Tensor:
        """Precondition the (filtered) gradient: every step."""

    @property
    def refreshes(self) -> bool:
        """Whether `refresh` does anything, so that a clock is needed."""
        return True

    def starts_as_identity(self, dtype: torch.dtype) -> bool:
        """Whether `apply` changes no bit of updates of this dtype before the first refresh."""
        return False

    def block_shape(self, state: Any) -> tuple[int | None, ...] | None:
        """Return the shape of the gradients that a state is for; None where any would do."""
        return None

    def roles(self, state: Any) -> Any:
        """Return the state's tree with a role in the place of every leaf.

        Roles say what a leaf is, for codecs and reports: "factor", "root" (both symmetric),
        "basis" (eigenvectors), "eigenvalues", "second_moment", "momentum", or "other".
        """
        return named_roles(state, {})

    def reads(self, function: str) -> frozenset[str] | None:
        """Return the roles of the leaves that "accumulate", "refresh", "correct" or "apply" reads.

        None means all of them. What a function does not read it must pass on as it is; it may
        look at its shape. `quantized` decodes nothing else.
        """
        return None

    def with_tolerance(self, tolerance: float) -> Preconditioner | None:
        """Return one that recomputes only bases that are off by more, or None if it has none.

        A basis Q of a factor A is off by |B - diag B| / |B|, B = Q^T A Q.
        """
        return None


def named_roles(state: Any, roles: dict[str, str]) -> Any:
    """Return a NamedTuple state with, for every leaf, the role of its field ("other" if none)."""

    def fill(node: Any, role: str) -> Any:
        if isinstance(node, torch.Tensor):
            return role
        if hasattr(node, "_fields"):
            return type(node)(*(fill(child, role) for child in node))
        if isinstance(node, tuple):
            return tuple(fill(child, role) for child in node)
        return {key: fill(child, role) for key, child in node.items()}

    if not hasattr(state, "_fields"):
        return fill(state, "other")
    return type(state)(
        *(
            fill(child, roles.get(field, "other"))
            for field, child in zip(state._fields, state, strict=True)
        )
    )
