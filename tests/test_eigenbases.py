"""Preconditioners that keep eigenbases: SOAP, eigendecomposed Shampoo, KL factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shampoo_func as sf
from shampoo_func import linalg

Array = npt.NDArray[np.float64]
Tensor = torch.Tensor


def gradients(steps: int, *shape: int, seed: int = 0) -> Tensor:
    """Return `[steps, *shape]` random float64 gradients whose covariance is no identity."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(steps, *shape, generator=generator, dtype=torch.float64)
    return plain * torch.linspace(0.5, 2.0, shape[-1], dtype=torch.float64)


def run(tx: sf.Transformation, grads: Tensor, **extra: Any) -> tuple[list[Tensor], Any]:
    """Return the updates for a sequence of gradients of one parameter, and the last state."""
    state, seen = tx.init(grads[0]), []
    for grad in grads:
        update, state = tx.update(grad, state, torch.zeros_like(grad), **extra)
        seen.append(update)
    return seen, state


def numpy_soap(
    grads: Array, beta1: float, beta2: float, period: int, *, skips: bool
) -> list[Array]:
    """SOAP as its paper and code have it, for one matrix, in NumPy with plain loops.

    skips: whether the first moment, too, leaves out the first gradient.
    """
    rows, columns = grads[0].shape
    left, right = np.zeros((rows, rows)), np.zeros((columns, columns))
    mean = np.zeros((rows, columns))
    square = np.zeros((rows, columns))
    updates, count, seen = [], 0, 0
    basis_left, basis_right = np.eye(rows), np.eye(columns)
    for number, grad in enumerate(grads, 1):
        update = np.zeros_like(grad)
        if number > 1 or not skips:
            seen += 1
            mean = beta1 * mean + (1 - beta1) * grad
        if number > 1:
            count += 1
            turned = basis_left.T @ grad @ basis_right
            square = beta2 * square + (1 - beta2) * turned**2
            first = (basis_left.T @ mean @ basis_right) / (1 - beta1**seen)
            second = square / (1 - beta2**count)
            update = basis_left @ (first / (np.sqrt(second) + 1e-8)) @ basis_right.T
        updates.append(update)
        left = beta2 * left + (1 - beta2) * grad @ grad.T
        right = beta2 * right + (1 - beta2) * grad.T @ grad
        if number == 1:
            basis_left = np.linalg.eigh(left)[1][:, ::-1]
            basis_right = np.linalg.eigh(right)[1][:, ::-1]
        elif number % period == 0:
            for side in (0, 1):
                factor = (left, right)[side]
                basis = (basis_left, basis_right)[side]
                order = np.argsort(-np.diag(basis.T @ factor @ basis), kind="stable")
                square = np.take(square, order, axis=side)
                basis = np.linalg.qr(factor @ basis[:, order])[0]
                if side == 0:
                    basis_left = basis
                else:
                    basis_right = basis
    return updates


@pytest.mark.parametrize("momentum", ["rotated", "original"])
@pytest.mark.parametrize("period", [1, 3])
def test_soap_equals_its_textbook(momentum: Any, period: int) -> None:
    """The recipe's defaults are SOAP's own algorithm, whichever way momentum is kept."""
    grads = gradients(20, 5, 4)
    tx = sf.soap(
        1.0, beta1=0.9, beta2=0.8, weight_decay=0.0, refresh_every=period, momentum=momentum
    )
    seen, _ = run(tx, grads)
    wanted = numpy_soap(grads.numpy(), 0.9, 0.8, period, skips=momentum == "rotated")
    for ours, textbook in zip(seen, wanted, strict=True):
        np.testing.assert_allclose(-ours.numpy(), textbook, rtol=1e-6, atol=1e-9)


def test_soap_before_its_basis_is_adam() -> None:
    """In the identity basis SOAP is Adam, bit for bit."""
    grads = gradients(6, 5, 4)
    soap = sf.precondition(sf.in_eigenbasis(sf.second_moment(0.9)), policy=sf.every(10))
    adam = sf.precondition(sf.second_moment(0.9))
    for one, other in zip(run(soap, grads)[0], run(adam, grads)[0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(6,), (5, 4), (3, 2, 4)])
