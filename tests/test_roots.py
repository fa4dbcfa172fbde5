"""Inverse root solvers: against float64 spectra, on hostile input, and through every transform."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import BACKEND, fresh_compiler, graph_count, whole_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shampoo_func import linalg
from shampoo_func.errors import HyperparameterError
from shampoo_func.linalg.roots import iteration

# name: (constructor, exponents); the fixed forms have 20 steps
SOLVERS: dict[str, tuple[Callable[..., linalg.RootSolver], tuple[float, ...]]] = {
    "eigh": (linalg.eigh_root, (0.5, 0.25, 0.3, 1.0)),
    "auto": (linalg.auto_root, (0.5, 0.25, 0.3)),
    "newton": (linalg.newton_root, (0.5, 0.25, 1 / 3, 1.0)),
    "newton fixed": (lambda *a, **k: linalg.newton_root(*a, iterations=20, **k), (0.5, 0.25)),
    "higher order": (linalg.higher_order_newton_root, (0.5, 0.25, 0.3, 1.0, 1.5)),
    "higher order fixed": (
        lambda *a, **k: linalg.higher_order_newton_root(*a, iterations=12, **k),
        (0.5, 0.25),
    ),
    "db": (linalg.newton_db_root, (0.5, 0.25, 0.125)),
    "db fixed": (lambda *a, **k: linalg.newton_db_root(*a, iterations=25, **k), (0.5, 0.25)),
    "schulz": (linalg.newton_schulz_root, (0.5, 0.25, 0.125)),
    "schulz cans": (
        lambda *a, **k: linalg.newton_schulz_root(*a, coefficients="cans", **k),
        (0.5, 0.25),
    ),
    "chebyshev": (linalg.chebyshev_root, (0.5, 0.25, 0.3, 1.0)),
    "cholesky": (linalg.cholesky_root, (0.5,)),
}
every_solver = pytest.mark.parametrize("name", SOLVERS)
TOLERANT = ("newton", "higher order", "db")
# those whose steps come from a table end where the table does
EXACT = [name for name in SOLVERS if not name.startswith(("schulz", "chebyshev", "cholesky"))]


def spectral(values: Tensor, seed: int = 0) -> Tensor:
    """Return a symmetric float64 matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    size = values.shape[-1]
    noise = torch.randn(size, size, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(noise)[0]
    matrix = (basis * values.double()) @ basis.T
    return (matrix + matrix.T) / 2


def log_spectrum(size: int, condition: float, scale: float = 1.0) -> Tensor:
    return scale * torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)


