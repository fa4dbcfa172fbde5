"""Muon, spectral and sign descent, scalar and diagonal moments, against other implementations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import shampoo_func as sf
from shampoo_func import tree

STEPS = 10
MUON_STAGE = (3.4445, -4.7750, 2.0315)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers of float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def run(tx: sf.Transformation, params: Any, grads: list[Any]) -> Any:
    """Return the parameters after the given gradients."""
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = sf.apply_updates(params, updates)
    return params


def run_torch(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], start: Tensor, grads: list[Tensor]
) -> Tensor:
    """Return the parameter after the given gradients under a torch optimizer."""
    param = torch.nn.Parameter(start.clone())
    optimizer = make([param])
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def exact_newton_schulz(
    grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Do what torch's Muon does in bfloat16, in the gradient's own dtype."""
    a, b, c = coefficients
    x = grad.T if grad.shape[0] > grad.shape[1] else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.shape[0] > grad.shape[1] else x


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)], ids=str)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_is_torchs(
    shape: tuple[int, int], nesterov: bool, adjust: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps of torch.optim.Muon: exactly but for its bfloat16, and roughly with it."""
    start, grads = random(*shape), [random(*shape, seed=s + 1) for s in range(STEPS)]
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.3}

    def theirs(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Muon(params, lr=0.05, adjust_lr_fn=adjust, **options)

    scale: Any = {"original": "spectral"}.get(adjust, adjust)
    ours = run(sf.muon(0.05, scale=scale, **options), start, grads)
    rough = run_torch(theirs, start, grads)
    largest = float((rough - start).abs().max())
    torch.testing.assert_close(ours, rough, rtol=0, atol=0.03 * largest)
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", exact_newton_schulz)
    exact = run_torch(theirs, start, grads)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)
    assert not torch.equal(rough, exact)


def test_muon_in_bfloat16_is_nearer_to_torchs() -> None:
    """With the same dtype in the iteration, float32 parameters differ by rounding only."""
    start, grads = random(16, 8).float(), [random(16, 8, seed=s + 1).float() for s in range(STEPS)]
    half = sf.newton_schulz_polar(compute_dtype=torch.bfloat16)
    ours = run(sf.muon(0.05, method=half), start, grads)
    theirs = run_torch(lambda p: torch.optim.Muon(p, lr=0.05), start, grads)
    moved = float((theirs - start).norm())
    assert float((ours - theirs).norm()) < 0.02 * moved


def test_muon_sends_the_rest_to_adamw() -> None:
    """Vectors, and matrices that `where` turns down, get AdamW with its own settings."""
    params = {"embed": random(6, 3), "w": random(4, 3), "b": random(3), "s": random()}
    grads = [tree.map(lambda p, s=s: random(*p.shape, seed=s), params) for s in range(STEPS)]
    tx = sf.muon(
        0.02,
        where=lambda path, leaf: leaf.ndim >= 2 and "embed" not in path,
        adam_learning_rate=1e-3,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        adam_weight_decay=0.2,
    )
    after = run(tx, params, grads)
    for name in ("embed", "b", "s"):
        expected = run_torch(
            lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2),
            params[name],
            [grad[name] for grad in grads],
        )
        torch.testing.assert_close(after[name], expected, rtol=1e-10, atol=1e-12)
    matrix = sf.spectral_descent(
        0.02,
        momentum=0.95,
        nesterov=True,
        weight_decay=0.1,
        method=sf.newton_schulz_polar(),
        scale="spectral",
    )
    torch.testing.assert_close(after["w"], run(matrix, params["w"], [g["w"] for g in grads]))
    default = sf.muon(0.1).init(params)
    assert set(default["muon"]["precondition"]) == {"4x3", "6x3"}


def test_muon_sweeps_over_tensors() -> None:
    """Learning rate, momentum and decay may be tensors: a vmap over them is the separate runs."""
    params = {"w": random(4, 3), "b": random(3)}
    grads = [tree.map(lambda p, s=s: random(*p.shape, seed=s), params) for s in range(3)]

    def make(rate: Any, momentum: Any, decay: Any) -> sf.Transformation:
        return sf.muon(rate, momentum=momentum, weight_decay=decay)

    settings = ((0.1, 0.9, 0.0), (0.02, 0.5, 0.3))
    columns = (torch.tensor(column, dtype=torch.float64) for column in zip(*settings, strict=True))
    together = torch.func.vmap(lambda *own: run(make(*own), params, grads))(*columns)
    for index, own in enumerate(settings):
        alone = run(make(*own), params, grads)
        for name, leaf in alone.items():
            torch.testing.assert_close(together[name][index], leaf, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("d_out", "d_in"), [(8, 2), (2, 8), (5, 5)])
def test_scale_rules(d_out: int, d_in: int) -> None:
    """Each rule is its formula; the callable gets (d_in, d_out), as in the reference."""
    g = random(d_out, d_in)
    factor = sf.svd_polar()(g)
    rules: dict[Any, float] = {
        "none": 1.0,
        "spectral": math.sqrt(max(1, d_out / d_in)),
        "match_rms_adamw": 0.2 * math.sqrt(max(d_out, d_in)),
        "fan": math.sqrt(d_out / d_in),
        "nuclear": float(torch.linalg.svdvals(g).sum()),
        (lambda inputs, outputs: inputs + 10.0 * outputs): d_in + 10.0 * d_out,
    }
    for rule, expected in rules.items():
        tx = sf.polar(sf.svd_polar(), scale=rule)
        found = tx.apply(tx.init(g), g)
        torch.testing.assert_close(found, expected * factor)
    matched = sf.polar(sf.svd_polar(), scale="match_rms_adamw")
    assert float(matched.apply(matched.init(g), g).square().mean().sqrt()) == pytest.approx(0.2)


def test_blocks_of_any_order() -> None:
    """A tensor is the matrix [d1, rest]; a vector is one column, so divided by its norm."""
    for method in (sf.svd_polar(), sf.newton_schulz_polar()):
        tx = sf.polar(method, scale="fan")
        conv = random(4, 2, 3, 3)
        expected = method(conv.reshape(4, 18)) * math.sqrt(4 / 18)
        torch.testing.assert_close(tx.apply(tx.init(conv), conv).reshape(4, 18), expected)
        vector = random(5)
        torch.testing.assert_close(
            tx.apply(tx.init(vector), vector), math.sqrt(5) * vector / vector.norm()
        )
        number = torch.tensor(-3.0)
        assert float(tx.apply(tx.init(number), number)) == -1.0
        channels_last = conv.to(memory_format=torch.channels_last)
        assert tx.apply(tx.init(conv), channels_last).stride() == channels_last.stride()
        for empty in (torch.zeros(0), torch.zeros(0, 3), torch.zeros(3, 0, 2)):
            assert tx.apply(tx.init(empty), empty).shape == empty.shape


@pytest.mark.parametrize(
    "make",
    [
        lambda: sf.polar(sf.svd_polar(), scale="nuclear"),
        lambda: sf.polar(sf.newton_schulz_polar(), scale="fan"),
        lambda: sf.sign_preconditioner("mean_abs"),
        lambda: sf.sign_preconditioner(lambda g: g.square().sum().sqrt()),
        lambda: sf.sign_preconditioner(lambda g: 2.0),
        lambda: sf.scalar_second_moment(0.9),
        lambda: sf.scalar_second_moment(1.0, reduce="sum"),
        lambda: sf.second_moment(0.9, drop_weighting=True),
    ],
)
@pytest.mark.parametrize("shape", [(), (4,), (4, 3), (2, 3, 4)], ids=str)
def test_a_stack_is_its_blocks(make: Callable[[], Any], shape: tuple[int, ...]) -> None:
    """Stacked blocks are worked on one by one, whatever their order."""
    tx = make()
    grads = [random(6, *shape, seed=seed) for seed in range(3)]
    state = torch.func.vmap(tx.init)(grads[0])
    singles = [tx.init(block) for block in grads[0]]
    for grad in grads:
        state = tx.refresh(tx.accumulate(state, grad))
        singles = [
            tx.refresh(tx.accumulate(own, block)) for own, block in zip(singles, grad, strict=True)
        ]
    apart = torch.stack([tx.apply(own, b) for own, b in zip(singles, grads[-1], strict=True)])
    torch.testing.assert_close(tx.apply(state, grads[-1]), apart)
    assert (
        tree.structure(tx.roles(state)) == tree.structure(state)
        if hasattr(tree, "structure")
        else True
    )


def test_sign_descent() -> None:
    """Signs times the scale; with a momentum, Signum."""
    g = random(4, 3)
    for scale, size in (
        ("none", 1.0),
        ("mean_abs", float(g.abs().mean())),
        ("sum_abs", float(g.abs().sum())),
        (lambda block: block.abs().max(), float(g.abs().max())),
    ):
        tx: Any = sf.sign_sgd(0.1, scale=scale)  # type: ignore[arg-type]
        updates, _ = tx.update(g, tx.init(g), g)
        torch.testing.assert_close(updates, -0.1 * size * g.sign())
    grads = [random(4, 3, seed=seed) for seed in range(STEPS)]
    average, params = torch.zeros_like(g), g
    for grad in grads:
        average = 0.9 * average + 0.1 * grad
        params = params - 0.05 * (average.sign() + 0.2 * params)
    torch.testing.assert_close(
        run(sf.sign_sgd(0.05, momentum=0.9, weight_decay=0.2), g, grads), params
    )
    half = g.to(torch.bfloat16)
    tx = sf.sign_preconditioner("sum_abs")
    assert tx.apply(tx.init(half), half).dtype == torch.bfloat16


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("beta2", [0.9, 1.0, torch.tensor(0.9, dtype=torch.float64)])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_scalar_second_moment(reduce: Any, beta2: Any, bias_correction: bool) -> None:
    """One step size per block, of the mean or the sum of squares."""
    tx = sf.scalar_second_moment(
        beta2, epsilon=1e-3, bias_correction=bias_correction, reduce=reduce
    )
    grads = [random(4, 3, seed=seed) for seed in range(5)]
    state, moment = tx.init(grads[0]), 0.0
    for t, grad in enumerate(grads, start=1):
        state = tx.accumulate(state, grad)
        new = float(grad.square().mean() if reduce == "mean" else grad.square().sum())
        moment = moment + new if beta2 == 1 else 0.9 * moment + (1 - 0.9) * new
        corrected = moment / (1 - 0.9**t) if bias_correction and beta2 != 1 else moment
        torch.testing.assert_close(tx.apply(state, grad), grad / (math.sqrt(corrected) + 1e-3))
    assert tx.roles(state) == ("other", "second_moment")
    assert tx.init(grads[0].to(torch.bfloat16)).second_moment.dtype == torch.float32


def test_scalar_magnitude_of_a_graft() -> None:
    """As the magnitude of a graft it lends its norm, so every block moves by the same RMS."""
    tx = sf.graft(
        direction=sf.polar(sf.svd_polar()), magnitude=sf.scalar_second_moment(0.9, epsilon=0.0)
    )
    g = 100 * random(4, 3)
    state = tx.refresh(tx.accumulate(tx.init(g), g))
    found = tx.apply(state, g)
    assert float(found.square().mean().sqrt()) == pytest.approx(1.0)
    torch.testing.assert_close(found / found.norm(), sf.svd_polar()(g) / math.sqrt(3))


def test_second_moment_without_weighting() -> None:
    """V <- beta2 V + G*G, and no bias correction, as with the reference's dropped weight."""
    tx = sf.second_moment(0.9, epsilon=1e-8, drop_weighting=True)
    grads = [random(4, 3, seed=seed) for seed in range(5)]
    state, moment = tx.init(grads[0]), torch.zeros(4, 3).double()
    for grad in grads:
        state = tx.accumulate(state, grad)
        moment = 0.9 * moment + grad * grad
        torch.testing.assert_close(tx.apply(state, grad), grad / (moment.sqrt() + 1e-8))
    # which is RMSprop without bias correction up to the factor sqrt(1 - beta2)
    plain = sf.second_moment(0.9, epsilon=0.0, bias_correction=False)
    other = plain.init(grads[0])
    for grad in grads:
        other = plain.accumulate(other, grad)
    ratio = plain.apply(other, grads[0]) / tx.apply(state, grads[0])
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / math.sqrt(0.1)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta2", [0.9, 1.0])
@pytest.mark.parametrize("drop", [True, False])
def test_second_moment_in_another_dtype(beta2: float, drop: bool) -> None:
    """The moment has the dtype that was asked for, and squares are taken in the wider one."""
    fine = sf.second_moment(beta2, drop_weighting=drop, dtype=torch.float32)
    coarse = sf.second_moment(beta2, drop_weighting=drop, dtype=torch.bfloat16)
    double = sf.second_moment(beta2, drop_weighting=drop)
    g = random(4, 3).to(torch.bfloat16)
    states = [tx.accumulate(tx.init(g), g) for tx in (fine, coarse)]
    exact = double.accumulate(double.init(g.double()), g.double())
    assert [own.second_moment.dtype for own in states] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(
        states[0].second_moment.double(), exact.second_moment, rtol=1e-6, atol=0
    )
    assert all(
        tx.apply(own, g).dtype == g.dtype for tx, own in zip((fine, coarse), states, strict=True)
    )
    assert fine.roles(states[0]) == ("other", "second_moment")
    wide = coarse.accumulate(coarse.init(g.float()), g.float())
    assert wide.second_moment.dtype == torch.bfloat16
    assert coarse.apply(wide, g.float()).dtype == torch.float32


@pytest.mark.parametrize("beta2", [0.9, 1.0])
def test_first_order_methods_do_not_depend_on_blocks(beta2: float) -> None:
    """Elementwise moments as the main preconditioner of blocks are the elementwise stages."""
    params = {"w": random(7, 5), "c": random(2, 3, 2, 2), "b": random(9), "s": random()}
    grads = [tree.map(lambda p, s=s: random(*p.shape, seed=s), params) for s in range(4)]
    for inner in (
        sf.second_moment(beta2),
        sf.second_moment(beta2, drop_weighting=True),
        sf.sign_preconditioner(),
        sf.identity_preconditioner(),
    ):
        stage = sf.precondition(inner, filter=sf.ema(0.8))
        whole = run(sf.chain(stage, sf.scale(-0.1)), params, grads)
        for size, merge in ((3, False), (4, True), (None, True)):
            cut = sf.blocked(stage, block_size=size, merge_dims=merge)
            apart = run(sf.chain(cut, sf.scale(-0.1)), params, grads)
            for name, leaf in whole.items():
                torch.testing.assert_close(apart[name], leaf, rtol=1e-12, atol=1e-14)
    if beta2 < 1:
        adam = sf.precondition(sf.second_moment(beta2), filter=sf.ema(0.8))
        blocks = run(sf.chain(sf.blocked(adam, block_size=3), sf.scale(-0.1)), params, grads)
        expected = run(sf.adamw(0.1, beta1=0.8, beta2=beta2, weight_decay=0.0), params, grads)
        for name, leaf in expected.items():
            torch.testing.assert_close(blocks[name], leaf, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(5, 5), (3, 6), (6, 3)], ids=str)
