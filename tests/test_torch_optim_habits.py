"""The torch.optim shell keeps torch.optim's habits: gradients, saving, copying, compiling."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import BACKEND, fresh_compiler, graph_count
from shell_loops import (
    SETTINGS,
    Net,
    backward,
    batches,
    check_equal,
    fixed_run,
    functional,
    mlp,
    names_of,
    random_grads,
    saved_and_loaded,
    train,
    two_groups,
    two_params,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

import shampoo_func as sf
from shampoo_func.errors import (
    CheckpointError,
    GradientError,
    OptimizerError,
    ParameterError,
    RootFailureError,
)

Grads = dict[str, Tensor]


def make_optimizer(params: Any, **options: Any) -> Any:
    return sf.ShampooOptimizer(params, lr=0.05, **{**SETTINGS, **options})


def state_bits(optimizer: Any) -> dict[Any, Any]:
    """The whole state, copied."""
    found: dict[Any, Any] = saved_and_loaded(optimizer.state_dict())["state"]
    return found


def check_same_state(one: dict[Any, Any], other: dict[Any, Any]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].keys() == other[key].keys()
        assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])


# --- gradients and parameters ---


def test_gradients_are_not_mutated() -> None:
    """Defect 2: `.grad` keeps its bits, with L2 decay, sgd grafting, and no filter at all."""
    for options in ({"weight_decay_kind": "l2"}, {"grafting": "sgd", "beta1": 0.0}, {"max_dim": 1}):
        model = Net()
        optimizer = make_optimizer(model.named_parameters(), **options)
        for batch in batches(5, model):
            backward(model, batch)
            before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            after = [p.grad for p in model.parameters()]
            assert all(
                torch.equal(a, b) for a, b in zip(before, after, strict=True) if b is not None
            )


def test_sgd_direction_does_not_spoil_the_filter() -> None:
    """Defect 1: the direction of SGD is no alias of the averaged gradient."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = sf.ShampooOptimizer(
        [("w", weight)], 0.1, beta1=0.9, bias_correction=False, grafting="sgd", start=100
    )
    for _ in range(3):
        weight.grad = torch.ones(1)
        optimizer.step()
    (average,) = (v for k, v in optimizer.state[weight].items() if k.endswith("filter/ema"))
    assert average.item() == pytest.approx(0.271)


def test_missing_gradients_leave_a_parameter_and_its_state_alone() -> None:
    """None is no gradient: no decay, no momentum, no counting; and torch.optim agrees."""
    params = two_params()
    optimizer = make_optimizer(params.items())
    grads = random_grads(params, 8)
    for grad in grads[:3]:
        fixed_run(optimizer, params, [grad])
    before, value = state_bits(optimizer), params["b"].detach().clone()
    for grad in grads[3:]:
        params["a"].grad, params["b"].grad = grad["a"], None
        optimizer.step()
    after = state_bits(optimizer)
    assert torch.equal(params["b"], value)
    check_same_state({1: before[1]}, {1: after[1]})
    assert after[0]["precondition/b0_0/step"] == 8


def test_the_loop_with_gaps_equals_the_functional_one() -> None:
    """Gradients that come and go, against the functional update with None."""
    params = two_params()
    grads = random_grads(params, 12)
    own = {name: p.detach().clone() for name, p in params.items()}
    optimizer = make_optimizer(params.items())
    tx = sf.shampoo(0.05, **SETTINGS)
    state = tx.init(own)
    for step, grad in enumerate(grads):
        gap: dict[str, Tensor | None] = {
            "a": None if step % 3 == 1 else grad["a"],
            "b": None if step < 5 or step == 7 else grad["b"],
        }
        for name, param in params.items():
            param.grad = gap[name]
        optimizer.step()
        due = sf.refresh_due(tx, step + 1)
        updates, state = tx.update(gap, state, own, refresh=due)
        own = sf.apply_updates(own, updates)
        assert all(torch.equal(own[name], params[name]) for name in own)