def exact(matrix: Tensor, exponent: float, ridge: float = 0.0) -> Tensor:
    """Return (A + ridge I)^(-p) by an eigendecomposition in float64."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * (values + ridge).pow(-exponent)) @ vectors.mT


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


# --- accuracy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [1e2, 1e5])
@pytest.mark.parametrize("name", EXACT)
def test_float64_root_is_that_of_the_spectrum(name: str, condition: float) -> None:
    """Every exponent a solver takes, within 1e-6 (the tolerance of the default Newton forms)."""
    make, exponents = SOLVERS[name]
    matrix = spectral(log_spectrum(12, condition))
    for exponent in exponents:
        root = make(0.0)(matrix, exponent)
        assert root.ok
        assert relative(root.value, exact(matrix, exponent)) < 1e-5


@settings(max_examples=40)
@given(
    st.lists(st.floats(-4, 0), min_size=2, max_size=9),
    st.sampled_from([1e-20, 1.0, 1e20]),
    st.sampled_from([name for name in SOLVERS if name not in ("chebyshev", "cholesky")]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_agreement_of_solvers(
    logs: list[float], scale: float, name: str, dtype: torch.dtype
) -> None:
    """All agree with float64, with an error in proportion to precision times condition."""
    logs = [*logs, 0.0]
    values = 10.0 ** torch.tensor(logs, dtype=torch.float64)
    matrix = (scale * spectral(values)).to(dtype)
    condition = float(values.max() / values.min())
    # what is added where nothing is asked for: 1e-6 for the tables, 8 precisions for the others
    ridge = {"schulz": 1e-6}.get(name.split()[0], 8 * torch.finfo(dtype).eps)
    ridge = 0.0 if name in ("eigh", "auto") else ridge
    size = float(matrix.double().norm() if not name.startswith("higher") else 0.0)
    if name.startswith("higher"):
        size = float(matrix.double().abs().sum(-1).amax())
    for exponent in (0.5, 0.25):
        root = SOLVERS[name][0](0.0)(matrix, exponent)
        expected = exact(matrix, exponent, ridge * size)
        assert root.ok
        tolerance = 1e-4 if "schulz" in name else 1e-5
        assert relative(root.value, expected) < tolerance + 20 * condition * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("condition", "bounds"),
    [
        (1e2, {"eigh": 3e-6, "newton": 1e-5, "db": 1e-5, "schulz cans": 1e-4, "schulz": 1e-5}),
        (1e4, {"eigh": 3e-4, "newton": 3e-4, "db": 5e-4, "schulz cans": 5e-4, "schulz": 5e-4}),
        (1e6, {"eigh": 3e-2, "newton": 2e-2, "db": 5e-2, "schulz cans": 5e-2, "schulz": 5e-2}),
    ],
)
def test_float32_accuracy_at_size_256(condition: float, bounds: dict[str, float]) -> None:
    """The errors of A^(-1/4) in float32 that are known for these methods, with room."""
    matrix = spectral(log_spectrum(256, condition)).float()
    for name, bound in bounds.items():
        solver = SOLVERS[name][0](1e-6)
        # all damp by 1e-6 at least; what the relative part adds is counted in
        ridge = 1e-6 if name == "eigh" else max(1e-6, 1e-6 * float(matrix.norm()))
        root = solver(matrix, 0.25)
        assert root.ok
        assert relative(root.value, exact(matrix, 0.25, ridge)) < bound, name


@pytest.mark.parametrize("exponent", [0.5, 0.25, 0.3, 2.0])
def test_chebyshev_is_the_offset_power(exponent: float) -> None:
    """It approximates (A + offset s)^(-p) as well as its residual says."""
    values = log_spectrum(20, 1e8)
    matrix = spectral(values)
    size = min(float(matrix.norm()), float(matrix.abs().sum(-1).amax()))
    # a steeper power needs a higher degree
    for offset, degree in ((1e-1, 20), (1e-2, 40 if exponent < 1 else 100)):
        root = linalg.chebyshev_root(0.0, offset=offset, degree=degree)(matrix, exponent)
        expected = exact(matrix, exponent, offset * size)
        assert root.ok
        assert 0 < root.residual < 1e-2
        assert torch.linalg.matrix_norm(
            exact(matrix, -exponent, offset * size) @ root.value - torch.eye(20), 2
        ) <= 1.01 * float(root.residual)
        assert relative(root.value, expected) < 1e-2


def test_cholesky_whitens() -> None:
    """W A W^T = I, W^T W = A^(-1), W is triangular; no other exponent than 1/2."""
    matrix = spectral(log_spectrum(10, 1e3))
    root = linalg.cholesky_root(0.0, relative_epsilon=0.0)(matrix, 0.5)
    eye = torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(root.value @ matrix @ root.value.mT, eye)
    torch.testing.assert_close(root.value.mT @ root.value, torch.linalg.inv(matrix))
    assert torch.equal(root.value, root.value.tril())
    assert root.ok and root.residual < 1e-12


def test_newton_follows_the_textbook() -> None:
    """The coupled iteration, written out in float64, to 1e-12; it stops at the same step."""
    matrix = spectral(log_spectrum(6, 1e4))
    for p, epsilon, tolerance in ((2, 1e-4, 1e-12), (4, 1e-6, 1e-6), (3, 0.0, 1e-3)):
        eye = torch.eye(6, dtype=torch.float64)
        ridged = matrix + epsilon * eye
        z = (p + 1) / (2 * torch.linalg.matrix_norm(ridged))
        root, product = z ** (1 / p) * eye, z * ridged
        for _ in range(200):
            if (product - eye).abs().max() <= tolerance:
                break
            factor = (1 + 1 / p) * eye - product / p
            root, product = root @ factor, torch.linalg.matrix_power(factor, p) @ product
        solver = linalg.newton_root(epsilon, tolerance=tolerance, max_iterations=200)
        assert relative(solver(matrix, 1 / p).value, root) < 1e-11


def test_higher_order_needs_fewer_steps() -> None:
    """At equal steps a higher order is closer, and order 2 is Newton with another scale."""
    matrix = spectral(log_spectrum(8, 1e3))
    errors = [
        relative(
            linalg.higher_order_newton_root(0.0, order=order, iterations=5)(matrix, 0.25).value,
            exact(matrix, 0.25),
        )
        for order in (2, 3, 4, 5)
    ]
    assert errors == sorted(errors, reverse=True)


def test_relative_damping_follows_the_norm() -> None:
    """A scaled matrix with relative damping has the scaled root."""
    matrix = spectral(torch.tensor([1.0, 0.5, 0.0, 0.0]))
    for make in (linalg.newton_root, linalg.newton_db_root, linalg.newton_schulz_root):
        solver = make(0.0, relative_epsilon=1e-4)
        one, many = solver(matrix, 0.5), solver(1e12 * matrix, 0.5)
        torch.testing.assert_close(many.value * 1e6, one.value, rtol=1e-9, atol=1e-9)
        # (1e-4 |A|_F)^(-1/2) in the null space
        assert float(torch.linalg.eigvalsh(one.value)[-1]) == pytest.approx(
            (1e-4 * float(matrix.norm())) ** -0.5, rel=1e-4
        )


# --- hostile input ----------------------------------------------------------------------------

ELEMENTS = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, 1.0, -1.0, 1e-30, 1e30, 3e38, 1e-40, math.nan, math.inf]),
)


@st.composite
def hostile(draw: Callable[[Any], Any]) -> Tensor:
    """A stack of small matrices: arbitrary symmetric ones, of low rank, scaled, negative, zero."""
    size = draw(st.integers(0, 4))
    stack = []
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["elements", "low rank", "spectrum"]))
        if kind == "elements" or size == 0:
            flat = [draw(ELEMENTS) for _ in range(size * size)]
            matrix = torch.tensor(flat, dtype=torch.float64).reshape(size, size)
            matrix = matrix.tril() + matrix.tril(-1).mT if draw(st.booleans()) else matrix
        elif kind == "low rank":
            thin = torch.tensor([draw(st.floats(-3, 3)) for _ in range(size)])
            matrix = torch.outer(thin, thin).double() * 10.0 ** draw(st.integers(-37, 37))
        else:
            signs = [draw(st.sampled_from([-1.0, 0.0, 1.0, 1.0])) for _ in range(size)]
            logs = [draw(st.floats(-12, 0)) for _ in range(size)]
            values = torch.tensor(signs) * 10.0 ** torch.tensor(logs)
            matrix = spectral(values) * 10.0 ** draw(st.integers(-37, 37))
        stack.append(matrix)
    return torch.stack(stack) if stack else torch.zeros(0, size, size, dtype=torch.float64)


@every_solver
@settings(max_examples=60)
@given(
    hostile(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from([0.0, 1e-30, 1e-12, 1e-3]),
)
def test_never_raises_and_never_hides_a_nan(
    name: str, matrix: Tensor, dtype: torch.dtype, epsilon: float
) -> None:
    """Where ok is set, value and residual are finite; shapes and dtype are those of the input."""
    make, exponents = SOLVERS[name]
    for exponent in (*exponents[:2], 0.0):
        value, residual, ok = make(epsilon)(matrix.to(dtype), exponent)
        assert (value.shape, value.dtype) == (matrix.shape, dtype)
        assert residual.shape == ok.shape == matrix.shape[:-2]
        assert ok.dtype == torch.bool
        assert torch.isfinite(value[ok]).all() and torch.isfinite(residual[ok]).all()
        assert not torch.isnan(residual).any()
        sound = torch.isfinite(matrix.to(dtype)).all(-1).all(-1)
        assert not (ok & ~sound).any()


@every_solver
def test_exponent_zero_is_the_identity(name: str) -> None:
    """For every finite matrix, a zero one too."""
    root = SOLVERS[name][0](0.0)(torch.stack([torch.zeros(3, 3), torch.ones(3, 3)]), 0.0)
    assert torch.equal(root.value, torch.eye(3).expand(2, 3, 3))
    assert root.ok.all()


@every_solver
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_scale(name: str, scale: float) -> None:
    """The root of c A is c^(-p) that of A, at every scale that float32 has."""
    make, exponents = SOLVERS[name]
    matrix = spectral(log_spectrum(5, 1e2)).float()
    for exponent in exponents[:2]:
        if exponent == 1.0:
            continue
        one, scaled = make(0.0)(matrix, exponent), make(0.0)(matrix * scale, exponent)
        assert one.ok and scaled.ok
        assert relative(scaled.value, one.value.double() * scale**-exponent) < 2e-4


@every_solver
def test_rank_deficient_float32_with_default_damping(name: str) -> None:
    """An early factor, of rank 3 in 24 dimensions, has a root that can be used (not: exact)."""
    thin = torch.randn(24, 3)
    make = SOLVERS[name][0]
    solver = make(relative_epsilon=1e-6) if name in ("eigh", "auto") else make()
    for matrix in (thin @ thin.T, torch.zeros(24, 24), 1e-20 * thin @ thin.T):
        root = solver(matrix, 0.5)
        assert root.ok, (name, root.residual)
        assert torch.isfinite(root.value).all()


@every_solver
def test_members_of_a_stack_are_independent(name: str) -> None:
    """A NaN, an indefinite and an ill-conditioned neighbour change no bit of a root."""
    make, exponents = SOLVERS[name]
    easy = spectral(log_spectrum(6, 1e2)).float()
    hard = spectral(log_spectrum(6, 1e9)).float()
    negative, broken = -easy, torch.full((6, 6), math.nan)
    for exponent in exponents[:2]:
        stack = make(1e-6)(torch.stack([easy, broken, hard, negative]), exponent)
        other = make(1e-6)(torch.stack([easy, easy, easy, easy]), exponent)
        assert torch.equal(stack.value[0], other.value[0])
        assert torch.equal(stack.residual[0], other.residual[0])
        assert stack.ok[0] and not stack.ok[1]
        # eigh lifts a negative spectrum to begin at epsilon, as the reference does
        assert bool(stack.ok[3]) == (name in ("eigh", "auto"))


def test_indefinite_matrices_are_not_ok() -> None:
    """A clearly negative eigenvalue is found by every solver that has no eigenvalues."""
    values = torch.tensor([1.0, 0.9, 0.5, 0.2, -0.3], dtype=torch.float64)
    for name in SOLVERS:
        if name not in ("eigh", "auto"):
            assert not SOLVERS[name][0](1e-6)(spectral(values).float(), 0.5).ok, name


# --- exponents and parameters -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "exponent", "hint"),
    [
        (linalg.newton_root(), 0.3, "eigh_root"),
        (linalg.newton_root(), 2.0, "eigh_root"),
        (linalg.higher_order_newton_root(), math.pi / 7, "eigh_root"),
        (linalg.newton_db_root(), 1 / 3, "newton_root"),
        (linalg.newton_db_root(), 1.0, "newton_root"),
        (linalg.newton_schulz_root(), 1 / 6, "newton_root"),
        (linalg.cholesky_root(), 0.25, "eigh_root"),
    ],
)
def test_exponent_that_is_not_taken(solver: linalg.RootSolver, exponent: float, hint: str) -> None:
    """The error names the exponents that are taken, and a solver that takes this one."""
    for check in (solver.check_exponent, lambda p: solver(torch.eye(2), p)):
        with pytest.raises(HyperparameterError, match=hint):
            check(exponent)


@every_solver
def test_negative_exponents_are_refused(name: str) -> None:
    with pytest.raises(HyperparameterError, match="exponent"):
        SOLVERS[name][0]().check_exponent(-0.5)


def test_a_third_is_a_third() -> None:
    """1/3 in floating point is no fraction with a small denominator, but meant as one."""
    for solver in (linalg.newton_root(0.0), linalg.higher_order_newton_root(0.0)):
        matrix = torch.diag(torch.tensor([8.0, 1.0], dtype=torch.float64))
        torch.testing.assert_close(
            solver(matrix, 1 / 3).value.diagonal(), torch.tensor([0.5, 1.0]).double()
        )


def test_auto_chooses_by_device_size_and_exponent() -> None:
    """Eigh on a CPU; on CUDA Newton for large matrices and exponents that it takes."""
    auto, cpu, cuda = linalg.auto_root(1e-8), torch.device("cpu"), torch.device("cuda")
    assert auto.choose(cpu, 1024, 0.25) == linalg.eigh_root(1e-8)
    assert auto.choose(cuda, 1024, 0.25) == linalg.newton_root(1e-8, iterations=20)
    assert auto.choose(cuda, 16, 0.25) == linalg.eigh_root(1e-8)
    assert auto.choose(cuda, 1024, 0.3) == linalg.eigh_root(1e-8)


# --- iteration --------------------------------------------------------------------------------


def test_a_growing_error_keeps_the_iterate_before() -> None:
    """Steps that worsen the error are not taken, whatever the number of iterations."""
    errors = iter([0.8, 0.4, 0.45, 0.2, 0.9, 0.01])
    start = iteration.begin((torch.zeros(1, 1, 1),), torch.tensor([1.0]), 0.0)

    def step(matrices: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        return (matrices[0] + 1,), torch.tensor([next(errors)])

    end = iteration.run(step, start, iteration.Stopping(6, 0.0, 100))
    # 0.45 is within the growth that is allowed, 0.9 is not, and nothing counts after it
    assert end.matrices[0].item() == 4 and end.error.item() == pytest.approx(0.2)
    assert end.diverged.item() and not end.active.item()


@pytest.mark.parametrize(
    ("name", "exponent"), [(name, e) for name in TOLERANT for e in SOLVERS[name][1] if e >= 0.25]
)
def test_equal_gradients_are_no_divergence(name: str, exponent: float) -> None:
    """A first factor of rank one, all of its elements alike, is the case at every first step.

    The largest element of |M - I| is small there at the start, and grows before it shrinks.
    """
    make, _ = SOLVERS[name]
    for size in (2, 3, 5, 8):
        matrix = torch.ones(size, size, dtype=torch.float64)
        root = make(1e-4)(matrix, exponent)
        expected = linalg.eigh_root(1e-4)(matrix, exponent).value
        assert root.ok
        torch.testing.assert_close(root.value, expected, rtol=0, atol=1e-4 * expected.max().item())


def test_more_iterations_do_no_harm() -> None:
    """Newton-DB is unstable once converged; its guard keeps 200 steps as good as 25."""
    matrix = spectral(log_spectrum(32, 1e4)).float()
    few, many = (linalg.newton_db_root(1e-6, iterations=k)(matrix, 0.25) for k in (25, 200))
    assert many.ok and many.residual <= few.residual
    assert relative(many.value, exact(matrix, 0.25, 1e-6 * float(matrix.norm()))) < 1e-3


def test_fixed_iterations_damp_the_null_space() -> None:
    """K Newton steps give a zero eigenvalue the gain (2.5 / |A|)^(1/4) 1.25^k for p = 4."""
    values = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    root = linalg.newton_root(0.0, relative_epsilon=0.0, iterations=10)(spectral(values), 0.25)
    gain = (2.5 / float(values.norm())) ** 0.25 * 1.25**10
    assert root.ok and root.residual > 0.3
    assert float(torch.linalg.eigvalsh(root.value)[-1]) == pytest.approx(gain, rel=1e-6)


def test_tolerance_form_stops_early() -> None:
    """A loose tolerance leaves a larger residual than a tight one, both below theirs."""
    matrix = spectral(log_spectrum(8, 1e3))
    for make in (linalg.newton_root, linalg.newton_db_root):
        loose, tight = (make(0.0, tolerance=t)(matrix, 0.25) for t in (1e-1, 1e-10))
        assert 1e-10 < loose.residual <= 1e-1 and tight.residual <= 1e-10
    unfinished = linalg.newton_root(0.0, tolerance=1e-6, max_iterations=3)(matrix, 0.25)
    assert not unfinished.ok and unfinished.residual > 0.1


# --- eigh -------------------------------------------------------------------------------------


def test_eigh_keeps_the_bits_of_torch() -> None:
    """On one thread, for every shape, values and vectors are torch.linalg.eigh's."""
    for shape in ((3, 3), (4, 5, 5), (2, 3, 6, 6), (3, 200, 200)):
        matrix = torch.randn(shape)
        matrix = matrix @ matrix.mT
        values, vectors, residual = linalg.eigh(matrix)
        expected = torch.linalg.eigh(matrix)
        assert torch.equal(values, expected[0]) and torch.equal(vectors, expected[1])
        assert vectors.stride() == expected[1].stride()
        assert (residual < 1e-5).all()


