"""Inverse roots of order 2^j by Newton-Schulz iterations with scaled, published coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shampoo_func.errors import HyperparameterError, check_choice, check_number
from shampoo_func.linalg._shapes import Float
from shampoo_func.linalg.roots.scaled import (
    ScaledRoot,
    Solution,
    check_damping,
    eye_like,
    frobenius,
    halvings,
    identity_error,
)
from shampoo_func.types import Scalar

__all__ = ["NewtonSchulzRoot", "newton_schulz_root"]

Coefficients = tuple[tuple[float, float, float], ...]

# Optimal odd quintics for singular values in [1e-3, 1], then the convergent one three times.
_POLAR_EXPRESS: Coefficients = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
    (1.875, -1.25, 0.375),
    (1.875, -1.25, 0.375),
)
# Optimal odd cubics (Chebyshev-type), whose last ones tend to the convergent (1.5, -0.5).
_CANS: Coefficients = (
    (5.182503604966906, -5.126830178299687, 0.0),
    (2.586120737395915, -0.641538812403133, 0.0),
    (2.567364126726186, -0.6391058222170474, 0.0),
    (2.520560084348265, -0.6330225823828756, 0.0),
    (2.410759275435182, -0.6186815444268036, 0.0),
    (2.1883348130094173, -0.5893091162177136, 0.0),
    (1.8595760874873613, -0.5449991062102938, 0.0),
    (1.589020160467417, -0.5075811685214573, 0.0),
    (1.5051653981684994, -0.4957799077972079, 0.0),
    (1.4925557853149838, -0.49259266842078675, 0.0),
)
_TABLES = {"polar_express": _POLAR_EXPRESS, "cans": _CANS}
# A product Z Y further from the identity has not converged: the matrix is worse conditioned
# than the coefficients are made for, or indefinite.
_WORST = 0.1


@dataclass(frozen=True, slots=True)
class NewtonSchulzRoot(ScaledRoot):
    """See `newton_schulz_root`."""

    epsilon: Scalar = 1e-12
    relative_epsilon: Scalar | None = 1e-6
    coefficients: Coefficients = _POLAR_EXPRESS

    def check_exponent(self, exponent: float) -> None:
        """Check that the exponent is 1/2, 1/4, 1/8 ... (or 0)."""
        ScaledRoot.check_exponent(self, exponent)
        if exponent != 0:
            halvings("newton_schulz_root", exponent)

    def _solve(self, matrix: Float[Tensor, "*batch n n"], exponent: float) -> Solution:
        root, inverse, residual = self._square_roots(matrix)
        for _ in range(halvings("newton_schulz_root", exponent) - 1):
            root, inverse, error = self._square_roots(root)
            residual = torch.maximum(residual, error)
        return Solution(inverse, residual, residual <= _WORST)

    def _square_roots(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return A^(1/2), A^(-1/2) and the error."""
        eye = eye_like(matrix)
        norm = frobenius(matrix)
        scale = norm.where(norm > 0, 1.0)[..., None, None]
        root = product = matrix / scale
        inverse = eye.expand(matrix.shape)
        for a, b, c in self.coefficients:
            factor = a * eye + b * product
            if c != 0.0:
                factor = factor + c * (product @ product)
            root, inverse = root @ factor, factor @ inverse
            product = inverse @ root
        root, inverse = (root + root.mT) / 2, (inverse + inverse.mT) / 2
        return root * scale.sqrt(), inverse / scale.sqrt(), identity_error(product)


def newton_schulz_root(
    epsilon: Scalar = 1e-12,
    *,
    relative_epsilon: Scalar = 1e-6,
    coefficients: Literal["polar_express", "cans"] | Coefficients = "polar_express",
) -> NewtonSchulzRoot:
    """Inverse roots A^(-1/2), A^(-1/4) ... by a fixed sequence of polynomials: products only.

    From Y = A / |A|_F, Z = I and Q = Y, for each (a, b, c): E = a I + b Q + c Q^2, Y <- Y E,
    Z <- E Z, Q = Z Y; then Y |A|_F^(1/2) is A^(1/2) and Z |A|_F^(-1/2) is A^(-1/2). A^(-1/4) is
    had by a second run on A^(1/2), and so on. The number of steps is that of the coefficients,
    and no value is read back from the device.

    Each step is the best polynomial for the interval that the one before leaves, so that ten
    steps do what takes `newton_db_root` twenty, for eigenvalues from 1e-6 |A|_F on; damping by
    that is the default. The residual is the largest element of |I - Q| at the end, the largest of
    all runs, and a root with more than 0.1 is not ok: less damping needs more coefficients.

    Args:
        epsilon: Absolute damping, in the units of the eigenvalues.
        relative_epsilon: Damping relative to |A|_F; the larger of both is used.
        coefficients: "polar_express": ten quintic steps, four products each. "cans": ten cubic
            steps, three products each, for eigenvalues from about 1e-6 |A|_F on. Or
            triples (a, b, c) of your own.

    Raises:
        HyperparameterError: If a number is out of range; when called, if the exponent is not
            1/2^j.

    Source: arXiv 2505.16932, algorithm 1 and appendix (Polar Express); arXiv 2506.10935 (CANS);
    Higham, Functions of Matrices, theorem 6.9.

    Example:
        >>> root = newton_schulz_root(epsilon=0.0)
        >>> root(torch.diag(torch.tensor([16.0, 1.0])), exponent=0.25).value.round(decimals=4)
        tensor([[0.5000, 0.0000],
                [0.0000, 1.0000]])
    """
    check_damping(epsilon, relative_epsilon)
    if isinstance(coefficients, str):
        check_choice("coefficients", coefficients, sorted(_TABLES))
        return NewtonSchulzRoot(epsilon, relative_epsilon, _TABLES[coefficients])
    return NewtonSchulzRoot(epsilon, relative_epsilon, _checked(coefficients))


def _checked(coefficients: Coefficients) -> Coefficients:
    """Return the coefficients as tuples, which hash."""
    wrong = HyperparameterError(
        f"coefficients must be 'polar_express', 'cans', or triples (a, b, c), got {coefficients!r}."
    )
    if not isinstance(coefficients, tuple | list) or not coefficients:
        raise wrong
    for triple in coefficients:
        if not isinstance(triple, tuple | list) or len(triple) != 3:
            raise wrong
        for number in triple:
            check_number("a coefficient", number, low=-torch.inf, low_open=True, high_open=True)
    return tuple((float(a), float(b), float(c)) for a, b, c in coefficients)
