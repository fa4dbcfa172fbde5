"""The defects that were found in Distributed Shampoo are not here: one test each, at least.

They are numbered as in the study of the reference. Those of its `torch.optim` shell have their
tests with ours, in tests/test_torch_optim_shell.py: `p.grad` written over (the other half of 2),
a learning rate changed in a param group (6), hyper-parameters changed half (7), `add_param_group`,
deepcopy and unpickling (8). Number 11, processes that wait for each other for ever, is about
distributed runs.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import io
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shampoo_func as sf
from shampoo_func import tree
from shampoo_func.errors import ParameterError

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "shampoo_func").rglob("*.py"))
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def run(
    tx: sf.Transformation, params: Any, steps: int, grads: Callable[[int], Any]
) -> tuple[Any, Any]:
    """Return parameters and state after a few steps."""
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update(grads(step), state, params)
        params = sf.apply_updates(params, updates)
    return params, state


# 1. State was written over by the update that was computed from it ------------------------------


@pytest.mark.parametrize(
    "preconditioner",
    [
        sf.identity_preconditioner(),
        sf.graft(direction=sf.kronecker(), magnitude=sf.identity_preconditioner()),
    ],
    ids=["sgd", "sgd grafting in warm-up"],
)
def test_the_filter_is_not_written_over(preconditioner: sf.Preconditioner) -> None:
    """Where the direction is the filter's own average, decay and learning rate leave it alone."""
    tx = sf.chain(
        sf.blocked(
            sf.precondition(
                preconditioner,
                filter=sf.ema(0.9, bias_correction=False),
                refresh_every=5,
                start=100,
            )
        ),
        sf.add_decayed_weights(0.1),
        sf.scale_by_learning_rate(0.1),
    )
    _, state = run(tx, {"w": torch.ones(2, 2)}, 3, lambda _: {"w": torch.ones(2, 2)})
    kept = state["precondition"]["4"].filter.ema
    assert kept.flatten().tolist() == pytest.approx([1 - 0.9**3] * 4)


# 2. Gradients were written over -------------------------------------------------------------------


KEEPS_GRADIENTS: dict[str, sf.Transformation] = {
    "l2": sf.shampoo(0.1, weight_decay=0.5, weight_decay_kind="l2"),
    "sgd without a filter": sf.chain(
        sf.blocked(sf.precondition(sf.identity_preconditioner())), sf.scale_by_learning_rate(0.1)
    ),
    "all dimensions ignored": sf.shampoo(
        0.1, beta1=0.0, grafting=None, refresh_every=1, exponents={1: 0.0, 2: 0.0}
    ),
    "unblocked": sf.chain(sf.precondition(sf.identity_preconditioner()), sf.scale(-0.1)),
}


@pytest.mark.parametrize("name", KEEPS_GRADIENTS)
def test_gradients_are_not_written_over(name: str) -> None:
    """Gradients are as they were, and so are parameters until `apply_updates` makes new ones."""
    tx = KEEPS_GRADIENTS[name]
    params = {"scalar": torch.tensor(2.0), "b": torch.ones(3), "w": torch.ones(40, 30)}
    grads = tree.map(torch.randn_like, params)
    before = copy.deepcopy((params, grads))
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(grads, state, params)
    for now, then in zip(tree.leaves((params, grads)), tree.leaves(before), strict=True):
        assert torch.equal(now, then)


# 3. One optimizer changed the defaults of all that came after it ---------------------------------


def test_an_optimizer_changes_no_default() -> None:
    """Spectral descent keeps matrices; a Shampoo made later merges as one made before."""
    params = {"w": torch.zeros(4, 5)}
    before = sf.shampoo(0.1)
    spectral = sf.chain(
        sf.blocked(sf.precondition(sf.polar()), block_size=None, merge_to=2),
        sf.scale_by_learning_rate(0.1),
    )
    assert list(spectral.init(params)["precondition"]) == ["4x5"]
    after = sf.shampoo(0.1)
    assert before == after
    assert list(after.init(params)["precondition"]) == ["20"]