@pytest.mark.parametrize("compiled", [False, True])
def test_bad_gradients_change_nothing(compiled: bool) -> None:
    """Defect 9: a sparse or complex gradient names its parameter, before anything has moved."""
    table = nn.Embedding(5, 3, sparse=True)
    other = nn.Parameter(torch.ones(3))
    groups = [{"params": [("other", other)]}, {"params": [("table", table.weight)]}]
    compile = {"backend": "eager"} if compiled else False
    optimizer = make_optimizer(groups, compile=compile)
    values = table.weight.detach().clone()
    table(torch.tensor([1, 2])).sum().backward()
    other.grad = torch.ones(3)
    before = state_bits(optimizer)
    with pytest.raises(GradientError, match=r"gradient of 'table' is a sparse tensor"):
        optimizer.step()
    assert torch.equal(other, torch.ones(3)) and torch.equal(table.weight, values)
    check_same_state(before, state_bits(optimizer))
    assert [group["step"] for group in optimizer.param_groups] == [0, 0]


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (torch.ones(2, dtype=torch.complex64), "'odd' is complex"),
        (torch.ones(2, dtype=torch.int64), "'odd' is not floating-point"),
        (torch.ones(2).to_sparse(), "'odd' is a sparse tensor"),
    ],
)
def test_bad_parameters_are_refused(leaf: Tensor, message: str) -> None:
    """Defect 9: when they are given, by name; and a group that is refused is not kept."""
    with pytest.raises(ParameterError, match=message):
        make_optimizer([("fine", torch.ones(1)), ("odd", leaf)])
    optimizer = make_optimizer([("fine", torch.ones(1))])
    with pytest.raises(ParameterError, match=message):
        optimizer.add_param_group({"params": [("odd", leaf)]})
    assert len(optimizer.param_groups) == 1


def test_a_parameter_twice_is_refused() -> None:
    """One parameter, one state."""
    weight = torch.ones(1)
    with pytest.raises(ParameterError, match="given twice"):
        make_optimizer([("w", weight), ("w", torch.ones(1))])
    with pytest.raises(ParameterError, match="'w' is given twice"):
        make_optimizer([{"params": [("w", weight)]}, {"params": [("w", torch.ones(1))]}])


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(4, 6).t(),
    "channels_last": lambda: torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
    "sliced": lambda: torch.randn(8, 9)[::2, 1::3],
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    """Defect 9: any layout is stepped as its contiguous copy, and keeps its strides."""
    odd = nn.Parameter(LAYOUTS[name]())
    plain = nn.Parameter(odd.detach().clone(memory_format=torch.contiguous_format))
    strides = odd.stride()
    one, two = make_optimizer([odd]), make_optimizer([plain])
    for _ in range(6):
        plain.grad = torch.randn(plain.shape)
        odd.grad = torch.empty_like(odd).copy_(plain.grad)
        one.step()
        two.step()
    torch.testing.assert_close(odd.detach(), plain.detach(), rtol=1e-4, atol=1e-5)
    assert odd.stride() == strides


