"""Polar factors: against other formulas, at every scale, and through every transform."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import fresh_compiler, graph_count, whole_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import shampoo_func as sf
from shampoo_func import linalg
from shampoo_func.errors import HyperparameterError
from shampoo_func.linalg.polar_coefficients import (
    POLAR_EXPRESS,
    POLAR_SETS,
    Coefficients,
    check_stages,
    singular_values_after,
    with_safety,
)

SHAPES = [(4, 4), (7, 3), (3, 7), (1, 5), (5, 1), (2, 5, 3), (2, 3, 4, 6)]
# The set that was published first for another scaling, and that must never be shipped.
OLD_AOL = (
    (4.0098, -7.0585, 2.4635),
    (3.4585, -5.5479, 2.5959),
    (2.7573, -3.2939, 1.4254),
    (2.7215, -3.0494, 1.3169),
)
METHODS: dict[str, Callable[[], linalg.PolarMethod]] = {
    "svd": sf.svd_polar,
    "svd_nuclear": lambda: sf.svd_polar(scale_by_nuclear_norm=True),
    "muon": sf.newton_schulz_polar,
    "express": lambda: sf.polar_express(8),
}
every_method = pytest.mark.parametrize(
    "method", [pytest.param(METHODS[m](), id=m) for m in METHODS]
)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers of float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def polar_by_eigh(matrix: Tensor) -> Tensor:
    """Return G (G^T G)^(-1/2), or (G G^T)^(-1/2) G where G is wide."""
    wide = matrix.shape[-2] < matrix.shape[-1]
    gram = matrix @ matrix.mT if wide else matrix.mT @ matrix
    values, vectors = torch.linalg.eigh(gram)
    root = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
    return root @ matrix if wide else matrix @ root


def newton_schulz_by_hand(matrix: Tensor, stages: Coefficients, floor: float = 1e-8) -> Tensor:
    """Return the iteration as the reference writes it, for one matrix."""
    x = matrix / torch.clamp(torch.linalg.matrix_norm(matrix), min=floor)
    wide = x.shape[0] < x.shape[1]
    x = x.T if wide else x
    for a, b, c in stages:
        gram = x.T @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x.T if wide else x


def with_singular_values(rows: int, columns: int, values: Tensor, seed: int = 0) -> Tensor:
    """Return a random matrix that has the given singular values."""
    left, _ = torch.linalg.qr(random(rows, len(values), seed=seed))
    right, _ = torch.linalg.qr(random(columns, len(values), seed=seed + 1))
    return (left * values) @ right.T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svd_is_the_polar_factor(shape: tuple[int, ...]) -> None:
    """U V^T is G (G^T G)^(-1/2); its length is the nuclear norm where that is asked for."""
    g = random(*shape)
    expected = polar_by_eigh(g)
    torch.testing.assert_close(sf.svd_polar()(g), expected, rtol=1e-10, atol=1e-12)
    nuclear = torch.linalg.svdvals(g).sum(-1)[..., None, None]
    scaled = sf.svd_polar(scale_by_nuclear_norm=True)(g)
    torch.testing.assert_close(scaled, nuclear * expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", POLAR_SETS)
def test_newton_schulz_is_the_reference_iteration(shape: tuple[int, ...], name: str) -> None:
    """Batched, without a transpose, with fused products: the same numbers in float64."""
    method = sf.newton_schulz_polar(coefficients=name)
    g = random(*shape)
    flat = g.reshape(-1, *shape[-2:])
    expected = torch.stack([newton_schulz_by_hand(one, method.stages) for one in flat])
    torch.testing.assert_close(method(g), expected.reshape(shape), rtol=1e-9, atol=1e-11)


def test_defaults_are_those_of_muon() -> None:
    """Five times the same triple, as in the reference, however it is spelled."""
    triple = (3.4445, -4.7750, 2.0315)
    default = sf.newton_schulz_polar()
    assert default.stages == (triple,) * 5
    assert default == sf.newton_schulz_polar(5, triple) == sf.newton_schulz_polar(5, [triple])
    assert default == sf.newton_schulz_polar(coefficients=triple)
    assert len(sf.newton_schulz_polar(2, "quintic").stages) == 2
    longer = sf.newton_schulz_polar(7, "quintic").stages
    assert longer[4:] == (POLAR_SETS["quintic"].stages[-1],) * 3


# Measured in exact arithmetic: set, stages, and where [0.01, 1] and [0.001, 1] end up.
RANGES: list[tuple[str, tuple[float, float], tuple[float, float]]] = [
    ("muon", (0.68, 1.14), (0.47, 1.21)),
    ("quintic", (0.97, 1.04), (0.47, 1.15)),
    ("polar_express", (0.999999, 1.000001), (0.999999, 1.000001)),
    ("dion", (0.85, 1.15), (0.85, 1.15)),
    ("cans", (0.86, 1.12), (0.86, 1.12)),
    ("turbo", (0.94, 1.06), (0.14, 1.06)),
    ("cubic", (0.77, 1.301), (0.11, 1.301)),
    ("deepseek", (0.9999, 1.001), (0.9999, 1.001)),
    ("modula", (0.995, 1.0), (0.86, 1.0)),
]


@pytest.mark.parametrize(("name", "hundredth", "thousandth"), RANGES, ids=lambda v: str(v)[:12])
def test_ranges_of_singular_values(
    name: str, hundredth: tuple[float, float], thousandth: tuple[float, float]
) -> None:
    """Every set takes singular values where its documentation says, in numbers and matrices."""
    stages = sf.newton_schulz_polar(coefficients=name).stages
    for lower, (low, high) in ((1e-2, hundredth), (1e-3, thousandth)):
        grid = [lower ** (i / 5000) for i in range(5001)]
        after = singular_values_after(stages, grid)
        assert low <= min(after) < low + 0.02
        assert high - 0.02 < max(after) <= high
    values = torch.tensor([1.0, 0.6, 0.3, 0.03, 0.01], dtype=torch.float64)
    g = with_singular_values(6, 9, values)
    found = torch.linalg.svdvals(sf.newton_schulz_polar(coefficients=name)(g))
    expected = singular_values_after(stages, (values / values.norm()).tolist())
    torch.testing.assert_close(found[:5], torch.tensor(sorted(expected, reverse=True)).double())
    assert {name for name, *_ in RANGES} == set(POLAR_SETS)


@pytest.mark.parametrize("name", POLAR_SETS)
def test_no_set_goes_uphill(name: str) -> None:
    """At 1 every stage of every set is positive, and a gradient of rank 1 is followed downhill."""
    stages, safety = POLAR_SETS[name]
    assert sum(stages[0]) > 0
    assert all(v > 0 for v in singular_values_after(stages[:1], [i / 100 for i in range(1, 101)]))
    edge = [1 + i / 1000 for i in range(6)]
    assert all(0.5 < v < 1.5 for v in singular_values_after(with_safety(stages, safety), edge))
    for dtype, seed in itertools.product((torch.float32, torch.bfloat16), range(5)):
        method = sf.newton_schulz_polar(coefficients=name, compute_dtype=dtype)
        u, v = random(40, 1, seed=seed).sign().float(), random(1, 30, seed=seed + 9).float()
        alignment = float((method(u @ v) * (u @ v)).sum() / (u.norm() * v.norm()))
        assert 0.5 < alignment < 1.5, (dtype, seed, alignment)


def test_sets_that_go_uphill_are_refused() -> None:
    """The old AOL set flips the sign at 1; two others do where rounding lifts it above 1."""
    assert sum(OLD_AOL[0]) < 0
    assert not any(OLD_AOL[0] in stages for stages, _ in POLAR_SETS.values())
    with pytest.raises(HyperparameterError, match=r"take the singular value 1 to -0\.9"):
        sf.newton_schulz_polar(coefficients=OLD_AOL)
    for name in ("cans", "cubic", "polar_express"):
        with pytest.raises(HyperparameterError, match=r"safety=1\.01"):
            sf.newton_schulz_polar(coefficients=name, safety=1.0)


def test_polar_express_generator_makes_the_published_table() -> None:
    """The table that is kept is what the generator computes."""
    for computed, kept in zip(sf.linalg.polar_express_coefficients(8), POLAR_EXPRESS, strict=True):
        assert computed == pytest.approx(kept, abs=1e-9)
    tail = sf.linalg.polar_express_coefficients(12)[8:]
    assert tail == ((1.875, -1.25, 0.375),) * 4
    named = sf.newton_schulz_polar(coefficients="polar_express").stages
    for computed, kept in zip(sf.polar_express(8).stages, named, strict=True):
        assert computed == pytest.approx(kept, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-8, 1.0), st.integers(1, 10))
def test_polar_express_for_every_interval(lower: float, iterations: int) -> None:
    """Whatever the interval: positive, bounded, and ever nearer to 1."""
    stages = sf.linalg.polar_express_coefficients(iterations, lower=lower)
    check_stages(with_safety(stages, 1.01))
    grid = [lower ** (i / 200) for i in range(201)]
    errors = [
        max(abs(1 - v) for v in singular_values_after(stages[:count], grid))
        for count in range(iterations + 1)
    ]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(errors))
    # without the cushion, which gives up some speed at the bottom for the middle
    if lower > 0.03:
        assert errors[-1] <= (1 - lower**2) ** (3**iterations) + 1e-9


def test_polar_express_stage_is_the_best_polynomial() -> None:
    """No odd polynomial of degree 5 is nearer to 1 on the interval, up to the centring."""
    lower = 0.1
    ((a, b, c),) = sf.linalg.polar_express_coefficients(1, lower=lower)
    x = torch.linspace(lower, 1, 2001, dtype=torch.float64)
    values = a * x + b * x**3 + c * x**5
    error = (1 - values).abs()
    # the error takes its maximum four times with alternating sign (Chebyshev's criterion)
    extreme = (error > error.max() - 1e-4).nonzero().flatten()
    signs = (1 - values)[extreme].sign()
    changes = int((signs[1:] != signs[:-1]).sum())
    assert changes == 3
    assert float(values[0] + values[-1]) == pytest.approx(2.0, abs=1e-12)


@every_method
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_every_scale_is_finite(method: linalg.PolarMethod, scale: float) -> None:
    """From 1e-30 to 1e30 in float32 nothing overflows, and only a floored norm shrinks."""
    g = random(5, 3).float()
    found = method(scale * g)
    assert torch.isfinite(found).all()
    if isinstance(method, linalg.SvdPolar):
        expected = method(g) * (scale if method.scale_by_nuclear_norm else 1.0)
        torch.testing.assert_close(found / found.abs().max(), expected / expected.abs().max())
    elif scale > 1e-9:
        torch.testing.assert_close(found, method(g), rtol=1e-4, atol=1e-5)
    else:
        assert (found * g).sum() > 0
        free = sf.newton_schulz_polar(epsilon=0.0)
        torch.testing.assert_close(free(scale * g), free(g), rtol=1e-4, atol=1e-5)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_zero_empty_and_not_finite(method: linalg.PolarMethod, dtype: torch.dtype) -> None:
    """Zero gives zero, nothing gives nothing, and a poisoned matrix is NaN on its own."""
    zero = torch.zeros(2, 3, 4, dtype=dtype)
    assert torch.equal(method(zero), zero)
    for shape in ((0, 3), (3, 0), (0, 2, 2)):
        assert method(torch.zeros(shape, dtype=dtype)).shape == shape
    for poison in (math.nan, math.inf, -math.inf):
        stack = random(3, 4, 2).to(dtype)
        clean = method(stack)
        stack[1, 2, 0] = poison
        found = method(stack)
        assert found.dtype == dtype
        assert torch.isnan(found[1]).all()
        torch.testing.assert_close(found[::2], clean[::2], rtol=1e-2, atol=1e-3)


def test_half_precision_is_computed_in_float32_unless_asked() -> None:
    """The result of a bfloat16 matrix is that of float32, rounded once at the end."""
    g = random(16, 12).to(torch.bfloat16)
    for method in (sf.newton_schulz_polar(), sf.svd_polar()):
        assert torch.equal(method(g), method(g.float()).to(torch.bfloat16))
    coarse = sf.newton_schulz_polar(compute_dtype=torch.bfloat16)(g.float())
    exact = sf.newton_schulz_polar()(g.float())
    assert coarse.dtype == torch.float32
    assert 1e-4 < float((coarse - exact).abs().max()) < 5e-2
    double = sf.newton_schulz_polar(compute_dtype=torch.float64)(g.float())
    assert double.dtype == torch.float32


def test_low_rank_has_no_arbitrary_directions() -> None:
    """What has no singular value gets nothing: the partial isometry, the same for every basis."""
    for dtype, (rows, columns) in itertools.product(
        (torch.float32, torch.float64), ((6, 6), (8, 5), (5, 8))
    ):
        values = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
        g = with_singular_values(rows, columns, values)
        expected = with_singular_values(rows, columns, torch.ones_like(values))
        found = sf.svd_polar()(g.to(dtype))
        torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=1e-5)
        assert int((torch.linalg.svdvals(found) > 0.5).sum()) == 3
    cut = sf.svd_polar(relative_tolerance=0.2)(g)
    assert int((torch.linalg.svdvals(cut) > 0.5).sum()) == 2


def slope(function: Callable[[Tensor], Tensor], at: Tensor, along: Tensor) -> Tensor:
    """Return the derivative along a direction by central differences."""
    h = 1e-6
    return (function(at + h * along) - function(at - h * along)) / (2 * h)


POINTS = {
    "square": random(4, 4),
    "tall": random(2, 6, 3),
    "wide": random(3, 6),
    "repeated": 2 * torch.linalg.qr(random(5, 3))[0],
    "diagonal": torch.diag(torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64)),
}


@every_method
@pytest.mark.parametrize("point", POINTS)
def test_derivatives(method: linalg.PolarMethod, point: str) -> None:
    """Forward and reverse derivatives are those of finite differences, also where values repeat."""
    g = POINTS[point]
    along, weight = random(*g.shape, seed=5), random(*g.shape, seed=6)
    numeric = slope(method, g, along)
    tangent = torch.func.jvp(method, (g,), (along,))[1]
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-7)
    gradient = torch.func.grad(lambda x: (method(x) * weight).sum())(g)
    torch.testing.assert_close((gradient * along).sum(), (numeric * weight).sum())


def test_derivatives_of_low_rank() -> None:
    """Along changes that keep the rank, the derivative is that of the partial isometry."""
    method = sf.svd_polar()
    for rows, columns in ((6, 6), (7, 5), (4, 6)):
        left, right = random(rows, 2, seed=1), random(2, columns, seed=2)
        dleft, dright = random(rows, 2, seed=3), random(2, columns, seed=4)
        h = 1e-6

        def at(t: float, a: Any = (left, dleft), b: Any = (right, dright)) -> Tensor:
            return (a[0] + t * a[1]) @ (b[0] + t * b[1])

        numeric = (method(at(h)) - method(at(-h))) / (2 * h)
        along = dleft @ right + left @ dright
        tangent = torch.func.jvp(method, (at(0.0),), (along,))[1]
        torch.testing.assert_close(tangent, numeric, rtol=1e-5, atol=1e-6)
        weight = random(rows, columns, seed=9)
        gradient = torch.func.grad(lambda x, w=weight: (method(x) * w).sum())(at(0.0))
        torch.testing.assert_close((gradient * along).sum(), (tangent * weight).sum())


@every_method
def test_second_derivatives_and_vmap(method: linalg.PolarMethod) -> None:
    """Two derivatives, and one call per matrix or one for all."""
    g = random(4, 3)
    torch.autograd.gradcheck(method, g.clone().requires_grad_())
    torch.autograd.gradgradcheck(method, g.clone().requires_grad_())
    stack = random(5, 4, 3)
    apart = torch.stack([method(one) for one in stack])
    torch.testing.assert_close(torch.func.vmap(method)(stack), apart)
    torch.testing.assert_close(method(stack), apart)

    def total(x: Tensor) -> Tensor:
        return method(x).sum()

    together = torch.func.vmap(torch.func.grad(total))(stack)
    torch.testing.assert_close(together, torch.stack([torch.func.grad(total)(x) for x in stack]))


@pytest.mark.slow
@every_method
def test_compiles(method: linalg.PolarMethod) -> None:
    """Value, gradient and jvp are one graph each, equal to eager."""
    g = random(4, 3)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: (method(y) * g).sum())(x)

    def forward(x: Tensor) -> Tensor:
        return torch.func.jvp(method, (x,), (g,))[1]

    for function in (method, gradient, forward):
        with fresh_compiler("aot_eager") as counter:
            compiled = whole_graph(function, counter)
            torch.testing.assert_close(compiled(2 * g + 1), function(2 * g + 1))
            assert graph_count(compiled) == 1


BAD: dict[str, Callable[[], object]] = {
    "no such set": lambda: sf.newton_schulz_polar(coefficients="aol"),
    "a pair": lambda: sf.newton_schulz_polar(coefficients=((1.0, 2.0),)),  # type: ignore[arg-type]
    "no stages": lambda: sf.newton_schulz_polar(coefficients=()),
    "a number": lambda: sf.newton_schulz_polar(coefficients=3.0),  # type: ignore[arg-type]
    "NaN": lambda: sf.newton_schulz_polar(coefficients=(math.nan, 0.0, 0.0)),
    "a tensor": lambda: sf.newton_schulz_polar(coefficients=(torch.ones(()), 0.0, 0.0)),  # type: ignore[arg-type]
    "diverging": lambda: sf.newton_schulz_polar(coefficients=(30.0, 5.0, 0.0)),
    "no iterations": lambda: sf.newton_schulz_polar(0),
    "safety": lambda: sf.newton_schulz_polar(safety=0.9),
    "epsilon": lambda: sf.newton_schulz_polar(epsilon=-1.0),
    "integers": lambda: sf.newton_schulz_polar(compute_dtype=torch.int64),
    "lower": lambda: sf.polar_express(lower=0.0),
    "stages": lambda: sf.polar_express(0),
    "tolerance": lambda: sf.svd_polar(relative_tolerance=-1.0),
    "svd in bfloat16": lambda: sf.svd_polar(compute_dtype=torch.bfloat16),
    "method": lambda: sf.polar("svd"),  # type: ignore[arg-type]
    "scale": lambda: sf.polar(scale="adam"),  # type: ignore[arg-type]
    "sign scale": lambda: sf.sign_preconditioner("max"),  # type: ignore[arg-type]
    "reduce": lambda: sf.scalar_second_moment(reduce="max"),  # type: ignore[arg-type]
    "moment dtype": lambda: sf.second_moment(dtype=torch.int8),
    "where": lambda: sf.muon(0.1, where="w"),  # type: ignore[arg-type]
    "momentum": lambda: sf.muon(0.1, momentum=1.0),
    "sign momentum": lambda: sf.sign_sgd(0.1, momentum=-0.1),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused(name: str) -> None:
    """Every wrong setting is a typed error when it is made, not when it is used."""
    with pytest.raises(HyperparameterError):
        BAD[name]()
