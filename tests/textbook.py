"""Shampoo as a textbook would write it: float64, one block at a time, plain loops.

This module is the second opinion of the test suite. It was written from the description of the
reference implementation (Distributed Shampoo, facebookresearch/optimizers) and shares nothing with
`shampoo_func`: no stacks, no trees, no torch, and LAPACK is reached through numpy. All scalars are
exact float64, where the reference keeps learning rates and bias corrections in float32.

One step of one block ``W`` with gradient ``g`` at time ``t = 1, 2, ...``::

    g  <- g + wd W                                            (weight decay of kind "l2" only)
    A_i <- beta2 A_i + (1 - beta2) g_(i) g_(i)^T              (sum if beta2 = 1), every dimension i
    X_i <- (A_i / (1 - beta2^t))^(-e_i), e_i = 1 / (2 k)      (refresh steps only)
    V  <- beta2_g V + (1 - beta2_g) g^2                       (grafting)
    f  <- (beta3 m + (1 - beta3) g) / (1 - beta3 beta1^(t-1)),  m <- beta1 m + (1 - beta1) g
    D  <- f x_1 X_1 ... x_k X_k,  D <- D |graft(f)| / |D|
    D  <- D + alpha W                                         (the other kinds of weight decay)
    M  <- mu M + (1 - damp) D,  D <- M  or  (1 - damp) D + mu M
    W  <- W - lr D
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Shape = tuple[int, ...]
Exponents = Mapping[int, float | Mapping[int, float]]


@dataclass(frozen=True, kw_only=True)
class Grafting:
    """The second moment whose norm a grafted direction takes.

    Attributes:
        kind: "sgd" takes the norm of the filtered gradient itself, "adagrad" sums squares,
            "rmsprop" averages them, "adam" averages them with bias correction.
        beta2: Decay of the average ("rmsprop" and "adam"), below 1.
        epsilon: Added to the square root.
    """

    kind: Literal["sgd", "adagrad", "rmsprop", "adam"]
    beta2: float = 0.999
    epsilon: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that shapes a step; the defaults are the reference's.

    Attributes:
        beta1: Decay of the gradient filter; 0.0 means no filter.
        beta2: Decay of the factors; 1.0 means the AdaGrad sum.
        beta3: Filter coefficient for the current direction only; None means `beta1`.
        epsilon: Matrix damping, and the floor of the trace in trace scaling.
        weight_decay: Coefficient `wd`.
        weight_decay_kind: See `decay_coefficient`.
        peak_learning_rate: Scale of the kinds "corrected" and "independent".
        momentum: `mu`; 0.0 means no momentum.
        dampening: `damp`.
        nesterov: Whether the direction looks ahead of the momentum.
        block_size: Threshold for merging and largest side of a block.
        merge_dims: False keeps the shape as it is, dimensions of size 1 included.
        refresh_every: Period of the roots.
        start: First preconditioned step; None means `refresh_every`, infinity means never.
        grafting: None applies the preconditioned direction unscaled.
        exponents: `{order: e}` or `{order: {dimension: e}}`; the default is `1 / (2 * order)`.
        bias_correction: Governs the filter and the factors, not the grafting.
        trace_exponent: `A <- A * max(tr A, epsilon)^(-trace_exponent)` before the root.
        stability: What keeps the eigenvalues positive, see `inverse_power`.
        rank_atol: Absolute cutoff of the pseudo-inverse.
        rank_rtol: Relative cutoff of the pseudo-inverse.
    """

    beta1: float = 0.9
    beta2: float = 1.0
    beta3: float | None = None
    epsilon: float = 1e-12
    weight_decay: float = 0.0
    weight_decay_kind: Literal["l2", "decoupled", "corrected", "independent"] = "decoupled"
    peak_learning_rate: float = 1e-2
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    block_size: float = 1024
    merge_dims: bool = True
    refresh_every: int = 1
    start: float | None = None
    grafting: Grafting | None = None
    exponents: Exponents = field(default_factory=dict)
    bias_correction: bool = True
    trace_exponent: float | None = None
    stability: Literal["before", "after", "pseudo_inverse"] = "before"
    rank_atol: float = 0.0
    rank_rtol: float = 0.0

    @property
    def first_step(self) -> float:
        """The step of the first refresh."""
        return self.refresh_every if self.start is None else self.start

    def refreshes(self, step: int) -> bool:
        """Whether the roots are recomputed at `step`, counted from 1."""
        periodic = step % self.refresh_every == 0 and step > self.first_step
        return periodic or step == self.first_step


def merged_shape(shape: Shape, block_size: float, merge_dims: bool) -> Shape:
    """Merges neighbouring dimensions, from the last, while their product fits in a block.

    Args:
        shape: Shape of a parameter.
        block_size: Largest merged dimension.
        merge_dims: False returns the shape unchanged.

    Returns:
        The shape that is cut into blocks; a single number has shape `(1,)`.
    """
    if not merge_dims:
        return shape
    backwards = [size for size in reversed(shape) if size != 1] or [1]
    merged = backwards[:1]
    for size in backwards[1:]:
        if merged[-1] * size <= block_size:
            merged[-1] *= size
        else:
            merged.append(size)
    return tuple(reversed(merged))


