"""Different transformations for different parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shampoo_func import tree
from shampoo_func.errors import MissingParamsError, PartitionError
from shampoo_func.transforms.base import Wrapper
from shampoo_func.transforms.scaling import Identity
from shampoo_func.types import Transformation, Tree

__all__ = ["Masked", "Partition", "masked", "partition"]

LabelFunction = Callable[[str, Tensor], str]
LabelTable = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Partition(Transformation):
    """See `partition`."""

    transformations: tuple[tuple[str, Transformation], ...]
    labels: LabelFunction | LabelTable

    @property
    def children(self) -> tuple[Transformation, ...]:
        """The transformations, without their labels."""
        return tuple(inner for _, inner in self.transformations)

    def label(self, path: str, leaf: Tensor | None) -> str:
        """Return the label of one parameter."""
        if isinstance(self.labels, tuple):
            label = _first_match(self.labels, path)
        else:
            if leaf is None:
                raise MissingParamsError(
                    f"the gradient of {path!r} is None, so its label must come from the "
                    "parameter: call update(updates, state, params)."
                )
            label = self.labels(path, leaf)
        known = [name for name, _ in self.transformations]
        if label not in known:
            raise PartitionError(
                f"parameter {path!r} got the label {label!r}, but the transformations are "
                f"labelled {', '.join(known)}; add one, or change the labels."
            )
        return label

    def init(self, params: Tree) -> dict[str, Any]:
        """Return every transformation's state for its own parameters, `{path: tensor}`."""
        tree.check_params(params)
        groups = self._split(params, params)
        return {name: inner.init(groups[name]) for name, inner in self.transformations}

    def update(
        self, updates: Tree, state: dict[str, Any], params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, dict[str, Any]]:
        """Send every parameter's update through its own transformation."""
        self.check_call(params, extra)
        tree.check_updates(updates, params, what="the parameter")
        judged = updates if params is None else params
        groups = self._split(updates, judged)
        param_groups = None if params is None else self._split(params, judged)
        done: dict[str, Any] = {}
        after: dict[str, Any] = {}
        for name, inner in self.transformations:
            known = {key: value for key, value in extra.items() if key in inner.extras}
            own_params = None if param_groups is None else param_groups[name]
            out, after[name] = inner.update(groups[name], state[name], own_params, **known)
            done.update(out)
        _, structure = tree.flatten(updates)
        return tree.unflatten(structure, [done[path] for path in tree.paths(updates)]), after

    def _split(self, values: Tree, judged: Tree) -> dict[str, dict[str, Any]]:
        """Group the leaves of `values` by the label of the same leaf of `judged`."""
        groups: dict[str, dict[str, Any]] = {name: {} for name, _ in self.transformations}
        flat, by = tree.leaves(values), tree.leaves(judged)
        for path, leaf, param in zip(tree.paths(values), flat, by, strict=True):
            groups[self.label(path, param)][path] = leaf
        return groups


def _first_match(table: LabelTable, path: str) -> str:
    for pattern, label in table:
        if re.search(pattern, path):
            return label
    raise PartitionError(
        f"no pattern matches parameter {path!r} (patterns: "
        f"{', '.join(repr(pattern) for pattern, _ in table)}); add ('.*', label) as the last row."
    )


