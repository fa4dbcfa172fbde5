"""From what a recorded case asks for to an optimizer: the reference's options in our names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import conformance_options as asked
import torch

import shampoo_func as sf
from shampoo_func import linalg

# The reference takes the root that so few steps give, converged or not. Ours is refused where it
# did not converge, unless the number of steps is fixed.
FEW_STEPS = 50


@dataclass(frozen=True, slots=True)
class RecordedRates:
    """The schedule that returns `rates[step]`.

    Attributes:
        rates: One learning rate per step.
        dtype: The reference keeps rates in float32.
    """

    rates: tuple[float, ...]
    dtype: torch.dtype = torch.float32

    def __call__(self, step: int | torch.Tensor) -> torch.Tensor:
        """Looks up the rate of the step after `step` steps."""
        return torch.tensor(self.rates, dtype=self.dtype)[step]


def transformation_from(
    config: asked.Configuration, learning_rates: Sequence[float]
) -> sf.Transformation:
    """Builds an optimizer from stages.

    Args:
        config: What the case asks for.
        learning_rates: One per step.

    Returns:
        A transformation with the whole chain, learning rate included.
    """
    rates = RecordedRates(tuple(learning_rates))
    decay = decay_coefficient(config, learning_rates)
    stage = sf.add_decayed_weights(decay)
    none = config.weight_decay == 0.0
    before = [stage] if config.weight_decay_kind == "l2" and not none else []
    after = [stage] if config.weight_decay_kind != "l2" and not none else []
    # averaging decays its own iterate, unless the decay is in the gradient
    own_decay = decay if after else 0.0
    last: list[sf.Transformation]
    match config.averaging:
        case asked.PrimalAveraging(eval_interpolation=eval_, train_interpolation=train):
            last = [sf.primal_averaging(rates, eval_, train, own_decay)]
        case asked.ScheduleFree(train_interpolation=train, rate_power=power):
            last = [sf.schedule_free(rates, train, power, own_decay)]
        case asked.Momentum(momentum=momentum, dampening=dampening, nesterov=nesterov):
            trace = sf.trace(momentum, nesterov=nesterov, dampening=dampening)
            last = [*after, trace, sf.scale_by_learning_rate(rates)]
        case _:
            last = [*after, sf.scale_by_learning_rate(rates)]
    return sf.chain(*before, direction_of(config), *last)


def decay_coefficient(
    config: asked.Configuration, learning_rates: Sequence[float]
) -> float | RecordedRates:
    """What the parameters are multiplied by when they are added to the direction."""
    if config.weight_decay_kind == "independent":
        return config.weight_decay / config.learning_rate
    if config.weight_decay_kind == "corrected":
        relative = config.weight_decay / config.learning_rate
        return RecordedRates(tuple(rate * relative for rate in learning_rates))
    return config.weight_decay


def direction_of(config: asked.Configuration) -> sf.Transformation:
    """The direction of every parameter; a number that is not merged has no dimension."""
    stage = blocked_direction(config)
    if not math.isinf(config.target_dims):
        return stage
    # ours makes a vector of such a number: of that vector, nothing is rotated or multiplied
    bare = config.preconditioner
    match bare:
        case asked.RootShampoo() | asked.EigendecomposedShampoo():
            bare = replace(bare, exponents={1: 0.0})
        case asked.EigenvalueCorrected(exponents=powers):
            bare = replace(bare, ignored={1: (0,)}, exponents={1: (powers or {}).get(0, 0.5)})
    numbers = blocked_direction(replace(config, preconditioner=bare))
    groups = {"arrays": stage, "numbers": numbers}
    return sf.partition(groups, lambda _, leaf: "arrays" if leaf.ndim else "numbers")


def blocked_direction(config: asked.Configuration) -> sf.Transformation:
    """The direction of every block, with the norm of the grafted method's update."""
    direction = preconditioner_of(config.preconditioner, config)
    if config.grafting is not None:
        magnitude = preconditioner_of(config.grafting, config)
        direction = sf.graft(direction=direction, magnitude=magnitude)
    averaged = sf.ema(config.beta1, bias_correction=config.bias_correction, lookahead=config.beta3)
    stage = sf.precondition(
        direction,
        filter=averaged if config.beta1 else None,
        refresh_every=config.refresh_every,
        start=config.start,
    )
    merges = not math.isinf(config.target_dims)
    return sf.blocked(
        stage,
        block_size=None if math.isinf(config.block_size) else int(config.block_size),
        merge_dims=merges,
        merge_to=int(config.target_dims) if merges else None,
    )