def block_slices(shape: Shape, block_size: float) -> Iterator[tuple[slice, ...]]:
    """Cuts an array of `shape` into blocks whose sides are at most `block_size`.

    Args:
        shape: Merged shape.
        block_size: Largest side of a block; the last block of a dimension may be smaller.

    Yields:
        One tuple of slices per block.
    """
    cuts_of_dimensions = []
    for size in shape:
        side = int(min(block_size, size)) or 1
        cuts = [slice(at, min(at + side, size)) for at in range(0, size, side)]
        cuts_of_dimensions.append(cuts)
    yield from itertools.product(*cuts_of_dimensions)


def gram(block: Array, dim: int) -> Array:
    """The factor of one gradient: `g_(i) g_(i)^T`, all dimensions but `dim` summed."""
    unfolded = np.moveaxis(block, dim, 0).reshape(block.shape[dim], -1)
    return unfolded @ unfolded.T


def mode_product(block: Array, matrix: Array, dim: int) -> Array:
    """Multiplies dimension `dim` of `block` by a symmetric `matrix`."""
    product: Array = np.moveaxis(np.tensordot(matrix, block, axes=(1, dim)), 0, dim)
    return product


def inverse_power(matrix: Array, exponent: float, settings: Settings) -> Array:
    """Computes `A^(-e) = Q diag(l^(-e)) Q^T` with the eigenvalues `l` kept positive.

    * "before": `l` of `A + eps I`; if one is still below `eps`, all move up until the least is it.
    * "after": `l` of `A`, moved up until none is negative, then by `eps`.
    * "pseudo_inverse": eigenvalues at or below `max(rtol * max(l), atol)` contribute nothing.

    Args:
        matrix: Symmetric positive semi-definite up to rounding.
        exponent: `e`.
        settings: `epsilon`, `stability` and the cutoffs are used.

    Returns:
        The root, of the shape of `matrix`.
    """
    ridge = settings.epsilon if settings.stability == "before" else 0.0
    values, vectors = np.linalg.eigh(matrix + ridge * np.eye(len(matrix)))
    least = float(values.min())
    if settings.stability == "pseudo_inverse":
        cutoff = max(settings.rank_rtol * max(float(values.max()), 0.0), settings.rank_atol)
        powers = np.array([v**-exponent if v > cutoff else 0.0 for v in values.tolist()])
    elif settings.stability == "after":
        powers = (values - min(least, 0.0) + settings.epsilon) ** -exponent
    else:
        lift = settings.epsilon - least if least < settings.epsilon else 0.0
        powers = (values + lift) ** -exponent
    root: Array = (vectors * powers) @ vectors.T
    return root


def exponent_of(exponents: Exponents, order: int, dim: int) -> float:
    """The exponent of one dimension: an override, or `1 / (2 * order)`."""
    default = 1.0 / (2 * max(order, 1))
    override = exponents.get(order, default)
    return override.get(dim, default) if isinstance(override, Mapping) else override


def decay_coefficient(settings: Settings, learning_rate: float) -> float:
    """The `alpha` of `D <- D + alpha W`.

    "decoupled": `wd`; "corrected": `wd * lr / peak_lr`; "independent": `wd / peak_lr`; "l2": none
    here, because it went into the gradient.
    """
    relative = {
        "l2": 0.0,
        "decoupled": 1.0,
        "corrected": learning_rate / settings.peak_learning_rate,
        "independent": 1.0 / settings.peak_learning_rate,
    }
    return settings.weight_decay * relative[settings.weight_decay_kind]