@pytest.mark.parametrize(
    "value",
    [sf.kronecker(), sf.polar(), sf.eigh_root(), sf.shampoo(0.1), sf.blocked(sf.scale(1.0))],
    ids=lambda value: type(value).__name__,
)
def test_settings_cannot_be_changed(value: Any) -> None:
    """No setting of a stage, preconditioner or solver can be assigned to."""
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)


# 4. Two accumulators had one name in the checkpoint ----------------------------------------------


def test_direction_and_magnitude_are_both_in_a_checkpoint() -> None:
    """Two second moments, one for the direction and one for the norm, are stored apart."""
    tx = sf.chain(
        sf.blocked(
            sf.precondition(
                sf.graft(
                    direction=sf.second_moment(1.0, epsilon=1e-10), magnitude=sf.second_moment(0.9)
                )
            )
        ),
        sf.scale_by_learning_rate(0.1),
    )
    torch.manual_seed(0)
    gradients = [{"w": torch.randn(3, 4)} for _ in range(6)]
    params, state = run(tx, {"w": torch.ones(3, 4)}, 4, gradients.__getitem__)
    saved = sf.to_state_dict(tx, state, params)
    moments = [saved[name] for name in saved if name.endswith("second_moment")]
    assert len(moments) == 2 and not torch.equal(*moments)
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    again = sf.from_state_dict(tx, params, torch.load(file, weights_only=True))
    for gradient in gradients[4:]:
        updates, state = tx.update(gradient, state, params)
        updates_again, again = tx.update(gradient, again, params)
        assert torch.equal(updates["w"], updates_again["w"])


# 5. Schedule-Free with a learning rate of 0 on the first step made every parameter NaN -----------


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_schedule_free_survives_a_rate_of_zero(power: float) -> None:
    """While the rate is 0 nothing moves; after that the average begins."""
    rates = sf.linear_schedule(0.0, 0.1, 4)
    tx = sf.chain(sf.identity(), sf.schedule_free(rates, 0.8, power))
    start = {"w": torch.ones(3)}
    still, _ = run(tx, start, 1, lambda _: {"w": torch.ones(3)})
    moved, state = run(tx, start, 6, lambda _: {"w": torch.ones(3)})
    assert torch.equal(still["w"], start["w"])
    assert torch.isfinite(moved["w"]).all() and (moved["w"] < 1.0).all()
    assert torch.isfinite(sf.eval_params(tx, state, moved)["w"]).all()


# 6. Decay relative to the peak used another group's peak ----------------------------------------


@pytest.mark.parametrize("kind", ["corrected", "independent"])
def test_every_group_decays_by_its_own_peak(kind: Any) -> None:
    """With two learning rates, each parameter's decay is relative to its own."""
    peaks = {"fast": 0.5, "slow": 0.05}
    groups = {
        label: sf.shampoo(peak, weight_decay=0.2, weight_decay_kind=kind)
        for label, peak in peaks.items()
    }
    tx = sf.partition(groups, lambda path, leaf: path)
    params = {label: torch.ones(4) for label in peaks}
    updates, _ = tx.update(tree.map(torch.zeros_like, params), tx.init(params), params)
    for label, peak in peaks.items():
        shrinks = 0.2 * (peak if kind == "corrected" else 1.0)
        assert updates[label].tolist() == pytest.approx([-shrinks] * 4)


# 8. Optimizers could not be copied or unpickled ---------------------------------------------------


def test_optimizer_and_state_are_copied_and_pickled() -> None:
    """A copy, and one from a pickle, go on as the original does."""
    tx = sf.shampoo(0.1, beta2=0.9, weight_decay=0.1, momentum=0.5, refresh_every=2)
    torch.manual_seed(0)
    gradients = [{"w": torch.randn(3, 4)} for _ in range(5)]
    params, state = run(tx, {"w": torch.ones(3, 4)}, 3, gradients.__getitem__)
    expected, _ = tx.update(gradients[3], state, params)
    for other, own in (copy.deepcopy((tx, state)), pickle.loads(pickle.dumps((tx, state)))):
        assert torch.equal(other.update(gradients[3], own, params)[0]["w"], expected["w"])


# 9. Strides, complex and sparse parameters --------------------------------------------------------


