"""The library against an independent float64 textbook, and the textbook against the reference."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import conformance
import conformance_options as asked
import numpy as np
import pytest
import textbook
import torch
from conformance_build import RecordedRates
from hypothesis import given, settings
from hypothesis import strategies as st

import shampoo_func as sf

DATA = Path(__file__).parent / "data"

# Both implementations round differently, and a matrix root multiplies a rounding error by up to the
# condition number of the damped factor. Early factors are rank deficient, so that this number is
# their largest eigenvalue over epsilon: an epsilon of 1e-12 of the squared gradient leaves nothing
# certain (the reference differs from itself by 1e-2 after 20 steps when one addition is fused).
# The largest eigenvalue is up to some 500 squared gradients here, so that epsilons of 1e-3 and more
# keep the amplified error well below 1e-10, which still tells a rounding error from any mistake.
RELATIVE_TOLERANCE = 1e-10
RELATIVE_EPSILONS = (1.0, 1e-1, 1e-2, 1e-3)

# Drawn factors are either singular to rounding (1e-16) or have eigenvalues above 1e-6 or so of the
# largest: a cutoff between the two takes the same eigenvalues for zero in both implementations.
RANK_RTOL = 1e-9

Trajectory = list[textbook.Array]
Kind = Literal["sgd", "adagrad", "rmsprop", "adam"]
Stability = Literal["before", "after", "pseudo_inverse"]


@dataclass(frozen=True)
class Problem:
    """What one example trains.

    Attributes:
        shapes: Of the parameters.
        seed: Of values and gradients.
        scale: Size of the gradients.
        learning_rates: One per step.
        missing: The (step, parameter) pairs without a gradient.
    """

    shapes: tuple[tuple[int, ...], ...]
    seed: int
    scale: float
    learning_rates: tuple[float, ...]
    missing: frozenset[tuple[int, int]]

    def params(self) -> list[textbook.Array]:
        """Initial values."""
        generator = np.random.default_rng(self.seed)
        return [np.asarray(generator.standard_normal(shape)) for shape in self.shapes]

    def gradients(self) -> list[list[textbook.Array | None]]:
        """For every step, one gradient or None per parameter."""
        generator = np.random.default_rng(self.seed + 1)
        drawn = [
            [self.scale * np.asarray(generator.standard_normal(shape)) for shape in self.shapes]
            for _ in self.learning_rates
        ]
        return [
            [None if (step, i) in self.missing else gradient for i, gradient in enumerate(row)]
            for step, row in enumerate(drawn)
        ]


# Fixed choices and orders cover evenly, where open ranges and lists prefer the smallest.
sizes = st.sampled_from([1, 2, 3, 4, 5, 7])
orders = st.sampled_from([0, 1, 2, 2, 3, 3, 4])
shapes = orders.flatmap(lambda order: st.tuples(*[sizes] * order)).filter(
    lambda shape: math.prod(shape) <= 120
)
exponents = st.sampled_from([0.0, 0.2, 0.25, 0.5, 1.0])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Draws parameters of order 0 to 4, a changing learning rate and missing gradients."""
    drawn_shapes = tuple(draw(st.lists(shapes, min_size=1, max_size=3)))
    rates = draw(st.lists(st.sampled_from([0.1, 0.03, 0.01]), min_size=3, max_size=8))
    anywhere = st.tuples(st.integers(0, len(rates) - 1), st.integers(0, len(drawn_shapes) - 1))
    return Problem(
        shapes=drawn_shapes,
        seed=draw(st.integers(0, 2**16)),
        scale=draw(st.sampled_from([0.01, 1.0, 30.0])),
        learning_rates=tuple(rates),
        missing=draw(st.frozensets(anywhere, max_size=3)),
    )


@st.composite
def overrides(draw: st.DrawFn) -> dict[int, float | dict[int, float]]:
    """Draws exponents by order, and by dimension of an order."""
    table: dict[int, float | dict[int, float]] = {}
    for order in draw(st.sets(st.integers(1, 4))):
        by_dimension = st.dictionaries(st.integers(0, order - 1), exponents)
        table[order] = draw(exponents | by_dimension)
    return table


