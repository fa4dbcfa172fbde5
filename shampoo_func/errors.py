"""Errors that name the parameter, say what was seen, and say what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

__all__ = [
    "ChainError",
    "CheckpointError",
    "DonationError",
    "GradientError",
    "HyperparameterError",
    "MissingParamsError",
    "OptimizerError",
    "ParameterError",
    "PartitionError",
    "PeerError",
    "PlanMismatchError",
    "RefreshError",
    "RootFailureError",
    "ShampooFuncError",
    "ShardingError",
    "TreeMismatchError",
    "UnknownArgumentError",
]


class ShampooFuncError(Exception):
    """Base of every error that this library raises on purpose.

    Example:
        >>> from shampoo_func import clip
        >>> try:
        ...     clip(-1.0)
        ... except ShampooFuncError as error:
        ...     print(error)
        max_value must lie in (0.0, inf], got -1.0.
    """


class HyperparameterError(ShampooFuncError, ValueError):
    """A hyper-parameter is outside its range or of a kind that cannot be used."""


class ParameterError(ShampooFuncError, TypeError):
    """A parameter is not a real, floating, strided tensor."""


class GradientError(ShampooFuncError, TypeError):
    """A gradient is not a real, floating, strided tensor (or None)."""


class TreeMismatchError(ShampooFuncError, ValueError):
    """Two trees that must match differ in structure or in a tensor's shape."""


class MissingParamsError(ShampooFuncError, ValueError):
    """`update` was called without `params` where they are needed."""


class UnknownArgumentError(ShampooFuncError, TypeError):
    """`update` was given an extra argument that no stage declares."""


class ChainError(ShampooFuncError, ValueError):
    """A chain was given the same name twice, or something that is not a stage."""


class PartitionError(ShampooFuncError, ValueError):
    """A parameter has no label, or a label that has no transformation."""


class RefreshError(ShampooFuncError, ValueError):
    """A refresh clock was asked for where there is not exactly one answer."""


class RootFailureError(ShampooFuncError, RuntimeError):
    """Roots or bases of a block could not be computed in too many refreshes in a row."""


class DonationError(ShampooFuncError, RuntimeError):
    """The results of a step cannot be written over its inputs."""


class CheckpointError(ShampooFuncError, ValueError):
    """A saved state does not fit the optimizer that is to take it."""


class OptimizerError(ShampooFuncError, RuntimeError):
    """The torch.optim shell was asked for something that it cannot do now."""


class ShardingError(ShampooFuncError, ValueError):
    """A parameter is stored, or a mesh laid out, in a way that blocks cannot be shared over."""


class PlanMismatchError(ShampooFuncError, RuntimeError):
    """The ranks of a mesh have planned different blocks, owners or transports."""


class PeerError(ShampooFuncError, RuntimeError):
    """A collective failed: another rank has ended, or did not come within the timeout."""


def check_number(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Check a Python number against its range; a tensor passes, its value is never looked at.

    Args:
        name: What the caller calls the hyper-parameter.
        value: A Python number, or a tensor (which may be traced or batched).
        low: Smallest allowed value.
        high: Largest allowed value.
        low_open: Whether `low` itself is excluded.
        high_open: Whether `high` itself is excluded.

    Raises:
        HyperparameterError: If `value` is a number out of range, NaN, or no number at all.
    """
    if isinstance(value, torch.Tensor):
        if value.is_complex() or value.ndim > 0:
            raise HyperparameterError(
                f"{name} must be a number or a real 0-d tensor, got a tensor of shape "
                f"{tuple(value.shape)} and dtype {value.dtype}; index it, or vmap over it."
            )
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise HyperparameterError(
            f"{name} must be a number or a 0-d tensor, got {value!r} of type "
            f"{type(value).__name__}."
        )
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):  # NaN fails both comparisons
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise HyperparameterError(f"{name} must lie in {left}{low}, {high}{right}, got {value!r}.")


def check_count(name: str, value: Any, *, low: int = 1) -> None:
    """Check that `value` is a Python int of at least `low`.

    Raises:
        HyperparameterError: If it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise HyperparameterError(f"{name} must be an int of at least {low}, got {value!r}.")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Check that `value` is one of `choices`.

    Raises:
        HyperparameterError: If it is not; the message lists the choices.
    """
    allowed = list(choices)
    if value not in allowed:
        listed = ", ".join(repr(choice) for choice in allowed)
        raise HyperparameterError(f"{name} must be one of {listed}, got {value!r}.")


def check_dtype(name: str, value: Any) -> None:
    """Check that `value` is None or a real floating-point dtype.

    Raises:
        HyperparameterError: If it is anything else.
    """
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise HyperparameterError(
            f"{name} must be None or a floating-point dtype such as torch.float32, got {value!r}."
        )


def check_extra(stage: str, known: Iterable[str], extra: Mapping[str, Any]) -> None:
    """Check that every extra argument of `update` is one that the stage declares.

    Raises:
        UnknownArgumentError: If an argument is unknown; the message lists the known ones.
    """
    allowed = sorted(known)
    unknown = sorted(set(extra) - set(allowed))
    if unknown:
        takes = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
        raise UnknownArgumentError(
            f"{stage}.update got the extra argument(s) {', '.join(unknown)}, but {takes}. "
            "Remove the argument, or add a stage that declares it in `extras`."
        )
