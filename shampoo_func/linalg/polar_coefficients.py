"""Coefficients of Newton-Schulz iterations for the polar factor, published and computed.

A stage (a, b, c) takes every singular value s of a matrix to p(s) = a s + b s^3 + c s^5. A set is
one stage per iteration. What it does to a matrix is what it does to the numbers in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from shampoo_func.errors import HyperparameterError, check_count, check_number

__all__ = [
    "POLAR_SETS",
    "Coefficients",
    "PolarSet",
    "polar_express_coefficients",
    "singular_values_after",
    "with_safety",
]

Triple = tuple[float, float, float]
Coefficients = tuple[Triple, ...]


class PolarSet(NamedTuple):
    """Stages, and the factor by which singular values are shrunk before all but the last.

    Some sets diverge, or flip the sign, where a singular value is only 0.1 percent above 1, as
    rounding to bfloat16 makes it; shrinking by 1.01 moves that edge out of reach.
    """

    stages: Coefficients
    safety: float = 1.0


_MUON: Triple = (3.4445, -4.7750, 2.0315)

# arXiv 2505.16932 (Polar Express) for singular values in [1e-3, 1]: what
# polar_express_coefficients(8, lower=1e-3) computes, kept to test one against the other.
POLAR_EXPRESS: Coefficients = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)

# Not here on purpose: the first set published for the AOL scaling, (4.0098, -7.0585, 2.4635) ...,
# whose first stage has p(1) < 0: a gradient of rank 1 would be followed uphill.
POLAR_SETS: dict[str, PolarSet] = {
    # Jordan et al., Muon (2024)
    "muon": PolarSet((_MUON,) * 5),
    # the stages by You Jiacheng that many training runs use
    "quintic": PolarSet(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    "polar_express": PolarSet(POLAR_EXPRESS, 1.01),
    # Polar Express for 5 stages with a safety of 2 percent in its numbers (Dion)
    "dion": PolarSet(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        )
    ),
    # arXiv 2506.10935 (CANS), 5 stages
    "cans": PolarSet(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        1.01,
    ),
    # 4 stages, made for matrices that are scaled more tightly than by the Frobenius norm
    "turbo": PolarSet(
        (
            (4.6051, -9.6552, 5.6769),
            (4.7505, -6.0861, 2.1790),
            (2.7763, -2.3190, 0.5523),
            (2.4231, -2.2861, 0.8193),
        )
    ),
    # arXiv 2606.00371: no fifth power, so two products per stage and not three
    "cubic": PolarSet(
        (
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
        1.01,
    ),
    # Muon's stage 8 times, and twice one that converges (DeepSeek-V4)
    "deepseek": PolarSet((_MUON,) * 8 + ((2.0, -1.5, 0.5),) * 2),
    "modula": PolarSet(
        (
            (3955 / 1024, -8306 / 1024, 5008 / 1024),
            (3735 / 1024, -6681 / 1024, 3463 / 1024),
            (3799 / 1024, -6499 / 1024, 3211 / 1024),
            (4019 / 1024, -6385 / 1024, 2906 / 1024),
            (2677 / 1024, -3029 / 1024, 1162 / 1024),
            (2172 / 1024, -1833 / 1024, 682 / 1024),
        )
    ),
}

# Below this ratio of the smallest to the largest singular value a stage is fitted as if it were
# this, so that the values in between are not driven to where rounding could lose them.
_CUSHION = 0.02407327424182761
# On a shorter interval the exchange is ill-conditioned, and the Taylor polynomial of the sign
# function is within 1e-10 of 1 as well.
_CONVERGED = 1 - 5e-4


def singular_values_after(stages: Sequence[Triple], values: Sequence[float]) -> list[float]:
    """Return what the stages make of singular values.

    Args:
        stages: One (a, b, c) per iteration.
        values: Singular values of the matrix they start from.

    Example:
        >>> singular_values_after([(1.5, -0.5, 0.0)], [0.0, 0.5, 1.0])
        [0.0, 0.6875, 1.0]
    """
    after = []
    for value in values:
        for a, b, c in stages:
            square = value * value
            value = value * (a + square * (b + square * c))
            if not abs(value) < 1e30:
                # it has diverged; a further stage would only overflow
                value = math.inf
                break
        after.append(value)
    return after


def with_safety(stages: Coefficients, safety: float) -> Coefficients:
    """Return the stages with all but the last applied to singular values divided by `safety`."""
    shrunk = tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in stages[:-1])
    return shrunk + stages[-1:]


@cache
def polar_express_coefficients(iterations: int = 8, *, lower: float = 1e-3) -> Coefficients:
    """Compute the stages that bring all of [lower, 1] closest to 1 in so many iterations.

    Each stage is the odd polynomial of degree 5 that is nearest to 1 on the interval [l, u]
    which the ones before it left, rescaled so that its image is centred at 1; the next interval
    is that image. Plain float64 on the host, computed once per pair of arguments.

    Args:
        iterations: Number of stages.
        lower: Smallest singular value that is to be brought to 1, relative to the norm.

    Raises:
        HyperparameterError: If a number is out of range.

    Source: arXiv 2505.16932, theorem 3.1 and section 3.3 (the cushion).

    Example:
        >>> stages = polar_express_coefficients(8, lower=1e-3)
        >>> [round(value, 9) for value in singular_values_after(stages, [1e-3, 0.1, 1.0])]
        [1.0, 1.0, 1.0]
    """
    check_count("iterations", iterations)
    check_number("lower", lower, low_open=True, high=1.0)
    low, high, stages = lower, 1.0, []
    for _ in range(iterations):
        if low >= _CONVERGED * high:
            stages.append((1.875, -1.25, 0.375))
            continue
        a, b, c = _nearest_to_one(max(low, _CUSHION * high), high)
        at_low, at_high = singular_values_after([(a, b, c)], [low, high])
        centre = (at_low + at_high) / 2
        stages.append((a / centre, b / centre, c / centre))
        low = at_low / centre
        high = 2 - low
    return tuple(stages)


def _nearest_to_one(low: float, high: float) -> Triple:
    """Return the odd polynomial of degree 5 nearest to 1 on [low, high], by Remez' exchange."""
    # the error 1 - p takes its largest value, with alternating sign, at low < q < r < high
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    a = b = c = before = math.inf
    for _ in range(50):  # it converges quadratically, so in 5 to 10
        rows = [
            [x, x**3, x**5, sign, 1.0]
            for x, sign in ((low, 1.0), (q, -1.0), (r, 1.0), (high, -1.0))
        ]
        a, b, c, error = _solve(rows)
        if abs(error - before) < 1e-15:
            break
        before = error
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = (math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
    return a, b, c


def _solve(rows: list[list[float]]) -> list[float]:
    """Solve a small linear system, its right-hand side the last column, with pivoting."""
    size = len(rows)
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(rows[row][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for row in range(size):
            if row != column:
                factor = rows[row][column] / rows[column][column]
                rows[row] = [x - factor * y for x, y in zip(rows[row], rows[column], strict=True)]
    return [rows[i][size] / rows[i][i] for i in range(size)]


def check_stages(stages: Coefficients) -> None:
    """Check that the stages keep the sign of every singular value in (0, 1], and stay bounded.

    Raises:
        HyperparameterError: If they do not: such an update would go uphill.
    """
    grid = [10 ** (-3 * i / 400) for i in range(401)] + [1.0 + i / 1000 for i in range(1, 6)]
    for before, after in zip(grid, singular_values_after(stages, grid), strict=True):
        if not 0 < after < 10:
            raise HyperparameterError(
                f"coefficients take the singular value {before:.4g} to {after:.4g}, and must "
                "keep it positive and near 1 (up to 1.005, for rounding): use a named set, or "
                "safety=1.01 if it only fails at the upper end."
            )