def test_eigh_spread_over_threads() -> None:
    """Workers of one thread each return the bits of one thread, and the setting stays."""
    matrix = torch.randn(7, 96, 96)
    matrix = matrix @ matrix.mT
    expected = torch.linalg.eigh(matrix)
    torch.set_num_threads(2)
    try:
        values, vectors, _ = linalg.eigh(matrix)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert torch.equal(values, expected[0]) and torch.equal(vectors, expected[1])


def test_eigh_that_fails_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK gives up on a matrix: that one is NaN, or found in float64 if that was asked for."""
    matrix = torch.stack([spectral(log_spectrum(4, 10), seed).float() for seed in range(3)])
    real, failure = torch.linalg.eigh, torch.linalg.LinAlgError  # type: ignore[attr-defined]

    def failing(stack: Tensor, **out: Any) -> Any:
        if stack.dtype == torch.float32 and (stack == matrix[1]).all(-1).all(-1).any():
            raise failure("linalg.eigh: the algorithm failed to converge")
        return real(stack, **out)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors, residual = linalg.eigh(matrix)
    assert torch.isnan(values[1]).all() and torch.isnan(vectors[1]).all()
    assert residual[1] == math.inf and (residual[[0, 2]] < 1e-5).all()
    once = linalg.eigh_root(0.0, retry_double=False)(matrix, 0.5)
    assert once.ok.tolist() == [True, False, True]
    again = linalg.eigh_root(0.0)(matrix, 0.5)
    assert again.ok.all() and relative(again.value[1], exact_by(real, matrix[1])) < 1e-5


def exact_by(eigh: Callable[..., Any], matrix: Tensor) -> Tensor:
    values, vectors = eigh(matrix.double())
    return (vectors * values.pow(-0.5)) @ vectors.mT


def test_large_residual_is_retried_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong decomposition is found by its residual: decomposed again, or not ok."""
    matrix = spectral(log_spectrum(5, 10)).float()
    real = torch.linalg.eigh

    def wrong(stack: Tensor, **out: Any) -> Any:
        result = real(stack, **out)
        if stack.dtype == torch.float32:
            out["out"][0].mul_(1.5)
        return result

    monkeypatch.setattr(torch.linalg, "eigh", wrong)
    bad = linalg.eigh_root(0.0, retry_double=False)(matrix, 0.5)
    assert not bad.ok and bad.residual > 0.01
    good = linalg.eigh_root(0.0)(matrix, 0.5)
    assert good.ok and relative(good.value, exact_by(real, matrix)) < 1e-5


