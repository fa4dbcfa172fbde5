"""Averaging stages against formulas in NumPy, recorded runs, and identities."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shampoo_func as sf
from shampoo_func.errors import HyperparameterError, MissingParamsError, TreeMismatchError

Tensor = torch.Tensor
Array = npt.NDArray[np.float64]

RECORDED = Path(__file__).parent / "data" / "averaging"
F64 = torch.float64


@dataclass(frozen=True)
class Listed:
    """A schedule that reads its values from a tuple."""

    values: tuple[float, ...]
    factor: float = 1.0

    def __call__(self, step: Any) -> Tensor:
        """Return the value at a step."""
        return self.factor * torch.tensor(self.values, dtype=F64)[step]


def run(
    tx: sf.Transformation, params: Any, grads: list[Any]
) -> tuple[Any, Any, list[Any], list[Any]]:
    """Return the last parameters and state, and parameters and averages after every update."""
    state = tx.init(params)
    trained, averaged = [], []
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = sf.apply_updates(params, updates)
        trained.append(params)
        averaged.append(sf.eval_params(tx, state, params))
    return params, state, trained, averaged


def random_grads(steps: int, *shape: int, dtype: torch.dtype = F64) -> list[Tensor]:
    """Return one gradient per step."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(steps)]


# ------------------------------------------------------------ primal averaging and Schedule-Free


def three_sequences(
    start: Array,
    grads: list[Array],
    rates: list[float],
    decays: list[float],
    mu_y: float,
    mu_x: Callable[[int], float],
) -> tuple[list[Array], list[Array]]:
    """Return every y and x of primal averaging, with x, y and z all kept."""
    x, y, z = start.copy(), start.copy(), start.copy()
    ys, xs = [], []
    for step, (grad, rate, decay) in enumerate(zip(grads, rates, decays, strict=True)):
        z = z - rate * decay * z
        x = (y - (1 - mu_y) * z) / mu_y  # decay leaves y where it is
        z = z - rate * grad
        x = mu_x(step) * x + (1 - mu_x(step)) * z
        y = mu_y * x + (1 - mu_y) * z
        ys.append(y)
        xs.append(x)
    return ys, xs


def shares(rates: list[float], power: float, r: float, use_max: bool) -> list[float]:
    """Return mu_x of Schedule-Free for every step."""
    weights: list[float] = []
    found = []
    for step, rate in enumerate(rates):
        base = max(rates[: step + 1]) if use_max else rate
        weights.append((step + 1) ** r * base**power)
        total = sum(weights)
        found.append(1 - weights[-1] / total if total > 0 else 1.0)
    return found


rate_lists = st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.5]), min_size=4, max_size=4)
decay_lists = st.lists(st.sampled_from([0.0, 0.1, 0.7]), min_size=4, max_size=4)