def test_shampoo_without_memory_is_spectral_descent(shape: tuple[int, int]) -> None:
    """L^(-1/4) G R^(-1/4), L^(-1/2) G, G R^(-1/2) and U V^T are one, if beta2 is 0."""
    expected = sf.svd_polar()
    root = sf.eigh_root(epsilon=0.0, pseudo_inverse=sf.PseudoInverse(relative_tolerance=1e-10))
    exponents: list[Any] = [{2: 0.25}, {2: {0: 0.5, 1: 0.0}}, {2: {0: 0.0, 1: 0.5}}]
    for powers in exponents:
        for bias_correction in (True, False):
            tx = sf.kronecker(
                beta2=0.0, root=root, exponents=powers, bias_correction=bias_correction
            )
            state = tx.init(random(*shape))
            for seed in range(3):
                g = random(*shape, seed=seed)
                state = tx.refresh(tx.accumulate(state, g))
                torch.testing.assert_close(tx.apply(state, g), expected(g), rtol=1e-9, atol=1e-10)
    params, grads = random(*shape), [random(*shape, seed=seed) for seed in range(4)]
    shampoo = sf.shampoo(
        0.1, beta1=0.0, beta2=0.0, root=root, grafting=None, merge_dims=False, refresh_every=1
    )
    torch.testing.assert_close(
        run(shampoo, params, grads), run(sf.spectral_descent(0.1), params, grads)
    )


def test_spectral_descent_changes_no_default() -> None:
    """Making and running spectral chains leaves every other optimizer as it was.

    The reference's configuration object for it switches merging off for all later optimizers.
    """
    params = {"w": random(3, 2, 2), "v": random(4, 4)}

    def others() -> tuple[Any, ...]:
        tx = sf.shampoo(0.1, epsilon=1e-3)
        blocks = sf.blocked(sf.precondition(sf.second_moment()), block_size=4)
        return repr(tx), repr(blocks), blocks.plan(params), sorted(tx.init(params)["precondition"])

    before = others()
    for tx in (sf.spectral_descent(0.1), sf.spectral_descent(0.1, block_size=2), sf.muon(0.1)):
        run(tx, params, [params])
        assert repr(tx) == repr(tx)
    assert others() == before
    assert before[3] == ["12", "16"]  # merged: 3x2x2 and 4x4 are at most 1024 long