def test_mixed_dtypes_in_a_group() -> None:
    """Every parameter keeps its dtype, in one group."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    params = {str(dtype): nn.Parameter(torch.ones(5, 4, dtype=dtype)) for dtype in dtypes}
    optimizer = make_optimizer(params.items())
    fixed_run(optimizer, params, random_grads(params, 5))
    assert [param.dtype for param in params.values()] == list(dtypes)
    assert all(torch.isfinite(param).all() and (param != 1).any() for param in params.values())


def test_frozen_parameters() -> None:
    """A frozen parameter costs no state; one that thaws gets its own and disturbs nobody."""
    params = two_params()
    params["b"].requires_grad_(False)
    optimizer = make_optimizer(params.items())
    alone = {"a": nn.Parameter(params["a"].detach().clone())}
    other = make_optimizer(alone.items())
    grads = random_grads(params, 10)
    for step, grad in enumerate(grads):
        if step == 4:
            assert optimizer.state[params["b"]] == {}
            params["b"].requires_grad_()
        params["a"].grad = alone["a"].grad = grad["a"]
        params["b"].grad = grad["b"] if step > 4 else None
        optimizer.step()
        other.step()
    torch.testing.assert_close(params["a"], alone["a"], rtol=1e-9, atol=1e-12)
    assert optimizer.state[params["b"]]["precondition/b0_0/step"] == 5


def test_state_begins_with_the_first_step() -> None:
    """Parameters that are loaded after the optimizer was made are what the state begins with."""
    weight = nn.Parameter(torch.zeros(3))
    optimizer = make_optimizer([weight])
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state and optimizer._members == [None]


# --- closures, scaling, hooks ---


def test_closure() -> None:
    """The closure is called once, with gradients on, and its loss returned."""
    model = mlp()
    ((inputs, targets),) = batches(1, model)
    optimizer = make_optimizer(model.parameters())
    losses: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        losses.append(loss)
        return loss

    first = optimizer.step(closure)
    for _ in range(20):
        optimizer.step(closure)
    assert first is losses[0] and len(losses) == 21
    assert losses[-1] < losses[0]


def test_grad_scaler() -> None:
    """Scaled gradients give the unscaled step; an infinity skips it, and nothing moves."""
    model = mlp()
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer, other = make_optimizer(model.parameters()), make_optimizer(twin.parameters())
    for step, batch in enumerate(batches(6, model)):
        optimizer.zero_grad()
        loss = (model(batch[0]) - batch[1]).square().mean()
        scaler.scale(loss).backward()
        if step == 3:
            next(model.parameters()).grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
            before = state_bits(optimizer)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 3:
            check_same_state(before, state_bits(optimizer))
            assert scaler.get_scale() == 2.0**7
            continue
        backward(twin, batch)
        other.step()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def test_hooks_run() -> None:
    """Step and state-dict hooks are torch.optim's."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([weight])
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("save"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    weight.grad = torch.ones(2)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post", "save", "load", "loaded"]
    optimizer.zero_grad()
    assert weight.grad is None


# --- groups ---


def test_add_param_group_after_steps() -> None:
    """Defect 8: a group that is added late is stepped from its own first step on."""
    model = Net()
    data = batches(12, model)
    named = dict(model.named_parameters())
    head = {name: param for name, param in named.items() if name.startswith("head")}
    rest = {name: param for name, param in named.items() if name not in head}
    twin = copy.deepcopy(model)
    optimizer = make_optimizer(rest.items())
    for batch in data[:5]:
        backward(model, batch)
        optimizer.step()
    optimizer.add_param_group({"params": head.items(), "lr": 0.2, "beta1": 0.5})
    for batch in data[5:]:
        backward(model, batch)
        optimizer.step()
    names = dict(twin.named_parameters())
    one = make_optimizer([(name, names[name]) for name in rest])
    two = sf.ShampooOptimizer(
        [(name, names[name]) for name in head], lr=0.2, **{**SETTINGS, "beta1": 0.5}
    )
    for step, batch in enumerate(data):
        backward(twin, batch)
        one.step()
        if step >= 5:
            two.step()
    assert all(torch.equal(named[name], names[name]) for name in names)
    assert [group["step"] for group in optimizer.param_groups] == [12, 7]


# --- copying and saving ---


def copies() -> dict[str, Callable[[Any], Any]]:
    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda both: pickle.loads(pickle.dumps(both)),
    }


@pytest.mark.parametrize("way", copies())
@pytest.mark.parametrize("steps", [0, 5])
def test_copies_go_on(way: str, steps: int) -> None:
    """Defect 8: a copied or unpickled optimizer continues with its own model, bit for bit."""
    model = Net()
    data = batches(steps + 6, model)
    optimizer = sf.ShampooOptimizer(two_groups(model), lr=0.02, **SETTINGS)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(model, optimizer, data[:steps], scheduler) if steps else None
    twin, twin_optimizer = copies()[way]((model, optimizer))
    mine = train(model, optimizer, data[steps:])
    assert not torch.equal(next(twin.parameters()), next(model.parameters()))
    check_equal(train(twin, twin_optimizer, data[steps:]), mine)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("steps", [0, 5])