def test_linear_inner_is_no_change(shape: tuple[int, ...]) -> None:
    """A linear preconditioner in any eigenbasis is itself: the bases are orthogonal."""
    grads = gradients(5, *shape)
    tx = sf.precondition(sf.in_eigenbasis(sf.identity_preconditioner(), beta2=0.9))
    for grad, update in zip(grads, run(tx, grads)[0], strict=True):
        torch.testing.assert_close(update, grad, rtol=1e-12, atol=1e-13)


def test_soap_does_not_see_a_fixed_rotation() -> None:
    """Gradients in other coordinates give the same updates in those coordinates."""
    grads = gradients(15, 5, 4)
    left = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    # the first basis of a single gradient is arbitrary in its null space: begin at step 5
    tx = sf.soap(1.0, beta2=0.9, weight_decay=0.0, start=5, refresh_every=3, basis="eigh")
    plain, turned = run(tx, grads)[0], run(tx, left @ grads @ right.mT)[0]
    for one, other in zip(plain, turned, strict=True):
        torch.testing.assert_close(left @ one @ right.mT, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(4,), (5, 3), (2, 3, 4)])
@pytest.mark.parametrize("kl", [False, True])
def test_eigendecomposed_equals_cached_roots(shape: tuple[int, ...], kl: bool) -> None:
    """Eigenvalues of the refresh give the very roots that `kronecker` caches."""
    grads = gradients(12, *shape)
    options: Any = {"kl": kl, "bias_correction": True}
    roots = sf.kronecker(0.9, root=sf.eigh_root(1e-6), **options)
    bases = sf.eigendecomposed(0.9, basis=sf.eigh_basis(1e-6), **options)
    one = run(sf.precondition(roots, refresh_every=3), grads)[0]
    other = run(sf.precondition(bases, refresh_every=3), grads)[0]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_eigenvalues_of_every_step() -> None:
    """Per-factor correction applies diag(Q^T F Q) of today's factor in the basis of the refresh."""
    grads = gradients(7, 5, 3)
    tx = sf.precondition(
        sf.eigendecomposed(0.9, basis=sf.eigh_basis(1e-6), eigenvalues="every_step"),
        refresh_every=5,
    )
    seen, _ = run(tx, grads)
    factors = [np.zeros((5, 5)), np.zeros((3, 3))]
    vectors = [np.eye(5), np.eye(3)]
    update = grads[-1].numpy()
    for t, grad in enumerate(grads.numpy(), 1):
        for side, gram in enumerate((grad @ grad.T, grad.T @ grad)):
            factors[side] = 0.9 * factors[side] + 0.1 * gram
            if t == 5:
                vectors[side] = np.linalg.eigh(factors[side])[1]
    for side, axis in ((0, 0), (1, 1)):
        basis = vectors[side]
        values = np.diag(basis.T @ factors[side] @ basis) / (1 - 0.9**7) + 1e-6
        root = basis @ np.diag(values**-0.25) @ basis.T
        update = np.moveaxis(np.tensordot(root, update, (1, axis)), 0, axis)
    np.testing.assert_allclose(seen[-1].numpy(), update, rtol=1e-9)