def partition(
    transformations: Mapping[str, Transformation],
    labels: LabelFunction | Sequence[tuple[str, str]],
) -> Partition:
    """Apply a different transformation to each group of parameters.

    Args:
        transformations: One per label. Each sees its parameters as a dict `{path: tensor}`.
        labels: A function of a parameter's dotted path and the parameter, or an ordered table
            of (regular expression, label) searched in the path, whose first match wins.

    Raises:
        PartitionError: If the table is malformed, or (in `init` and `update`) a parameter has
            no label or one without a transformation.

    Example:
        >>> import torch
        >>> from shampoo_func.transforms import scale
        >>> tx = partition(
        ...     {"matrices": scale(2.0), "rest": scale(3.0)},
        ...     lambda path, leaf: "matrices" if leaf.ndim == 2 else "rest",
        ... )
        >>> params = {"bias": torch.ones(1), "weight": torch.ones(1, 1)}
        >>> tx.update(params, tx.init(params))[0]
        {'bias': tensor([3.]), 'weight': tensor([[2.]])}
    """
    for name, inner in transformations.items():
        if not isinstance(inner, Transformation):
            raise PartitionError(f"the label {name!r} needs a transformation, got {inner!r}.")
    if callable(labels):
        return Partition(tuple(transformations.items()), labels)
    table = tuple((pattern, label) for pattern, label in labels)
    for pattern, label in table:
        if label not in transformations:
            raise PartitionError(
                f"the pattern {pattern!r} has the label {label!r}, which no transformation has; "
                f"the labels are {', '.join(transformations)}."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise PartitionError(
                f"{pattern!r} is no regular expression: {error}. Escape its special characters."
            ) from error
    return Partition(tuple(transformations.items()), table)


@dataclass(frozen=True, slots=True)
class Masked(Wrapper):
    """See `masked`."""

    inner: Transformation
    where: Callable[[str, Tensor], bool] | None = None
    mask: Tree | None = None

    def init(self, params: Tree) -> Any:
        """Return the inner state for the chosen parameters."""
        return self._partition(params).init(params)["chosen"]

    def update(
        self, updates: Tree, state: Any, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, Any]:
        """Transform the chosen updates and pass the others on."""
        self.check_call(params, extra)
        whole = self._partition(updates if params is None else params)
        both = {"chosen": state, "rest": ()}
        updates, after = whole.update(updates, both, params, **extra)
        return updates, after["chosen"]

    def _partition(self, judged: Tree) -> Partition:
        """Return the partition into chosen parameters and the rest."""
        labels: Any = self._label
        if self.mask is not None:
            _, structure = tree.flatten(judged)
            flags = tree.flatten_up_to(structure, self.mask, judged)
            table = dict(zip(tree.paths(judged), flags, strict=True))
            labels = tuple(
                (f"^{re.escape(path)}$", "chosen" if flag else "rest")
                for path, flag in table.items()
            )
        return Partition((("chosen", self.inner), ("rest", Identity())), labels)

    def _label(self, path: str, leaf: Tensor) -> str:
        return "chosen" if self.where is not None and self.where(path, leaf) else "rest"


def masked(
    inner: Transformation,
    *,
    where: Callable[[str, Tensor], bool] | None = None,
    mask: Tree | None = None,
) -> Masked:
    """Apply a transformation to some parameters and pass the updates of others through.

    Args:
        inner: The transformation; it sees the chosen parameters as a dict `{path: tensor}`.
        where: A predicate on a parameter's dotted path and the parameter.
        mask: Instead of `where`, a tree of bools of the parameters' structure.

    Raises:
        PartitionError: If not exactly one of `where` and `mask` is given.

    Example:
        >>> import torch
        >>> from shampoo_func.transforms import scale
        >>> tx = masked(scale(2.0), where=lambda path, leaf: "bias" not in path)
        >>> params = {"bias": torch.ones(1), "weight": torch.ones(1)}
        >>> tx.update(params, tx.init(params))[0]
        {'bias': tensor([1.]), 'weight': tensor([2.])}
    """
    if (where is None) == (mask is None):
        raise PartitionError(
            "masked takes exactly one of where= (a predicate on path and tensor) and mask= "
            "(a tree of bools)."
        )
    if where is not None and not callable(where):
        raise PartitionError(f"where must be a function, got {where!r}; pass a tree as mask=.")
    if not isinstance(inner, Transformation):
        raise PartitionError(f"masked needs a transformation, got {inner!r}.")
    return Masked(inner, where, mask)