def test_saving_and_resuming(named: bool, steps: int) -> None:
    """A run continues bit for bit from a file that `weights_only` reads, scheduler and all."""

    def build(model: nn.Module) -> tuple[Any, Any]:
        groups = two_groups(model)
        for group in groups if not named else ():
            group["params"] = [param for _, param in group["params"]]
        optimizer = sf.ShampooOptimizer(groups, lr=0.02, **SETTINGS)
        warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
        return optimizer, lr_scheduler.SequentialLR(
            optimizer, [warm, lr_scheduler.CosineAnnealingLR(optimizer, 10)], [4]
        )

    model = Net()
    data = batches(12, model)
    optimizer, scheduler = build(model)
    if steps:
        train(model, optimizer, data[:steps], scheduler)
    optimizer.param_groups[0]["beta2"] = 0.8  # an edit that must not be lost
    saved = saved_and_loaded(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
    )
    expected = train(model, optimizer, data[steps:], scheduler)

    fresh = Net()
    fresh_optimizer, fresh_scheduler = build(fresh)
    fresh.load_state_dict(saved["model"])
    fresh_optimizer.load_state_dict(saved["optimizer"])
    fresh_scheduler.load_state_dict(saved["scheduler"])
    assert fresh_optimizer.param_groups[0]["beta2"] == 0.8
    got = train(fresh, fresh_optimizer, data[steps:], fresh_scheduler)
    for one, two in zip(got, expected, strict=True):
        for name in one:
            # beta2 lives as a tensor in one of them only, whose complement rounds otherwise
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_state_dict_is_plain_and_in_torchs_shape() -> None:
    """State by the parameter's number, flat and named; options that files can hold."""
    model = mlp()
    optimizer = sf.as_optimizer(
        model.named_parameters(),
        sf.with_hyperparams(
            sf.shampoo,
            learning_rate=sf.constant_schedule(0.1),
            root=sf.eigh_root(1e-3),
            beta2=0.9,
            factor_dtype=torch.float64,
            exponents={2: 0.5},
        ),
    )
    train(model, optimizer, batches(2, model))
    saved = optimizer.state_dict()
    assert sorted(saved) == ["param_groups", "state"] and list(saved["state"]) == [0, 1, 2, 3]
    assert all(isinstance(v, Tensor) for own in saved["state"].values() for v in own.values())
    assert saved["state"][1]["precondition/b0/preconditioner/direction/factors/0"].shape == (8, 8)
    assert saved["state"][0]["shared:scale_by_learning_rate/step"] == 2
    (group,) = saved["param_groups"]
    assert group["root"].startswith("object: EighRoot(")
    assert group["param_names"] == names_of(model) and group["exponents"] == {2: 0.5}
    optimizer.load_state_dict(saved_and_loaded(saved))
    assert optimizer.param_groups[0]["root"] == sf.eigh_root(1e-3)
    assert optimizer.param_groups[0]["factor_dtype"] == torch.float64


def test_names_find_their_state_in_another_order() -> None:
    """With names on both sides, the order of the parameters does not matter."""
    params = two_params()
    optimizer = make_optimizer(params.items())
    fixed_run(optimizer, params, random_grads(params, 3))
    saved = optimizer.state_dict()
    turned = make_optimizer(reversed(params.items()))
    turned.load_state_dict(saved)
    for param in params.values():
        check_same_state({0: optimizer.state[param]}, {0: turned.state[param]})


def broken(change: Callable[[Any], object]) -> Callable[[], None]:
    def load() -> None:
        params = two_params()
        optimizer = make_optimizer(params.items())
        fixed_run(optimizer, params, random_grads(params, 3))
        before = state_bits(optimizer)
        saved = saved_and_loaded(optimizer.state_dict())
        change(saved)
        try:
            optimizer.load_state_dict(saved)
        finally:
            check_same_state(before, state_bits(optimizer))

    return load