@st.composite
def algorithms(draw: st.DrawFn, problem: Problem) -> textbook.Settings:
    """Draws every setting of the textbook, fit for the gradients of a problem."""
    stability: Stability = draw(st.sampled_from(["before", "after", "pseudo_inverse"]))
    trace_exponent = draw(st.none() | st.sampled_from([0.25, 0.5, 1.0]))
    factor_scale = problem.scale ** (2 * (1 - (trace_exponent or 0.0)))
    epsilon = draw(st.sampled_from(RELATIVE_EPSILONS)) * factor_scale
    refresh_every = draw(st.integers(1, 4))
    delay = draw(st.sampled_from([None, None, 0, 1, 2, 3, math.inf]))
    momentum = draw(st.sampled_from([0.0, 0.5, 0.9]))
    merge_limits = [a * b for shape in problem.shapes for a, b in itertools.pairwise(shape)]
    # The library makes a vector of an unmerged number, which the reference leaves without factor.
    unmergeable = st.booleans() if all(problem.shapes) else st.just(True)
    return textbook.Settings(
        beta1=draw(st.sampled_from([0.0, 0.5, 0.9])),
        beta2=draw(st.sampled_from([0.9, 0.99, 1.0])),
        beta3=draw(st.none() | st.sampled_from([0.0, 0.4, 0.95])),
        epsilon=0.0 if stability == "pseudo_inverse" else epsilon,
        weight_decay=draw(st.sampled_from([0.0, 0.01, 0.3])),
        weight_decay_kind=draw(st.sampled_from(["l2", "decoupled", "corrected", "independent"])),
        peak_learning_rate=0.1,
        momentum=momentum,
        dampening=draw(st.sampled_from([0.0, 0.2])) if momentum else 0.0,
        nesterov=draw(st.booleans()) if momentum else False,
        block_size=draw(st.sampled_from([1, 2, 3, 4, 24, *merge_limits])),
        merge_dims=draw(unmergeable),
        refresh_every=refresh_every,
        start=None if delay is None else refresh_every + delay,
        grafting=draw(graftings()),
        exponents=draw(overrides()),
        bias_correction=draw(st.booleans()),
        trace_exponent=trace_exponent,
        stability=stability,
        rank_rtol=RANK_RTOL,
    )


@st.composite
def graftings(draw: st.DrawFn) -> textbook.Grafting | None:
    """Draws no grafting, or a kind with its own hyper-parameters."""
    kind: Kind | None = draw(st.sampled_from([None, "sgd", "adagrad", "rmsprop", "adam"]))
    if kind is None:
        return None
    beta2, epsilon = draw(st.sampled_from([0.9, 0.999])), draw(st.sampled_from([1e-8, 1e-3]))
    return textbook.Grafting(kind=kind, beta2=beta2, epsilon=epsilon)


def magnitude(grafting: textbook.Grafting | None) -> Any:
    """The library's grafting of a textbook's."""
    if grafting is None:
        return None
    match grafting.kind:
        case "sgd":
            return sf.identity_preconditioner()
        case "adagrad":
            return sf.second_moment(1.0, epsilon=grafting.epsilon)
    return sf.second_moment(
        grafting.beta2, epsilon=grafting.epsilon, bias_correction=grafting.kind == "adam"
    )


def root(algorithm: textbook.Settings) -> Any:
    """The library's matrix root of a textbook's."""
    if algorithm.stability == "pseudo_inverse":
        cutoffs = sf.PseudoInverse(algorithm.rank_atol, algorithm.rank_rtol)
        return sf.eigh_root(0.0, pseudo_inverse=cutoffs)
    return sf.eigh_root(algorithm.epsilon, perturb=algorithm.stability)


def transformation(problem: Problem, algorithm: textbook.Settings) -> sf.Transformation:
    """The library's optimizer of a textbook's settings."""
    relative_decay = algorithm.weight_decay_kind in ("corrected", "independent")
    return sf.shampoo(
        RecordedRates(problem.learning_rates, torch.float64),
        beta1=algorithm.beta1,
        beta2=algorithm.beta2,
        beta3=algorithm.beta3,
        weight_decay=algorithm.weight_decay,
        weight_decay_kind=algorithm.weight_decay_kind,
        peak_learning_rate=algorithm.peak_learning_rate if relative_decay else None,
        momentum=algorithm.momentum,
        nesterov=algorithm.nesterov,
        dampening=algorithm.dampening,
        block_size=int(algorithm.block_size),
        merge_dims=algorithm.merge_dims,
        refresh_every=algorithm.refresh_every,
        start=algorithm.start,
        grafting=magnitude(algorithm.grafting),
        exponents=dict(algorithm.exponents) or None,
        bias_correction=algorithm.bias_correction,
        trace_scaling=algorithm.trace_exponent,
        root=root(algorithm),
        factor_dtype=torch.float64,
        root_dtype=torch.float64,
    )


def library_run(problem: Problem, algorithm: textbook.Settings) -> list[Trajectory]:
    """Per parameter of the library, the values after every step."""
    tx = transformation(problem, algorithm)
    params = {str(i): torch.tensor(value) for i, value in enumerate(problem.params())}
    state = tx.init(params)
    trajectories: list[Trajectory] = [[] for _ in params]
    for step_gradients in problem.gradients():
        gradients = {
            str(i): None if gradient is None else torch.tensor(gradient)
            for i, gradient in enumerate(step_gradients)
        }
        updates, state = tx.update(gradients, state, params)
        params = sf.apply_updates(params, updates)
        for trajectory, value in zip(trajectories, params.values(), strict=True):
            trajectory.append(value.numpy())
    return trajectories