def test_eigh_root_of_half_precision() -> None:
    """bfloat16 is decomposed in float32 and returned in bfloat16."""
    matrix = spectral(log_spectrum(4, 10)).bfloat16()
    root = linalg.eigh_root(0.0)(matrix, 0.5)
    assert root.ok and root.value.dtype == torch.bfloat16
    assert relative(root.value, exact(matrix, 0.5)) < 1e-2


# --- transforms -------------------------------------------------------------------------------


@every_solver
def test_vmap_is_the_batch(name: str) -> None:
    """A mapped solver returns what the batched one does."""
    make, exponents = SOLVERS[name]
    stack = torch.stack([spectral(log_spectrum(5, 10.0**k), k) for k in range(1, 5)])
    solver = make(1e-6)
    mapped = torch.func.vmap(lambda m: tuple(solver(m, exponents[1 % len(exponents)])))(stack)
    for found, expected in zip(mapped, solver(stack, exponents[1 % len(exponents)]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    by_columns = torch.func.vmap(lambda m: solver(m, exponents[0]).value, in_dims=2)(
        stack.permute(1, 2, 0)
    )
    torch.testing.assert_close(by_columns, solver(stack, exponents[0]).value)


@every_solver
def test_gradient(name: str) -> None:
    """Reverse mode against differences; forward mode against reverse."""
    make, exponents = SOLVERS[name]
    base, direction = spectral(log_spectrum(4, 50)), spectral(torch.randn(4).double(), 1)
    # an early stop is no smooth function of the matrix: come close to the root
    tight = {"tolerance": 1e-13} if name in TOLERANT else {}
    solver = make(1e-3, **tight)

    def function(x: Tensor) -> Tensor:
        return (solver(base + x * direction, exponents[0]).value ** 3).sum()

    x, h = torch.zeros((), dtype=torch.float64), 1e-6
    slope = torch.func.grad(function)(x)
    torch.testing.assert_close(
        slope, (function(x + h) - function(x - h)) / (2 * h), rtol=1e-5, atol=1e-7
    )
    forward = torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(forward, slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["reverse", "forward", "forward over reverse", "reverse forward"])
def test_second_derivatives_of_eigh_root(name: str) -> None:
    """All four orders of differentiation agree with differences of the gradient."""
    forward: Any = torch.func.jacfwd
    reverse: Any = torch.func.jacrev
    outer, inner = {
        "reverse": (reverse, reverse),
        "forward": (forward, forward),
        "forward over reverse": (forward, reverse),
        "reverse forward": (reverse, forward),
    }[name]
    thin, root = torch.randn(4, 3, dtype=torch.float64), linalg.eigh_root(1e-3)

    def function(x: Tensor) -> Tensor:
        scaled = thin * x
        return (
            root(scaled @ scaled.T + torch.diag(torch.arange(4.0).double()), 0.25)[0] ** 3
        ).sum()

    x, h = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), 1e-5
    gradient: Any = torch.func.grad(function)
    numeric = torch.stack(
        [(gradient(x + h * e) - gradient(x - h * e)) / (2 * h) for e in torch.eye(3).double()]
    )
    torch.testing.assert_close(outer(inner(function))(x), numeric, rtol=1e-4, atol=1e-5)


def _compiled(solver: linalg.RootSolver, exponent: float, matrix: Tensor, backend: str) -> Any:
    with fresh_compiler(backend) as counter:
        compiled = whole_graph(lambda m: tuple(solver(m, exponent)), counter)
        found = compiled(matrix)
        compiled(2 * matrix)
        assert graph_count(compiled) == 1
    return found


@every_solver
def test_compiled_as_one_graph(name: str) -> None:
    """Compiled equals eager, the tolerance forms with their while_loop too."""
    make, exponents = SOLVERS[name]
    solver, matrix = make(1e-6), torch.stack([spectral(log_spectrum(5, 10.0**k)) for k in (1, 3)])
    found = _compiled(solver, exponents[0], matrix, "aot_eager")
    for a, b in zip(found, solver(matrix, exponents[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    """One solver of each kind: an opaque operation, a while_loop, a plain sequence."""
    matrix = torch.stack([spectral(log_spectrum(5, 10.0**k)) for k in (1, 3)])
    for name in ("eigh", "newton", "schulz cans", "cholesky"):
        solver = SOLVERS[name][0](1e-6)
        found = _compiled(solver, 0.5, matrix, BACKEND)
        for a, b in zip(found, solver(matrix, 0.5), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["eigh", "newton fixed", "newton"])
def test_compiled_inside_transforms(name: str) -> None:
    """vmap, and grad, inside one compiled graph."""
    limit = {"max_iterations": 12} if name == "newton" else {}
    solver = SOLVERS[name][0](1e-6, **limit)
    stack = torch.stack([spectral(log_spectrum(3, 10.0**k)) for k in (1, 2)])

    def mapped(stack: Tensor) -> Tensor:
        return torch.func.vmap(lambda m: solver(m, 0.5).value)(stack)

    def slopes(stack: Tensor) -> Tensor:
        return torch.func.grad(lambda m: solver(m, 0.5).value.square().sum())(stack)

    for function in (mapped, slopes):
        with fresh_compiler("aot_eager") as counter:
            found = whole_graph(function, counter)(stack)
        torch.testing.assert_close(found, function(stack), rtol=1e-8, atol=1e-10)


def test_damping_by_tensor() -> None:
    """Epsilon may be a 0-d tensor, and the derivative by it is that of the power."""
    matrix = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
    for name in ("eigh", "newton", "db", "schulz", "cholesky", "chebyshev"):

        def trace(epsilon: Tensor, name: str = name) -> Tensor:
            return SOLVERS[name][0](epsilon)(matrix, 0.5).value.diagonal(dim1=-2, dim2=-1).sum()

        slope = torch.func.grad(trace)(torch.tensor(0.5, dtype=torch.float64))
        expected = -0.5 * (1.5**-1.5 + 2.5**-1.5)
        rough = {"chebyshev": 0.05, "schulz": 1e-5}.get(name, 1e-5)
        assert float(slope) == pytest.approx(expected, rel=rough), name