MISFITS = {
    "groups": (broken(lambda d: d["param_groups"].append(d["param_groups"][0])), r"\[2, 2\] param"),
    "missing": (broken(lambda d: d["state"][1].pop("trace/trace")), "missing: 'b: trace/trace'"),
    "parameter": (broken(lambda d: d["state"].pop(1)), "no state for the parameter 'b'"),
    "unexpected": (
        broken(lambda d: d["state"][0].update(more=torch.ones(1))),
        "unexpected: 'a: more'",
    ),
    "shape": (
        broken(lambda d: d["state"][0].update({"trace/trace": torch.ones(2).double()})),
        r"'a: trace/trace' is \(2,\) float64, expected \(5, 3\) float64",
    ),
    "dtype": (
        broken(lambda d: d["state"][0].update({"trace/trace": torch.ones(5, 3)})),
        "float32, expected",
    ),
    "block size": (
        broken(lambda d: d["param_groups"][0].update(block_size=2)),
        "missing: 'a: precondition/b0_1/",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_named_and_change_nothing(name: str) -> None:
    """Loading is all or nothing."""
    load, message = MISFITS[name]
    with pytest.raises(CheckpointError, match=message):
        load()


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoint_takes_it(flat: bool) -> None:
    """`get_optimizer_state_dict` names parameters, and `set_...` brings everything back."""
    model = Net()
    data = batches(9, model)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    optimizer = sf.ShampooOptimizer(two_groups(model), lr=0.02, **SETTINGS)
    train(model, optimizer, data[:4])
    saved: Any = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    weights = copy.deepcopy(model.state_dict())
    if flat:
        assert "state.head.weight.trace/trace" in saved
    else:
        assert "trace/trace" in saved["state"]["head.weight"]
    expected = train(model, optimizer, data[4:])
    fresh = Net()
    fresh.load_state_dict(weights)
    other = sf.ShampooOptimizer(two_groups(fresh), lr=0.5, **SETTINGS)
    set_optimizer_state_dict(fresh, other, saved, options=options)
    check_equal(train(fresh, other, data[4:]), expected)


def test_looking_at_the_state_does_not_step() -> None:
    """Asking for the state before the first step changes nothing, whoever asks."""
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = make_optimizer(model.named_parameters())
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.param_groups[0]["step"] == 0
    data = batches(5, model)
    check_equal(
        train(model, optimizer, data), train(twin, make_optimizer(twin.named_parameters()), data)
    )


# --- averaging, failing roots ---


def is_a(path: str, leaf: torch.Tensor) -> bool:
    """Choose the parameter of this name."""
    return path == "a"


def test_eval_and_train() -> None:
    """`eval` puts the averages in place, `train` the parameters back, bit for bit."""
    params = two_params()
    tx = sf.chain(sf.sgd(0.1), sf.masked(sf.weight_lawa(3), where=is_a))
    optimizer = sf.as_optimizer(params.items(), tx)
    values = [fixed_run(optimizer, params, random_grads(params, 1)) for _ in range(3)]
    optimizer.eval()
    optimizer.eval()
    torch.testing.assert_close(params["a"].detach(), sum(v["a"] for v in values) / 3)
    assert torch.equal(params["b"], values[-1]["b"])
    with pytest.raises(OptimizerError, match=r"call train\(\) before step"):
        optimizer.step()
    with pytest.raises(OptimizerError, match=r"call train\(\) before saving"):
        optimizer.state_dict()
    copied_params, copied = copy.deepcopy((params, optimizer))
    for own, shell in ((params, optimizer), (copied_params, copied)):
        shell.train()
        assert all(torch.equal(own[name], values[-1][name]) for name in own)
        shell.train()
        shell.step()


def test_eval_without_an_average() -> None:
    """With nothing averaged, `eval` changes nothing, and steps go on."""
    params = two_params()
    optimizer = make_optimizer(params.items())
    optimizer.eval()
    optimizer.train(False)
    before = fixed_run(optimizer, params, random_grads(params, 1))
    optimizer.eval()
    assert all(torch.equal(params[name], before[name]) for name in before)
    optimizer.step()


def test_roots_that_keep_failing_raise() -> None:
    """After a refresh, with parameter and block, once a root has failed too often in a row."""
    params = two_params()
    optimizer = make_optimizer(params.items(), max_failures=1)
    grads = random_grads(params, 8)
    for grad in grads:
        grad["b"].fill_(torch.nan)
    fixed_run(optimizer, params, grads[:7])  # refresh_every=4: one failure is tolerated
    with pytest.raises(RootFailureError, match=r"'b', block of shape \(5, 3\).*latest 2 refreshes"):
        fixed_run(optimizer, params, grads[7:])
    patient = make_optimizer(two_params().items(), max_failures=None)
    patient.load_state_dict(optimizer.state_dict())
    patient.step()


# --- clocks and compiling ---


def test_stages_of_different_clocks() -> None:
    """Where one flag cannot serve all stages, each decides by its own counter."""
    params = two_params()
    tx = sf.partition(
        {
            "a": sf.scale_by_shampoo(refresh_every=2, block_size=2),
            "b": sf.scale_by_shampoo(refresh_every=3, block_size=2),
        },
        [("a", "a"), ("b", "b")],
    )
    chained = sf.chain(tx, sf.scale_by_learning_rate(0.1))
    optimizer = sf.as_optimizer(params.items(), chained)
    grads = random_grads(params, 7)
    own = {name: p.detach().clone() for name, p in params.items()}
    state = chained.init(own)
    got = fixed_run(optimizer, params, grads)
    for grad in grads:
        updates, state = chained.update(grad, state, own)
        own = sf.apply_updates(own, updates)
    assert all(torch.equal(got[name], own[name]) for name in own)


@pytest.fixture
def counter() -> Iterator[Any]:
    with fresh_compiler("aot_eager") as found:
        yield found


@pytest.mark.slow
def test_compiled_has_two_graphs(counter: Any) -> None:
    """Two groups under a scheduler: one graph with a refresh, one without, and the same values."""
    model = mlp()
    data = batches(14, model)
    twin = copy.deepcopy(model)
    groups = two_groups(model)
    groups[1]["refresh_every"] = SETTINGS["refresh_every"]
    other_groups = two_groups(twin)
    other_groups[1]["refresh_every"] = SETTINGS["refresh_every"]
    optimizer = sf.ShampooOptimizer(groups, lr=0.02, compile={"backend": counter}, **SETTINGS)
    other = sf.ShampooOptimizer(other_groups, lr=0.02, **SETTINGS)
    schedulers = [lr_scheduler.LinearLR(opt, 0.1, total_iters=9) for opt in (optimizer, other)]
    storages = [p.data_ptr() for p in model.parameters()]
    got = train(model, optimizer, data, schedulers[0])
    expected = train(twin, other, data, schedulers[1])
    assert optimizer._compiled is not None and graph_count(optimizer._compiled[1]) == 2
    assert [p.data_ptr() for p in model.parameters()] == storages
    for one, two in zip(got, expected, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_rate_reaches_corrected_decay(counter: Any) -> None:
    """What a stage computes from the rate is computed in the graph, from the rate of the step."""
    params = two_params()
    twin = copy.deepcopy(params)
    settings = {**SETTINGS, "weight_decay_kind": "corrected", "weight_decay": 0.9}
    compiled = sf.ShampooOptimizer(params.items(), 0.1, compile={"backend": counter}, **settings)
    eager = sf.ShampooOptimizer(twin.items(), 0.1, **settings)
    for step, grad in enumerate(random_grads(params, 6)):
        for optimizer, own in ((compiled, params), (eager, twin)):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            fixed_run(optimizer, own, [grad])
    assert compiled._compiled is not None and graph_count(compiled._compiled[1]) == 2
    for name in params:
        torch.testing.assert_close(params[name], twin[name], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    """The default compiler, by `compile=True`."""
    if BACKEND != "inductor":
        pytest.skip("needs a C++ compiler")
    model = mlp()
    data = batches(9, model)
    twin = copy.deepcopy(model)
    with fresh_compiler():
        optimizer = make_optimizer(model.named_parameters(), compile=True)
        got = train(model, optimizer, data)
    expected = train(twin, make_optimizer(twin.named_parameters()), data)
    for one, two in zip(got, expected, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_accumulation_counts_calls() -> None:
    """The clock counts the steps of the shell under gradient accumulation."""
    model = mlp()
    data = batches(16, model)
    tx = sf.accumulate(sf.shampoo(0.02, **SETTINGS), every=2)
    expected = functional(model, [(lambda _: tx, names_of(model))], data)
    check_equal(train(model, sf.as_optimizer(model.named_parameters(), tx), data), expected)


def test_unnamed_parameters_are_numbered() -> None:
    """Without names, parameters are called by their number in the optimizer."""
    params = [nn.Parameter(torch.randn(2)) for _ in range(3)]
    optimizer = make_optimizer([{"params": params[:1]}, {"params": params[1:]}])
    for param, grad in zip(params, itertools.repeat(torch.ones(2)), strict=False):
        param.grad = grad
    params[2].grad = torch.ones(2).to_sparse()
    with pytest.raises(GradientError, match="gradient of '2' is a sparse"):
        optimizer.step()


def test_the_example_resumes(tmp_path: Path) -> None:
    """The example, stopped and resumed, ends where the whole run ends."""
    root = Path(__file__).parent.parent
    script = [sys.executable, str(root / "examples" / "train_torch_loop.py"), "--steps", "30"]
    environment = {**os.environ, "PYTHONPATH": str(root)}

    def run(*more: str) -> str:
        arguments = [*script, "--checkpoint", str(tmp_path / "run.pt"), *more]
        done = subprocess.run(
            arguments, check=True, env=environment, capture_output=True, text=True, timeout=120
        )
        return done.stdout.splitlines()[-1]

    whole = run()
    (tmp_path / "run.pt").unlink()
    run("--stop-after", "13")
    assert run() == whole