def preconditioner_of(
    wanted: asked.Preconditioner, config: asked.Configuration
) -> sf.Preconditioner:
    """The preconditioner of one block, as the direction or as the graft."""
    match wanted:
        case asked.RootShampoo():
            return sf.kronecker(
                config.beta2,
                root=root_of(wanted.solver, config.epsilon),
                kl=wanted.statistics.kullback_leibler,
                bias_correction=config.bias_correction,
                exponents=known_orders(wanted.exponents),
                trace_scaling=wanted.statistics.trace_exponent,
                drop_weighting=not wanted.statistics.weighted,
                factor_dtype=wanted.statistics.dtype,
                root_dtype=wanted.dtype,
            )
        case asked.EigendecomposedShampoo():
            return sf.eigendecomposed(
                config.beta2,
                basis=basis_of(wanted.solver, config.epsilon),
                kl=wanted.statistics.kullback_leibler,
                bias_correction=config.bias_correction,
                exponents=known_orders(wanted.exponents),
                trace_scaling=wanted.statistics.trace_exponent,
                drop_weighting=not wanted.statistics.weighted,
                factor_dtype=wanted.statistics.dtype,
            )
        case asked.EigenvalueCorrected():
            return eigenvalue_corrected(wanted, config)
        case asked.Spectral():
            return sf.polar(polar_of(wanted.solver))
        case asked.Sign():
            return sf.sign_preconditioner()
        case asked.Moment(kind="sgd"):
            return sf.identity_preconditioner()
        case asked.Moment():
            return sf.second_moment(
                wanted.beta2,
                epsilon=wanted.epsilon,
                bias_correction=wanted.kind == "adam",
                drop_weighting=not wanted.weighted,
            )
    raise asked.Unsupported(f"preconditioner {wanted}")


def known_orders(exponents: asked.Exponents | dict[int, float] | None) -> Any:
    """The exponents of arrays: those of a number (order 0) say nothing."""
    return {order: power for order, power in (exponents or {}).items() if order} or None


def eigenvalue_corrected(
    wanted: asked.EigenvalueCorrected, config: asked.Configuration
) -> sf.Preconditioner:
    """A second moment in the eigenbasis, with the exponent of every order.

    The reference leaves the second moment as it is when the basis changes.
    """
    inner = sf.second_moment(
        config.beta2,
        epsilon=config.epsilon,
        bias_correction=config.bias_correction,
        drop_weighting=not wanted.statistics.weighted,
        exponents=known_orders(wanted.exponents),
    )
    return sf.in_eigenbasis(
        inner,
        beta2=config.beta2,
        basis=basis_of(wanted.solver, config.epsilon),
        ignore=wanted.ignored,
        bias_correction=config.bias_correction,
        trace_scaling=wanted.statistics.trace_exponent,
        drop_weighting=not wanted.statistics.weighted,
        factor_dtype=wanted.statistics.dtype,
    )


def damping_of(stability: asked.Stability, epsilon: float) -> linalg.EighRoot:
    """How eigenvalues are kept positive."""
    if isinstance(stability, asked.PseudoInverse):
        return sf.eigh_root(0.0, pseudo_inverse=sf.PseudoInverse(stability.atol, stability.rtol))
    return sf.eigh_root(epsilon, perturb="before" if stability.before else "after")


def root_of(solver: asked.RootSolver, epsilon: float) -> linalg.RootSolver:
    """The inverse root."""
    match solver:
        case asked.CoupledNewton(max_iterations=steps, tolerance=tolerance):
            if steps <= FEW_STEPS:
                return sf.newton_root(epsilon, relative_epsilon=0.0, iterations=steps)
            return sf.newton_root(
                epsilon, relative_epsilon=0.0, tolerance=tolerance, max_iterations=steps
            )
        case asked.HigherOrder():
            return sf.higher_order_newton_root(
                epsilon=solver.absolute_epsilon,
                relative_epsilon=solver.relative_epsilon,
                # the reference counts the first step, of second order, as well
                max_iterations=max(solver.max_iterations - 1, 1),
                tolerance=solver.tolerance,
                order=solver.order,
            )
        case asked.Eigen(stability=stability):
            return damping_of(stability, epsilon)


def basis_of(solver: asked.BasisSolver, epsilon: float) -> linalg.BasisSolver:
    """The eigenbasis."""
    damping = damping_of(solver.stability, epsilon)
    if isinstance(solver, asked.Eigh):
        return sf.eigh_basis(tolerance=solver.tolerance, damping=damping)
    return sf.qr_basis(
        iterations=solver.max_iterations, tolerance=solver.tolerance, damping=damping
    )


def polar_of(solver: asked.NewtonSchulz | asked.SVD) -> linalg.PolarMethod:
    """The orthogonal polar factor."""
    if isinstance(solver, asked.SVD):
        return sf.svd_polar(scale_by_nuclear_norm=solver.times_nuclear_norm)
    return sf.newton_schulz_polar(solver.iterations, solver.coefficients)