class Block:
    """One block of one parameter, with all of its state."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        """Starts from zero statistics and identity roots.

        Args:
            shape: Shape of the block.
            settings: Shared by all blocks.
        """
        self.settings = settings
        self.exponents = [
            exponent_of(settings.exponents, len(shape), dim) for dim in range(len(shape))
        ]
        self.factors: list[Array] = [np.zeros((size, size)) for size in shape]
        self.roots: list[Array] = [np.eye(size) for size in shape]
        self.second_moment: Array = np.zeros(shape)
        self.filtered: Array = np.zeros(shape)
        self.momentum: Array = np.zeros(shape)

    def step(self, weight: Array, gradient: Array, step: int, learning_rate: float) -> Array:
        """Does one step.

        Args:
            weight: Value of the block.
            gradient: Raw gradient of the block.
            step: `t`, counted from 1.
            learning_rate: Of this step.

        Returns:
            The new value of the block.
        """
        settings = self.settings
        if settings.weight_decay_kind == "l2":
            gradient = gradient + settings.weight_decay * weight
        self._accumulate(gradient)
        if settings.refreshes(step):
            self._refresh(step)
        filtered = self._filter(gradient, step)
        direction = self._direction(filtered, step)
        direction = direction + decay_coefficient(settings, learning_rate) * weight
        return weight - learning_rate * self._with_momentum(direction)

    def _accumulate(self, gradient: Array) -> None:
        """Takes the raw gradient into the factors and the grafting second moment."""
        beta2 = self.settings.beta2
        weight = 1.0 if beta2 == 1.0 else 1.0 - beta2
        self.factors = [
            beta2 * factor + weight * gram(gradient, dim) for dim, factor in enumerate(self.factors)
        ]
        match self.settings.grafting:
            case Grafting(kind="adagrad"):
                self.second_moment = self.second_moment + gradient**2
            case Grafting(kind="rmsprop" | "adam", beta2=decay):
                self.second_moment = decay * self.second_moment + (1.0 - decay) * gradient**2

    def _refresh(self, step: int) -> None:
        """Recomputes the roots from the bias-corrected, trace-scaled factors."""
        settings = self.settings
        corrected = settings.bias_correction and settings.beta2 < 1.0
        correction = 1.0 - settings.beta2**step if corrected else 1.0
        for dim, exponent in enumerate(self.exponents):
            if exponent == 0.0:
                continue
            factor = self.factors[dim] / correction
            if settings.trace_exponent is not None:
                trace = max(float(np.trace(factor)), settings.epsilon)
                factor = factor * trace**-settings.trace_exponent
            self.roots[dim] = inverse_power(factor, exponent, settings)

    def _filter(self, gradient: Array, step: int) -> Array:
        """Averages gradients: `f` of the module's formula."""
        beta1 = self.settings.beta1
        beta3 = beta1 if self.settings.beta3 is None else self.settings.beta3
        if beta1 == 0.0:
            return gradient
        filtered = beta3 * self.filtered + (1.0 - beta3) * gradient
        self.filtered = beta1 * self.filtered + (1.0 - beta1) * gradient
        if self.settings.bias_correction:
            filtered = filtered / (1.0 - beta3 * beta1 ** (step - 1))
        return filtered

    def _direction(self, filtered: Array, step: int) -> Array:
        """Preconditions, or follows the grafting alone before the first refresh."""
        grafting = self.settings.grafting
        if grafting is not None and step < self.settings.first_step:
            return self._grafted(filtered, grafting, step)
        direction = filtered
        for dim, exponent in enumerate(self.exponents):
            if exponent != 0.0:
                direction = mode_product(direction, self.roots[dim], dim)
        if grafting is None:
            return direction
        magnitude = math.sqrt(float(np.sum(self._grafted(filtered, grafting, step) ** 2)))
        return direction * (magnitude / (math.sqrt(float(np.sum(direction**2))) + 1e-16))

    def _grafted(self, filtered: Array, grafting: Grafting, step: int) -> Array:
        """`f / (sqrt(V / bc) + eps)`, or `f` for "sgd"."""
        if grafting.kind == "sgd":
            return filtered
        correction = 1.0 - grafting.beta2**step if grafting.kind == "adam" else 1.0
        grafted: Array = filtered / (np.sqrt(self.second_moment / correction) + grafting.epsilon)
        return grafted

    def _with_momentum(self, direction: Array) -> Array:
        """Heavy-ball or Nesterov momentum; the weight decay is inside the buffer."""
        mu, fresh = self.settings.momentum, 1.0 - self.settings.dampening
        if mu == 0.0:
            return direction
        self.momentum = mu * self.momentum + fresh * direction
        return fresh * direction + mu * self.momentum if self.settings.nesterov else self.momentum


class Parameter:
    """One parameter: its value and its blocks."""

    def __init__(self, value: Array, settings: Settings) -> None:
        """Merges and splits.

        Args:
            value: Initial value; copied.
            settings: Shared by all parameters.
        """
        self.shape: Shape = value.shape
        merged = merged_shape(value.shape, settings.block_size, settings.merge_dims)
        self.merged: Array = value.reshape(merged).astype(np.float64, copy=True)
        self.blocks = [
            (where, Block(np.shape(self.merged[where]), settings))
            for where in block_slices(merged, settings.block_size)
        ]

    def step(self, gradient: Array, step: int, learning_rate: float) -> None:
        """Steps every block in turn."""
        merged_gradient = gradient.reshape(self.merged.shape)
        for where, block in self.blocks:
            weight, piece = np.asarray(self.merged[where]), np.asarray(merged_gradient[where])
            self.merged[where] = block.step(weight, piece, step, learning_rate)

    @property
    def value(self) -> Array:
        """A copy of the current value, in the parameter's own shape."""
        return self.merged.reshape(self.shape).copy()


def run(
    params: Sequence[Array],
    gradients: Sequence[Sequence[Array]],
    learning_rates: Sequence[float],
    settings: Settings,
) -> list[list[Array]]:
    """Runs a whole training.

    Args:
        params: Initial values.
        gradients: For every step, one gradient per parameter.
        learning_rates: One per step.
        settings: The algorithm.

    Returns:
        For every step, the values of the parameters after it.
    """
    parameters = [Parameter(value, settings) for value in params]
    trajectory = []
    rounds = zip(gradients, learning_rates, strict=True)
    for step, (step_gradients, learning_rate) in enumerate(rounds, start=1):
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.step(gradient, step, learning_rate)
        trajectory.append([parameter.value for parameter in parameters])
    return trajectory