def test_ema_of_eigenvalues_is_the_factors_diagonal() -> None:
    """Within one basis an average of diag(Q^T G G^T Q) is the diagonal of the average."""
    grads = gradients(9, 5, 3)
    seen = {}
    kinds: list[Any] = ["every_step", "ema"]
    for kind in kinds:
        tx = sf.precondition(
            sf.eigendecomposed(
                0.9,
                basis=sf.eigh_basis(0.0),
                eigenvalues=kind,
                bias_correction=False,
            ),
            refresh_every=4,
        )
        seen[kind] = run(tx, grads[:7])[1].preconditioner.eigenvalues
    # the refresh at step 4 starts both from the same values
    for one, other in zip(seen["every_step"], seen["ema"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_ema_of_eigenvalues_goes_on_over_a_qr_refresh() -> None:
    """With `qr_basis` eigenvalues are carried, in the order of the columns; not re-estimated."""
    tx = sf.eigendecomposed(
        0.9, basis=sf.qr_basis(0.0, sort="before", first="eigh"), eigenvalues="ema"
    )
    state = tx.init(torch.zeros(3, 3, dtype=torch.float64))
    for grad in gradients(5, 3, 3):
        state = tx.correct(tx.accumulate(state, grad), grad)
    state = tx.refresh(state)
    marked = state._replace(eigenvalues=tuple(v * 0 + 7 for v in state.eigenvalues))
    assert all((values == 7).all() for values in tx.refresh(marked).eigenvalues)


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_qr_basis_converges_to_eigh(seed: int, size: int) -> None:
    """Many QR iterations from anywhere give the eigenvalues, ascending, and their vectors."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    values = 2.0 ** torch.arange(size, dtype=torch.float64)
    matrix = (turn * values) @ turn.mT
    found = sf.qr_basis(0.0, iterations=120)(matrix, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(found.values, values, rtol=1e-8, atol=1e-10)
    rebuilt = (found.vectors * found.values) @ found.vectors.mT
    torch.testing.assert_close(rebuilt, matrix, rtol=1e-7, atol=1e-8)


def test_qr_step_is_orthogonal_iteration() -> None:
    """Q qr(Q^T A Q) and qr(A Q) span the same basis, column by column."""
    matrix = linalg.gram(gradients(1, 6, 8)[0], 0, 2)
    start = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    ours = sf.qr_basis(0.0, sort="never")(matrix, start).vectors
    power = torch.linalg.qr(matrix @ start)[0]
    torch.testing.assert_close((ours.mT @ power).abs(), torch.eye(6).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("solver", [sf.eigh_basis(tolerance=0.1), sf.qr_basis(tolerance=0.1)])
def test_tolerance_keeps_good_bases_one_by_one(solver: linalg.BasisSolver) -> None:
    """A basis within the tolerance stays, with its own estimates; its neighbour is solved."""
    good = torch.diag(torch.tensor([1.0, 2.0, 3.0])).double()
    good[0, 1] = good[1, 0] = 0.05
    bad = linalg.gram(gradients(1, 3, 5, seed=3)[0], 0, 2)
    eye = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    found = solver(torch.stack([good, bad]), eye)
    assert torch.equal(found.vectors[0], eye[0])
    torch.testing.assert_close(found.values[0], linalg.diagonal(good) + 1e-12)
    assert not torch.equal(found.vectors[1], eye[1])
    assert found.ok.all()


def test_tolerance_spares_the_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager code decomposes what is off and nothing else."""
    seen = []

    def counting(matrix: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(matrix))
        return linalg.eigenpairs(matrix)

    monkeypatch.setattr("shampoo_func.linalg.bases.eigenpairs", counting)
    diagonal = torch.eye(4, dtype=torch.float64).expand(3, 4, 4).clone()
    off = diagonal.clone()
    off[1] = linalg.gram(gradients(1, 4, 6)[0], 0, 2)
    solver = sf.eigh_basis(tolerance=0.01)
    solver(diagonal, diagonal)
    assert seen == []
    solver(off, diagonal)
    assert seen == [1]


def test_a_matrix_that_is_not_finite_keeps_its_basis() -> None:
    """NaN in one block: its basis and eigenvalues stay, it is counted, and others go on."""
    both: list[Any] = [
        sf.eigendecomposed(0.9),
        sf.in_eigenbasis(sf.second_moment(0.9), momentum=0.9),
    ]
    for tx in both:
        stack = torch.func.vmap(tx.init)(torch.zeros(2, 3, 4, dtype=torch.float64))
        grads = gradients(2, 3, 4)
        stack = tx.refresh(tx.accumulate(stack, grads))
        poisoned = grads.clone()
        poisoned[0, 0, 0] = torch.nan
        after = tx.refresh(tx.accumulate(stack, poisoned))
        for old, new in zip(stack.bases, after.bases, strict=True):
            assert torch.equal(old[0], new[0])
            assert not torch.equal(old[1], new[1])
        assert after.failures.tolist() == [1, 0]
        assert after.failures_in_a_row.tolist() == [1, 0]
        assert tx.refresh(after).failures_in_a_row.tolist() == [2, 0]


def kronecker_noise(steps: int, left: Tensor, right: Tensor) -> Tensor:
    """Return gradients with the covariance `left (x) right`."""
    plain = torch.randn(steps, len(left), len(right), dtype=torch.float64)
    return torch.linalg.cholesky(left) @ plain @ torch.linalg.cholesky(right).mT


def test_kl_factors_recover_a_kronecker_covariance_with_its_scale() -> None:
    """The fixed point of the paper's rule is the covariance itself; Shampoo's needs its trace."""
    left = torch.diag(torch.tensor([4.0, 1.0, 0.5])).double()
    right = torch.diag(torch.tensor([0.3, 2.0, 1.0, 5.0])).double()
    left[0, 1] = left[1, 0] = 0.7
    wanted = torch.kron(left, right)
    grads = kronecker_noise(3000, left, right)
    kl = sf.kronecker(0.997, root=sf.eigh_root(1e-9), kl=True, normalize=True, exponents={2: 0.5})
    _, state = run(sf.precondition(kl, refresh_every=5), grads)
    found = torch.kron(*state.preconditioner.factors)
    error = torch.linalg.matrix_norm(found - wanted) / torch.linalg.matrix_norm(wanted)
    assert error < 0.12
    _, state = run(sf.precondition(sf.kronecker(0.997), policy=sf.every(1, start=10**9)), grads)
    first, second = state.preconditioner.factors
    scaled = torch.kron(first, second) / linalg.diagonal(first).sum()
    assert torch.linalg.matrix_norm(torch.kron(first, second) - wanted) > wanted.max()
    error = torch.linalg.matrix_norm(scaled - wanted) / torch.linalg.matrix_norm(wanted)
    assert error < 0.12


def test_paper_and_reference_kl_soap_differ_as_named() -> None:
    """The second step's factors: G R^-1 G^T / d in one form, G R^-1/2 G^T in the other."""
    first, second = gradients(2, 3, 3)
    forms: list[Any] = [("paper", 1.0, 3.0), ("reference", 0.5, 1.0)]
    for form, exponent, divisor in forms:
        tx = sf.in_eigenbasis(sf.second_moment(0.9), beta2=0.5, kl=form)
        state = tx.refresh(tx.accumulate(tx.init(first), first))
        after = tx.accumulate(state, second)
        right = state.factors[1] / 0.5  # bias-corrected
        values, vectors = torch.linalg.eigh(right + 1e-12 * torch.eye(3))
        partner = (vectors * values.pow(-exponent)) @ vectors.mT
        expected = 0.5 * state.factors[0] + 0.5 * second @ partner @ second.mT / divisor
        torch.testing.assert_close(after.factors[0], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("sides", "kept"), [("left", (5, 0)), ("right", (0, 3)), ("smaller", (0, 3)), ("all", (5, 3))]
)
def test_one_sided(sides: Any, kept: tuple[int, int]) -> None:
    """One side has one factor and the exponent 1/2: (G G^T)^(-1/2) G for the left."""
    grad = gradients(1, 5, 3)[0]
    tx = sf.kronecker(1.0, sides=sides, root=sf.eigh_root(1e-9))
    state = tx.refresh(tx.accumulate(tx.init(grad), grad))
    assert tuple(factor.shape[-1] for factor in state.factors) == kept
    if sides in ("right", "smaller"):
        values, vectors = torch.linalg.eigh(grad.mT @ grad)
        expected = grad @ (vectors * values.rsqrt()) @ vectors.mT
        torch.testing.assert_close(tx.apply(state, grad), expected, rtol=1e-6, atol=1e-8)


def test_ignored_dimension_is_not_rotated() -> None:
    """`ignore` and `max_dim` leave a dimension as it is, without a factor."""
    grad = gradients(1, 5, 3)[0]
    choices: list[Any] = [{"ignore": {2: [1]}}, {"max_dim": 3}]
    for options in choices:
        tx = sf.in_eigenbasis(sf.second_moment(0.9), **options)
        sizes = [factor.shape[-1] for factor in tx.init(grad).factors]
        assert sizes == ([5, 0] if "ignore" in options else [0, 3])


def test_auto_is_eigh_on_a_cpu() -> None:
    """The solver that is chosen by device gives the same bits here as the one that it chooses."""
    grads = gradients(6, 5, 3)
    options: Any = {"beta2": 0.9, "epsilon": 1e-6, "refresh_every": 2, "block_size": 8}
    auto, chosen = sf.shampoo(0.1, root="auto", **options), sf.shampoo(0.1, **options)
    assert auto != chosen
    for one, other in zip(run(auto, grads)[0], run(chosen, grads)[0], strict=True):
        assert torch.equal(one, other)