@given(rate_lists, decay_lists, st.sampled_from([0.0, 0.5, 0.99]), st.sampled_from([0.3, 0.8, 1.0]))
def test_primal_averaging_follows_the_formula(
    rates: list[float], decays: list[float], mu_x: float, mu_y: float
) -> None:
    """Keeping z alone equals keeping x, y and z."""
    grads = random_grads(4, 3)
    tx = sf.primal_averaging(Listed(tuple(rates)), mu_x, mu_y, Listed(tuple(decays)))
    start = torch.linspace(-1.0, 2.0, 3, dtype=F64)
    _, _, trained, averaged = run(tx, start, grads)
    arrays = [grad.numpy() for grad in grads]
    ys, xs = three_sequences(start.numpy(), arrays, rates, decays, mu_y, lambda _: mu_x)
    np.testing.assert_allclose(torch.stack(trained).numpy(), ys, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(torch.stack(averaged).numpy(), xs, rtol=1e-12, atol=1e-13)


@given(
    rate_lists,
    decay_lists,
    st.sampled_from([0.3, 0.8, 1.0]),
    st.sampled_from([0.0, 1.0, 2.0]),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.booleans(),
)
def test_schedule_free_follows_the_formula(
    rates: list[float], decays: list[float], mu_y: float, power: float, r: float, use_max: bool
) -> None:
    """Weights are t^r rate^p, or of the largest rate so far; zeros at the start are harmless."""
    grads = random_grads(4, 3)
    tx = sf.schedule_free(
        Listed(tuple(rates)),
        mu_y,
        power,
        Listed(tuple(decays)),
        weight_power=r,
        use_max_rate=use_max,
    )
    start = torch.linspace(-1.0, 2.0, 3, dtype=F64)
    _, _, trained, averaged = run(tx, start, grads)
    mu_x = shares(rates, power, r, use_max)
    arrays = [grad.numpy() for grad in grads]
    ys, xs = three_sequences(start.numpy(), arrays, rates, decays, mu_y, lambda step: mu_x[step])
    np.testing.assert_allclose(torch.stack(trained).numpy(), ys, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(torch.stack(averaged).numpy(), xs, rtol=1e-12, atol=1e-13)


def recorded_chain(options: dict[str, Any], rates: tuple[float, ...]) -> sf.Transformation:
    """Return the chain that a recorded run asks for."""
    kw, (_, graft) = options["kw"], options["graft"]
    (beta1, beta2), decay = kw["betas"], kw.get("weight_decay", 0.0)
    kind = options.get("wd", "DECOUPLED")
    coefficient: Any = decay
    if kind == "CORRECTED":
        coefficient = Listed(rates, decay / kw["lr"])
    elif kind == "INDEPENDENT":
        coefficient = decay / kw["lr"]
    if "gpa" in options:
        last: sf.Transformation = sf.primal_averaging(
            Listed(rates),
            options["gpa"]["eval_interp_coeff"],
            options["gpa"]["train_interp_coeff"],
            coefficient,
        )
    else:
        last = sf.schedule_free(
            Listed(rates),
            options["sf"]["train_interp_coeff"],
            float(options["sf"]["eval_coeff_lr_power"]),
            coefficient,
        )
    direction = sf.precondition(
        sf.graft(
            direction=sf.kronecker(beta2, root=sf.eigh_root(kw["epsilon"])),
            magnitude=sf.second_moment(graft["beta2"], epsilon=graft["epsilon"]),
        ),
        filter=sf.ema(beta1),
        refresh_every=kw["precondition_frequency"],
    )
    return sf.chain(sf.blocked(direction, block_size=kw["max_preconditioner_dim"]), last)


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: path.stem)
def test_follows_the_reference(path: Path) -> None:
    """A whole chain of Shampoo and averaging follows a recorded run of Distributed Shampoo."""
    options = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz")) as stored:
        arrays = {key: torch.from_numpy(stored[key]) for key in stored.files}
    count = len(options["shapes"])
    rates = tuple(float(rate) for rate in arrays["lr"])
    tx = recorded_chain(options, rates)
    params = [arrays[f"param{i}"] for i in range(count)]
    grads = [[arrays[f"grads{i}"][step] for i in range(count)] for step in range(len(rates))]
    _, _, trained, _ = run(tx, params, grads)
    for i in range(count):
        found = torch.stack([step[i] for step in trained])
        wanted = arrays[f"trajectory{i}"]
        error = (found - wanted).norm() / (wanted - arrays[f"param{i}"]).norm()
        assert float(error) <= options["tolerance"]


def test_schedule_free_is_a_weighted_mean() -> None:
    """Without decay x is the mean of the z, weighted by the squared rates."""
    rates = (0.1, 0.3, 0.2, 0.05)
    tx, params = sf.schedule_free(Listed(rates), 0.7), torch.ones(2, dtype=F64)
    state = tx.init(params)
    z = []
    for grad in random_grads(4, 2):
        updates, state = tx.update(grad, state, params)
        params = params + updates
        z.append(state.z)
    weights = torch.tensor(rates, dtype=F64) ** 2
    mean = (torch.stack(z) * weights[:, None]).sum(0) / weights.sum()
    torch.testing.assert_close(sf.eval_params(tx, state, params), mean, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("zeros", [1, 3])
@pytest.mark.parametrize("use_max_rate", [False, True])
def test_learning_rate_zero_first(zeros: int, use_max_rate: bool) -> None:
    """A warm-up from 0 changes nothing while it is 0, and is then as if those steps were not."""
    params, grads = torch.ones(3, dtype=F64), random_grads(6, 3)
    rates = (0.0,) * zeros + (0.1, 0.2, 0.3)
    tx = sf.schedule_free(Listed(rates), weight_decay=0.1, use_max_rate=use_max_rate)
    _, _, trained, averaged = run(tx, params, grads[: len(rates)])
    for step in range(zeros):
        assert torch.equal(trained[step], params)
        assert torch.equal(averaged[step], params)
    late = sf.schedule_free(Listed(rates[zeros:]), weight_decay=0.1, use_max_rate=use_max_rate)
    expected, _, _, mean = run(late, params, grads[zeros : len(rates)])
    torch.testing.assert_close(trained[-1], expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(averaged[-1], mean[-1], rtol=1e-12, atol=0.0)


def test_learning_rate_zero_first_has_derivatives() -> None:
    """The derivative by the size of a warm-up from 0 is finite, and right."""
    params, grads = torch.ones(3, dtype=F64), random_grads(3, 3)

    def final(size: Tensor) -> Tensor:
        tx = sf.schedule_free(lambda step: size * step)
        return run(tx, params, grads)[0].square().sum()

    size = torch.tensor(0.1, dtype=F64)
    slope = torch.func.grad(final)(size)
    numeric = (final(size + 1e-6) - final(size - 1e-6)) / 2e-6
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("mu_y", [0.4, 1.0])
def test_no_averaging_is_the_base_optimizer(mu_y: float) -> None:
    """With mu_x = 0 the stage is decay and learning rate."""
    params, grads = torch.ones(4, 3, dtype=F64), random_grads(8, 4, 3)
    base = sf.chain(
        sf.scale_by_adam(), sf.add_decayed_weights(0.1), sf.scale_by_learning_rate(0.05)
    )
    tx = sf.chain(sf.scale_by_adam(), sf.primal_averaging(0.05, 0.0, mu_y, 0.1))
    expected = run(base, params, grads)[0]
    found, _, _, averaged = run(tx, params, grads)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(averaged[-1], expected, rtol=1e-12, atol=1e-14)


def test_late_parameter_has_its_own_mean() -> None:
    """A parameter whose gradients begin late goes as if training had begun there."""
    tx = sf.schedule_free(0.1, 0.7)
    params = {"late": torch.ones(2, dtype=F64), "w": torch.ones(2, dtype=F64)}
    grads: list[Any] = [{"late": grad, "w": grad} for grad in random_grads(6, 2)]
    for grad in grads[:3]:
        grad["late"] = None
    found, _, _, averaged = run(tx, params, grads)
    alone, _, _, mean = run(tx, params["late"], [grad["late"] for grad in grads[3:]])
    torch.testing.assert_close(found["late"], alone, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(averaged[-1]["late"], mean[-1], rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("make", [sf.primal_averaging, sf.schedule_free])
def test_small_steps_of_bfloat16_add_up(make: Callable[..., sf.Transformation]) -> None:
    """Steps below the resolution of bfloat16 are kept in z, which is float32."""
    params = torch.ones(2, dtype=torch.bfloat16)
    grads = [torch.ones(2, dtype=torch.bfloat16) for _ in range(64)]
    after, state, _, averaged = run(make(1e-3), params, grads)
    assert after.dtype == averaged[-1].dtype == torch.bfloat16
    assert state.z.dtype == torch.float32
    torch.testing.assert_close(state.z, torch.full((2,), 1 - 64e-3), rtol=1e-2, atol=0.0)
    if make is sf.primal_averaging:  # the shares of Schedule-Free fall below what y can hold
        assert float(after.float().max()) < 0.97


# ------------------------------------------------------------------------- averages of weights


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_weight_ema_follows_the_formula(every: int, bias_correction: bool) -> None:
    """The average is that of the weights after every k-th update."""
    decay, params, grads = 0.8, torch.ones(3, dtype=F64), random_grads(7, 3)
    tx = sf.chain(
        sf.scale_by_learning_rate(0.1),
        sf.weight_ema(decay, every=every, bias_correction=bias_correction),
    )
    _, _, trained, averaged = run(tx, params, grads)
    for step, found in enumerate(averaged):
        taken = [w.numpy() for w in trained[: step + 1]][every - 1 :: every]
        weights = [(1 - decay) * decay ** (len(taken) - 1 - i) for i in range(len(taken))]
        mean = sum((a * w for a, w in zip(taken, weights, strict=True)), np.zeros(3))
        if not bias_correction:
            wanted = mean + decay ** len(taken) * params.numpy()
        else:
            wanted = mean / sum(weights) if taken else trained[step].numpy()
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("window", [1, 3])
def test_weight_lawa_follows_the_formula(every: int, window: int) -> None:
    """The average is the plain mean of the latest weights that were taken."""
    params, grads = torch.ones(3, dtype=F64), random_grads(9, 3)
    tx = sf.chain(sf.scale_by_learning_rate(0.1), sf.weight_lawa(window, every=every))
    _, _, trained, averaged = run(tx, params, grads)
    for step, found in enumerate(averaged):
        taken = trained[: step + 1][every - 1 :: every][-window:]
        wanted = torch.stack(taken).mean(0) if taken else trained[step]
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize(
    "stage", [sf.weight_ema(0.0), sf.weight_ema(0.0, bias_correction=False), sf.weight_lawa(1)]
)
def test_averages_of_one_are_the_weights(stage: sf.Transformation) -> None:
    """With decay 0, or a window of one, the average is what is trained, bit for bit."""
    tx = sf.chain(sf.scale_by_learning_rate(0.1), stage)
    params = torch.ones(3, dtype=torch.bfloat16)
    _, _, trained, averaged = run(tx, params, random_grads(4, 3, dtype=torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(trained, averaged, strict=True))


@pytest.mark.parametrize("stage", [sf.weight_ema(0.7, every=2), sf.weight_lawa(2, every=2)])
def test_averages_leave_the_training_alone(stage: sf.Transformation) -> None:
    """The updates pass through untouched."""
    base = sf.adamw(0.1)
    params, grads = torch.ones(3, dtype=F64), random_grads(5, 3)
    assert torch.equal(
        run(sf.chain(base, stage), params, grads)[0], run(sf.chain(base), params, grads)[0]
    )


# ------------------------------------------------------------------------------ transformations

STAGES = [
    sf.primal_averaging(sf.linear_schedule(0.5, 0.1, 10), weight_decay=0.1),
    sf.schedule_free(sf.linear_schedule(0.0, 0.5, 3), weight_power=1.0, use_max_rate=True),
    sf.weight_ema(0.9, every=2),
    sf.weight_lawa(2, every=2),
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_inside_blocked(stage: sf.Transformation) -> None:
    """On stacks of blocks, with a clock each, the stages do what they do on the whole."""
    params = {"b": torch.ones(3, dtype=F64), "w": torch.arange(20, dtype=F64).reshape(5, 4) / 9}
    grads: list[Any] = [{"b": grad[0, :3], "w": grad} for grad in random_grads(5, 5, 4)]
    grads[2]["b"] = None
    inside = run(sf.blocked(stage, block_size=2), params, grads)
    # a block's step counts its own updates
    alone = {
        name: run(stage, params[name], [grad[name] for grad in grads if grad[name] is not None])
        for name in params
    }
    for name, (trained, _, _, averaged) in alone.items():
        torch.testing.assert_close(inside[0][name], trained, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(inside[3][-1][name], averaged[-1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", [sf.primal_averaging, sf.schedule_free])
def test_learning_rates_vmapped(make: Callable[..., sf.Transformation]) -> None:
    """One vmapped run over learning rates, 0 among them, equals the runs apart."""
    params, grads = torch.ones(3, dtype=F64), random_grads(4, 3)

    def final(rate: Any) -> tuple[Tensor, Tensor]:
        after, _, _, averaged = run(make(rate, weight_decay=0.1), params, grads)
        return after, averaged[-1]

    rates = [0.0, 0.1, 0.7]
    together = torch.func.vmap(final)(torch.tensor(rates, dtype=F64))
    for index, rate in enumerate(rates):
        for found, wanted in zip(together, final(rate), strict=True):
            torch.testing.assert_close(found[index], wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "build",
    [
        lambda: sf.primal_averaging(-1.0),
        lambda: sf.primal_averaging(float("nan")),
        lambda: sf.primal_averaging(0.1, 1.0),
        lambda: sf.primal_averaging(0.1, 0.5, 0.0),
        lambda: sf.primal_averaging(0.1, 0.5, 1.1),
        lambda: sf.primal_averaging(0.1, weight_decay=-1.0),
        lambda: sf.schedule_free("fast"),  # type: ignore[arg-type]
        lambda: sf.schedule_free(0.1, 0.0),
        lambda: sf.schedule_free(0.1, rate_power=-1.0),
        lambda: sf.schedule_free(0.1, weight_power=-1.0),
        lambda: sf.schedule_free(0.1, use_max_rate=1),  # type: ignore[arg-type]
        lambda: sf.weight_ema(1.0),
        lambda: sf.weight_ema(0.5, every=0),
        lambda: sf.weight_ema(0.5, bias_correction=None),  # type: ignore[arg-type]
        lambda: sf.weight_lawa(0),
        lambda: sf.weight_lawa(2, every=1.5),  # type: ignore[arg-type]
    ],
)
def test_bad_settings_are_refused(build: Callable[[], sf.Transformation]) -> None:
    """Numbers out of range are errors when the stage is made."""
    with pytest.raises(HyperparameterError):
        build()


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_params_are_needed(stage: sf.Transformation) -> None:
    """Without parameters there is a clear error."""
    params = torch.ones(2)
    with pytest.raises(MissingParamsError, match=stage.name):
        stage.update(params, stage.init(params))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_state_of_other_parameters(stage: sf.Transformation) -> None:
    """A state that was made for another shape is refused, also where it would broadcast."""
    state = stage.init({"w": torch.ones(1, 3)})
    params = {"w": torch.ones(2, 3)}
    with pytest.raises(TreeMismatchError, match="'w'"):
        stage.update(params, state, params)


@pytest.mark.parametrize("kind", ["l2", "decoupled", "corrected", "independent"])
@pytest.mark.parametrize("averaging", ["primal_averaging", "schedule_free"])
def test_recipe_is_the_chain_by_hand(kind: Any, averaging: Any) -> None:
    """`shampoo(averaging=...)` puts the averaging in the place of decay, momentum and rate."""
    rate = sf.linear_schedule(0.1, 0.02, 8)
    decays: dict[str, Any] = {
        "l2": 0.0,
        "decoupled": 0.1,
        "corrected": lambda step: 0.1 * rate(step) / 0.1,
        "independent": 0.1 / 0.1,
    }
    options: dict[str, Any] = {"beta2": 0.9, "epsilon": 1e-4, "refresh_every": 2, "block_size": 4}
    recipe = sf.shampoo(
        rate,
        weight_decay=0.1,
        weight_decay_kind=kind,
        peak_learning_rate=0.1,
        averaging=averaging,
        eval_interpolation=0.7,
        train_interpolation=0.6,
        rate_power=1.5,
        **options,
    )
    direction = dict(sf.shampoo(1.0, **options).stages)["precondition"]
    last: sf.Transformation = sf.schedule_free(rate, 0.6, 1.5, decays[kind])
    if averaging == "primal_averaging":
        last = sf.primal_averaging(rate, 0.7, 0.6, decays[kind])
    before = [sf.add_decayed_weights(0.1)] if kind == "l2" else []
    by_hand = sf.chain(*before, direction, last)
    params = {"w": torch.randn(6, 4, dtype=torch.float64), "b": torch.randn(3).double()}
    ours, theirs = (params, recipe.init(params)), (params, by_hand.init(params))
    for step in range(8):
        torch.manual_seed(step)
        grads = {name: torch.randn_like(leaf) for name, leaf in params.items()}
        for tx, (own, state) in ((recipe, ours), (by_hand, theirs)):
            updates, state = tx.update(grads, state, own)
            moved = (sf.apply_updates(own, updates), state)
            ours, theirs = (moved, theirs) if tx is recipe else (ours, moved)
    for name in params:
        torch.testing.assert_close(ours[0][name], theirs[0][name], rtol=1e-12, atol=1e-13)
        x = sf.eval_params(recipe, ours[1], ours[0])[name]
        torch.testing.assert_close(x, sf.eval_params(by_hand, theirs[1], theirs[0])[name])
        assert not torch.equal(x, ours[0][name])


def test_recipe_refuses_two_momenta() -> None:
    """Averaging has a momentum of its own."""
    with pytest.raises(sf.ShampooFuncError, match="both given"):
        sf.shampoo(0.1, momentum=0.9, averaging="schedule_free")