def textbook_run(problem: Problem, algorithm: textbook.Settings) -> list[Trajectory]:
    """Per parameter of the textbook, the values after every step.

    To the library a parameter without a gradient does not take part in a step: its own counters
    stand still (in the reference the shared one goes on). So the textbook trains every parameter
    alone, on the steps that it has gradients for.
    """
    trajectories = []
    by_parameter = zip(*problem.gradients(), strict=True)
    for value, gradients in zip(problem.params(), by_parameter, strict=True):
        steps = list(zip(gradients, problem.learning_rates, strict=True))
        taken = [([gradient], rate) for gradient, rate in steps if gradient is not None]
        visited = textbook.run(
            [value], [gradient for gradient, _ in taken], [rate for _, rate in taken], algorithm
        )
        moves = iter(visited)
        trajectory: Trajectory = []
        for gradient, _ in steps:
            before = trajectory[-1] if trajectory else value
            trajectory.append(before if gradient is None else next(moves)[0])
        trajectories.append(trajectory)
    return trajectories


def deviation(
    initial: list[textbook.Array], ours: list[Trajectory], theirs: list[Trajectory]
) -> float:
    """The largest `||ours - theirs|| / ||theirs - initial||` over the parameters."""
    unmoved = np.finfo(np.float64).tiny
    return max(
        float(
            np.linalg.norm(np.stack(left) - np.stack(right))
            / max(np.linalg.norm(np.stack(right) - value), unmoved)
        )
        for value, left, right in zip(initial, ours, theirs, strict=True)
    )


@settings(max_examples=500, deadline=None, derandomize=True)
@given(problems().flatmap(lambda problem: st.tuples(st.just(problem), algorithms(problem))))
def test_library_follows_the_textbook(drawn: tuple[Problem, textbook.Settings]) -> None:
    problem, algorithm = drawn
    ours, theirs = library_run(problem, algorithm), textbook_run(problem, algorithm)
    assert deviation(problem.params(), ours, theirs) <= RELATIVE_TOLERANCE


def in_the_textbook(config: asked.Configuration) -> bool:
    """Whether the textbook has everything that a recorded case asks for."""
    root, grafting = config.preconditioner, config.grafting
    return (
        isinstance(root, asked.RootShampoo)
        and isinstance(root.solver, asked.Eigen)
        and root.statistics.weighted
        and not root.statistics.kullback_leibler
        and (grafting is None or (isinstance(grafting, asked.Moment) and grafting.weighted))
        and (config.averaging is None or isinstance(config.averaging, asked.Momentum))
        and config.target_dims in (1, math.inf)
    )


def recorded() -> dict[str, tuple[conformance.Case, asked.Configuration]]:
    """The recorded cases that the textbook can replay."""
    cases = [conformance.load_case(path) for path in sorted(DATA.glob("*.json"))]
    pairs = {case.name: (case, asked.configuration_of(case.options)) for case in cases}
    return {name: pair for name, pair in pairs.items() if in_the_textbook(pair[1])}


RECORDED = recorded()


def settings_of(config: asked.Configuration) -> textbook.Settings:
    """The textbook's settings of a recorded case."""
    root, momentum = config.preconditioner, config.averaging
    assert isinstance(root, asked.RootShampoo) and isinstance(root.solver, asked.Eigen)
    if not isinstance(momentum, asked.Momentum):
        momentum = asked.Momentum(momentum=0.0)
    return textbook.Settings(
        beta1=config.beta1,
        beta2=config.beta2,
        beta3=config.beta3,
        epsilon=config.epsilon,
        weight_decay=config.weight_decay,
        weight_decay_kind=config.weight_decay_kind,
        peak_learning_rate=config.learning_rate,
        momentum=momentum.momentum,
        dampening=momentum.dampening,
        nesterov=momentum.nesterov,
        block_size=config.block_size,
        merge_dims=not math.isinf(config.target_dims),
        refresh_every=config.refresh_every,
        start=config.start,
        grafting=grafting_of(config.grafting),
        exponents=root.exponents or {},
        bias_correction=config.bias_correction,
        trace_exponent=root.statistics.trace_exponent,
        **stability_of(root.solver.stability),
    )


def grafting_of(grafting: asked.Preconditioner | None) -> textbook.Grafting | None:
    """The textbook's grafting of a recorded case."""
    if not isinstance(grafting, asked.Moment):
        return None
    return textbook.Grafting(kind=grafting.kind, beta2=grafting.beta2, epsilon=grafting.epsilon)


def stability_of(stability: asked.Stability) -> dict[str, Any]:
    """The settings of the textbook that keep a recorded case's eigenvalues positive."""
    if isinstance(stability, asked.Perturbation):
        return {"stability": "before" if stability.before else "after"}
    # None stands for the size times the machine precision: of the same use on the few that ask
    rtol = RANK_RTOL if stability.rtol is None else stability.rtol
    return {"stability": "pseudo_inverse", "rank_atol": stability.atol, "rank_rtol": rtol}


def test_the_textbook_replays_many_cases() -> None:
    assert len(RECORDED) >= 19


@pytest.mark.parametrize("name", RECORDED)
def test_textbook_follows_the_reference(name: str) -> None:
    case, config = RECORDED[name]
    gradients = [list(step) for step in zip(*case.gradients, strict=True)]
    trajectory = textbook.run(
        case.params, gradients, case.learning_rates.tolist(), settings_of(config)
    )
    by_parameter = [np.stack(values) for values in zip(*trajectory, strict=True)]
    assert conformance.error_of(case, by_parameter) <= case.tolerance