@pytest.mark.parametrize("layout", ["transposed", "channels last", "sliced"])
def test_any_strides_will_do(layout: str) -> None:
    """A parameter that is no contiguous piece of memory is optimized as one that is."""
    make: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
        "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    }
    torch.manual_seed(0)
    value, gradient = torch.randn(2, 4, 3, 3).double(), torch.randn(2, 4, 3, 3).double()
    tx = sf.shampoo(0.1, block_size=6, refresh_every=1, weight_decay=0.1)
    expected, _ = run(tx, value, 2, lambda _: gradient)
    odd = make[layout](value)
    assert not odd.is_contiguous()
    result, _ = run(tx, odd, 2, lambda _: make[layout](gradient))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("leaf", "seen"),
    [
        (torch.zeros(3, dtype=torch.complex64), "complex64"),
        (torch.zeros(3, 3).to_sparse(), "sparse"),
    ],
    ids=["complex", "sparse"],
)
def test_unusable_parameters_are_named(leaf: Tensor, seen: str) -> None:
    """The error says which parameter it is, and what is wrong with it."""
    params = {"layer": {"weight": leaf, "bias": torch.zeros(3)}}
    with pytest.raises(ParameterError, match=rf"layer[./]weight.*{seen}"):
        sf.shampoo(0.1).init(params)


# 10. The README imported what was not there -------------------------------------------------------


def python_blocks(path: Path) -> list[str]:
    """Return the Python blocks of a Markdown file."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_texts_name_what_exists(path: Path) -> None:
    """Every `sf.NAME`, in code and in prose, is a public name; every link leads to a file."""
    text = path.read_text()
    names = set(re.findall(r"\bsf\.([a-z]\w+)", text))
    rooms = {file.parent.name if file.stem == "__init__" else file.stem for file in LIBRARY}
    assert sorted(name for name in names if name not in sf.__all__ and name not in rooms) == []
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_texts_import_what_exists(path: Path) -> None:
    """Every import of ours in a snippet works."""
    for block in python_blocks(path):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("shampoo_func"):
                module = __import__(str(node.module), fromlist=["_"])
                missing = [a.name for a in node.names if not hasattr(module, a.name)]
                assert missing == [], node.module


# 12. An error message showed the code of its own formatting ---------------------------------------


def raised_texts(path: Path) -> Iterator[ast.expr]:
    """Yield the arguments of every exception that a file raises."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from node.exc.args


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.name)
def test_messages_format_what_they_mean_to(path: Path) -> None:
    """No message has braces that were meant to be filled, or the name of a variable in it."""
    for argument in raised_texts(path):
        inside = {
            id(part)
            for node in ast.walk(argument)
            if isinstance(node, ast.JoinedStr)
            for part in node.values
        }
        for node in ast.walk(argument):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                formatted = id(node) in inside
                assert formatted or not re.search(r"\{[a-z_]+[^{}]*\}", node.value), node.value
            if isinstance(node, ast.JoinedStr):
                for before, after in zip(node.values, node.values[1:], strict=False):
                    if isinstance(before, ast.Constant) and isinstance(after, ast.FormattedValue):
                        # f"{path=}" prints the expression, and so the code, of what it shows
                        echo = f"{ast.unparse(after.value)}="
                        assert not str(before.value).endswith(echo) or is_argument(echo), echo


def is_argument(echo: str) -> bool:
    """Whether `name=` is what a user wrote in a call: a plain name."""
    return echo.removesuffix("=").isidentifier()


def test_failed_refresh_is_reported_by_path() -> None:
    """Who follows up a failing root learns the parameter and the count, and sees no matrix."""
    tx = sf.shampoo(0.1, refresh_every=1, grafting="sgd", block_size=4)
    params = {"layer": {"weight": torch.ones(4, 4), "bias": torch.ones(4)}}

    def poisoned(_: int) -> Any:
        return {"layer": {"weight": torch.full((4, 4), torch.nan), "bias": torch.ones(4)}}

    _, state = run(tx, params, 5, poisoned)
    with pytest.raises(sf.ShampooFuncError) as caught:
        sf.check_failures(tx, state, params, limit=3)
    assert "layer" in str(caught.value) and "weight" in str(caught.value)
    assert "bias" not in str(caught.value)
    assert "tensor(" not in str(caught.value) and len(str(caught.value)) < 600
    sf.check_failures(tx, state, params, limit=5)
