"""The library against an independent float64 textbook, and the textbook against the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conformance
import numpy as np
import pytest
import textbook
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import shampoo_func as sf

DATA = Path(__file__).parent / "data"
CASES = sorted(path.stem for path in DATA.glob("*.json"))

# Both implementations round differently, and a matrix root multiplies a rounding error by up to the
# condition number of the damped factor. Early factors are rank deficient, so that this number is
# the largest eigenvalue over epsilon: an epsilon of 1e-12 of the squared gradient leaves nothing
# certain (the reference differs from itself by 1e-2 after 20 steps when one addition is fused).
# Epsilons of 1e-5 and more keep the amplified error near 1e-11 of the update, so 1e-10 tells a
# rounding error from any mistake.
RELATIVE_TOLERANCE = 1e-10
RELATIVE_EPSILONS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)

# Drawn factors are either singular to rounding (1e-16) or have eigenvalues above 1e-6 or so of the
# largest: a cutoff between the two takes the same eigenvalues for zero in both implementations.
RANK_RTOL = 1e-9


@dataclass(frozen=True)
class Problem:
    """What one example trains.

    Attributes:
        shapes: Of the parameters.
        seed: Of values and gradients.
        scale: Size of the gradients.
        learning_rates: One per step.
    """

    shapes: tuple[tuple[int, ...], ...]
    seed: int
    scale: float
    learning_rates: tuple[float, ...]

    def params(self) -> list[textbook.Array]:
        """Initial values."""
        generator = np.random.default_rng(self.seed)
        return [generator.standard_normal(shape) for shape in self.shapes]

    def gradients(self) -> list[list[textbook.Array]]:
        """For every step, one gradient per parameter."""
        generator = np.random.default_rng(self.seed + 1)
        return [
            [self.scale * np.asarray(generator.standard_normal(shape)) for shape in self.shapes]
            for _ in self.learning_rates
        ]


shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple) | st.tuples(st.integers(1, 12))
exponents = st.sampled_from([0.0, 0.2, 0.25, 0.5, 1.0])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Draws parameters of order 0 to 4 and a changing learning rate."""
    return Problem(
        shapes=tuple(draw(st.lists(shapes, min_size=1, max_size=3))),
        seed=draw(st.integers(0, 2**16)),
        scale=draw(st.sampled_from([0.01, 1.0, 30.0])),
        learning_rates=tuple(
            draw(st.lists(st.sampled_from([0.1, 0.03, 0.01]), min_size=1, max_size=8))
        ),
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
def algorithms(draw: st.DrawFn, scale: float) -> textbook.Settings:
    """Draws every setting of the textbook, for gradients of size `scale`."""
    stability = draw(st.sampled_from(["before", "after", "pseudo_inverse"]))
    refresh_every = draw(st.integers(1, 4))
    later = st.integers(refresh_every, refresh_every + 4) | st.just(math.inf)
    momentum = draw(st.sampled_from([0.0, 0.5, 0.9]))
    return textbook.Settings(
        beta1=draw(st.sampled_from([0.0, 0.5, 0.9])),
        beta2=draw(st.sampled_from([0.9, 0.99, 1.0])),
        beta3=draw(st.none() | st.sampled_from([0.0, 0.4, 0.95])),
        epsilon=0.0
        if stability == "pseudo_inverse"
        else draw(st.sampled_from(RELATIVE_EPSILONS)) * scale**2,
        weight_decay=draw(st.sampled_from([0.0, 0.01, 0.3])),
        weight_decay_kind=draw(st.sampled_from(["l2", "decoupled", "corrected", "independent"])),
        peak_learning_rate=0.1,
        momentum=momentum,
        dampening=draw(st.sampled_from([0.0, 0.2])) if momentum else 0.0,
        nesterov=draw(st.booleans()) if momentum else False,
        block_size=draw(st.sampled_from([1, 2, 3, 5, 8, 24, 1024])),
        merge_dims=draw(st.booleans()),
        refresh_every=refresh_every,
        start=draw(st.none() | later),
        grafting=draw(st.none() | graftings()),
        exponents=draw(overrides()),
        bias_correction=draw(st.booleans()),
        trace_exponent=draw(st.none() | st.sampled_from([0.25, 0.5, 1.0])),
        stability=stability,
        rank_rtol=RANK_RTOL,
    )


def graftings() -> st.SearchStrategy[textbook.Grafting]:
    """Draws a grafting kind with its own hyper-parameters."""
    return st.builds(
        textbook.Grafting,
        kind=st.sampled_from(["sgd", "adagrad", "rmsprop", "adam"]),
        beta2=st.sampled_from([0.9, 0.999]),
        epsilon=st.sampled_from([1e-8, 1e-3]),
    )


examples = problems().flatmap(
    lambda problem: st.tuples(st.just(problem), algorithms(problem.scale))
)


def magnitude(grafting: textbook.Grafting | None) -> Any:  # noqa: ANN401
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


def root(algorithm: textbook.Settings) -> Any:  # noqa: ANN401
    """The library's matrix root of a textbook's."""
    match algorithm.stability:
        case "pseudo_inverse":
            cutoffs = sf.PseudoInverse(algorithm.rank_atol, algorithm.rank_rtol)
            return sf.eigh_root(0.0, pseudo_inverse=cutoffs)
        case stability:
            return sf.eigh_root(algorithm.epsilon, perturb=stability)


def transformation(problem: Problem, algorithm: textbook.Settings) -> sf.Transformation:
    """The library's optimizer of a textbook's settings."""
    relative_decay = algorithm.weight_decay_kind in ("corrected", "independent")
    return sf.shampoo(
        conformance.RecordedRates(problem.learning_rates),
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


def library_run(problem: Problem, algorithm: textbook.Settings) -> list[list[textbook.Array]]:
    """The values of the library's parameters after every step."""
    tx = transformation(problem, algorithm)
    params = {str(i): torch.tensor(value) for i, value in enumerate(problem.params())}
    state = tx.init(params)
    trajectory = []
    for step_gradients in problem.gradients():
        gradients = {str(i): torch.tensor(gradient) for i, gradient in enumerate(step_gradients)}
        updates, state = tx.update(gradients, state, params)
        params = sf.apply_updates(params, updates)
        trajectory.append([value.numpy() for value in params.values()])
    return trajectory


def deviation(
    initial: list[textbook.Array],
    ours: list[list[textbook.Array]],
    theirs: list[list[textbook.Array]],
) -> float:
    """The largest `||ours - theirs|| / ||theirs - initial||` over the parameters."""
    deviations = []
    for i, value in enumerate(initial):
        left, right = (np.stack([step[i] for step in run]) for run in (ours, theirs))
        deviations.append(np.linalg.norm(left - right) / np.linalg.norm(right - value))
    return float(np.max(deviations))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(examples)
def test_library_follows_the_textbook(drawn: tuple[Problem, textbook.Settings]) -> None:
    problem, algorithm = drawn
    initial = problem.params()
    theirs = textbook.run(initial, problem.gradients(), problem.learning_rates, algorithm)
    ours = library_run(problem, algorithm)
    assert deviation(initial, ours, theirs) <= RELATIVE_TOLERANCE


def settings_of(config: conformance.Configuration) -> textbook.Settings:
    """The textbook's settings of a recorded case."""
    preconditioner, momentum = config.preconditioner, config.momentum
    stability = preconditioner.stability
    inverse = stability if isinstance(stability, conformance.PseudoInverse) else None
    before = isinstance(stability, conformance.Perturbation) and stability.before
    grafting = config.grafting
    return textbook.Settings(
        beta1=config.beta1,
        beta2=config.beta2,
        beta3=config.beta3,
        epsilon=config.epsilon,
        weight_decay=config.weight_decay,
        weight_decay_kind=config.weight_decay_kind,
        peak_learning_rate=config.learning_rate,
        momentum=momentum.momentum if momentum else 0.0,
        dampening=momentum.dampening if momentum else 0.0,
        nesterov=bool(momentum and momentum.nesterov),
        block_size=config.block_size,
        merge_dims=config.merge_dims,
        refresh_every=config.refresh_every,
        start=config.start,
        grafting=grafting
        and textbook.Grafting(kind=grafting.kind, beta2=grafting.beta2, epsilon=grafting.epsilon),
        exponents=preconditioner.exponents or {},
        bias_correction=config.bias_correction,
        trace_exponent=preconditioner.trace_exponent,
        stability="pseudo_inverse" if inverse else "before" if before else "after",
        rank_atol=inverse.atol if inverse else 0.0,
        rank_rtol=inverse.rtol if inverse else 0.0,
    )


@pytest.mark.parametrize("name", CASES)
def test_textbook_follows_the_reference(name: str) -> None:
    case = conformance.load_case(DATA / f"{name}.json")
    gradients = [list(step) for step in zip(*case.gradients, strict=True)]
    trajectory = textbook.run(
        case.params,
        gradients,
        case.learning_rates.tolist(),
        settings_of(conformance.configuration_of(case)),
    )
    by_parameter = [np.stack(values) for values in zip(*trajectory, strict=True)]
    assert conformance.error_of(case, by_parameter) <= case.tolerance
