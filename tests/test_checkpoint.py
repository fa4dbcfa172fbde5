"""States as flat dicts of named tensors: exact, canonical, and strict about what fits."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from catalogue import CASES, Case, small_shampoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import shampoo_func as sf
from shampoo_func import tree
from shampoo_func.checkpoint.packing import is_symmetric, pack, unpack
from shampoo_func.errors import CheckpointError
from shampoo_func.types import named_roles


class Pair(NamedTuple):
    """A NamedTuple of parameters."""

    left: Tensor
    right: Any


def nested() -> Any:
    """Parameters of many shapes, dtypes and layouts, in every kind of container."""
    return {
        "layer": {"w": torch.randn(4, 3), "b": torch.randn(3)},
        "list": [torch.randn(5, 7, dtype=torch.float64), torch.randn(())],
        "pair": Pair(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last), ()),
        "empty": torch.zeros(0, 3),
    }


def trained(tx: sf.Transformation, params: Any, steps: int = 3) -> Any:
    """A state after a few steps of random gradients."""
    state = tx.init(params)
    for _ in range(steps):
        _, state = tx.update(tree.map(torch.randn_like, params), state, params)
    return state


def check_same(one: Any, other: Any) -> None:
    """Every leaf has the same place, bits, dtype and strides."""
    assert tree.paths(one) == tree.paths(other)
    for own, saved in zip(tree.leaves(one), tree.leaves(other), strict=True):
        assert torch.equal(own, saved)
        assert (own.dtype, own.stride()) == (saved.dtype, saved.stride())


def through_a_file(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a careful reader gets back."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_state_comes_back_bit_for_bit(case: Case) -> None:
    """Every transformation's state, for nested parameters, survives a file exactly."""
    tx, params = case.make(), nested()
    state = trained(tx, params)
    saved = sf.to_state_dict(tx, state, params)
    check_same(sf.from_state_dict(tx, params, through_a_file(saved)), state)


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_state_is_flat_tensors_with_memory_of_their_own(case: Case) -> None:
    """What safetensors asks for: contiguous tensors, none of which shares memory."""
    tx, params = case.make(), nested()
    state = trained(tx, params, 1)
    saved = sf.to_state_dict(tx, state, params)
    assert all(type(key) is str and type(value) is Tensor for key, value in saved.items())
    assert all(value.is_contiguous() and not value.requires_grad for value in saved.values())
    places = [memory(value) for value in saved.values() if value.numel()]
    assert len(set(places)) == len(places)
    theirs = [*tree.leaves(state), *tree.leaves(params)]
    assert not {memory(leaf) for leaf in theirs if leaf.numel()} & set(places)


def test_names_are_parameter_block_and_role() -> None:
    """The name of a leaf can be written down without knowing how blocks are stacked."""
    tx = sf.chain(small_shampoo(momentum=0.5), ("again", sf.trace(0.5)))
    params = {"layers.0.weight": torch.randn(4, 5)}
    saved = sf.to_state_dict(tx, tx.init(params), params)
    own = "state/chain/precondition/layers.0.weight"
    assert saved[f"{own}/b0_1/preconditioner/direction/factors/0"].shape == (3, 3)
    assert saved[f"{own}/b0_1/preconditioner/direction/factors/1"].shape == (2, 2)
    assert saved[f"{own}/b1_0/filter/ema"].shape == (1, 3)
    assert saved[f"{own}/b1_1/step"].shape == ()
    assert saved["state/chain/trace/trace/layers.0.weight"].shape == (4, 5)
    assert saved["state/again/trace/layers.0.weight"].shape == (4, 5)


def test_names_and_values_do_not_depend_on_the_neighbours() -> None:
    """A parameter is saved alike, whichever others share its stacks and however they nest."""
    tx = small_shampoo(momentum=0.5, grafting="adam")
    params = {"m.w": torch.randn(4, 5), "a": torch.randn(6, 3), "z": torch.randn(3, 3)}
    grads = [tree.map(torch.randn_like, params) for _ in range(4)]

    def saved(wrap: Callable[[dict[str, Tensor]], Any], names: list[str]) -> dict[str, Tensor]:
        own = wrap({name: params[name] for name in names})
        state = tx.init(own)
        for grad in grads:
            _, state = tx.update(wrap({name: grad[name] for name in names}), state, own)
        return sf.to_state_dict(tx, state, own)

    together = saved(dict, ["m.w", "a", "z"])
    alone = saved(lambda leaves: {"m": {"w": leaves["m.w"]}}, ["m.w"])
    mine = {key: value for key, value in together.items() if "/m.w" in key}
    assert mine.keys() == alone.keys() - {"metadata"}
    for key, value in mine.items():
        torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-5)
    state = sf.from_state_dict(tx, {"m.w": params["m.w"]}, alone)
    assert set(state["precondition"]) == {"3x3", "3x2", "1x3", "1x2"}


def test_training_continues_bit_for_bit() -> None:
    """A run that is saved and loaded half way ends as one that is not."""
    tx, start = small_shampoo(weight_decay=0.1, momentum=0.5), nested()
    grads = [tree.map(torch.randn_like, start) for _ in range(7)]

    def run(params: Any, state: Any, steps: list[Any]) -> tuple[Any, Any]:
        for grad in steps:
            updates, state = tx.update(grad, state, params)
            params = sf.apply_updates(params, updates)
        return params, state

    whole = run(start, tx.init(start), grads)
    params, state = run(start, tx.init(start), grads[:3])
    saved = through_a_file(sf.to_state_dict(tx, state, params))
    resumed = run(params, sf.from_state_dict(tx, params, saved), grads[3:])
    check_same(whole, resumed)


def test_hyperparameters_in_the_state_are_saved() -> None:
    """A learning rate that was changed in the state comes back changed."""
    tx, params = sf.with_hyperparams(sf.sgd, learning_rate=0.1), {"w": torch.ones(2)}
    state = tx.init(params)
    state.hyperparams["learning_rate"].fill_(0.5)
    saved = sf.to_state_dict(tx, state, params)
    assert saved["state/hyperparams/learning_rate"] == 0.5
    loaded = sf.from_state_dict(tx, params, saved)
    assert loaded.hyperparams["learning_rate"] == 0.5


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: sf.chain(sf.clip(1.0), runs=tx)])
def test_sweeps(wrap: Callable[[sf.Transformation], sf.Transformation]) -> None:
    """A sweep's state is saved with the runs first, block by block."""

    def factory(learning_rate: Any) -> sf.Transformation:
        return sf.shampoo(learning_rate, block_size=3, beta2=0.9, epsilon=1e-3, refresh_every=2)

    tx = wrap(sf.sweep(factory, learning_rate=torch.tensor([0.1, 0.2, 0.3])))
    params = sf.stack_copies({"w": torch.randn(4, 5)}, 3)
    state = tx.init(params)
    for _ in range(3):
        grads = tree.map(torch.randn_like, params)
        if isinstance(tx, sf.transforms.Chain):
            _, state = tx.update(grads, state, params)
        else:
            _, state = tx.update(grads, state, params, refresh=True)
    saved = sf.to_state_dict(tx, state, params)
    (key,) = [key for key in saved if key.endswith("w/b0_1/preconditioner/direction/factors/1")]
    assert saved[key].shape == (3, 2, 2)
    check_same(sf.from_state_dict(tx, params, saved), state)


@pytest.mark.parametrize("params", [{}, [], (), {"e": torch.zeros(0)}])
def test_nothing_to_save(params: Any) -> None:
    """Trees without a parameter or without an element."""
    tx = sf.chain(small_shampoo(), ("t", sf.trace(0.9)))
    state = tx.init(params)
    check_same(sf.from_state_dict(tx, params, sf.to_state_dict(tx, state, params)), state)


def test_a_bare_tensor() -> None:
    """A parameter without a tree has no path in the names."""
    tx, params = small_shampoo(momentum=0.5), torch.randn(4, 3)
    state = trained(tx, params)
    saved = sf.to_state_dict(tx, state, params)
    assert {"state/trace/trace", "state/precondition/b1_0/filter/ema"} <= saved.keys()
    check_same(sf.from_state_dict(tx, params, saved), state)


class CodesState(NamedTuple):
    """What a quantized preconditioner may keep: codes, scales, bits, and a nested tuple."""

    codes: Tensor
    scales: dict[str, Tensor]
    signs: Tensor
    symmetric: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Codes(sf.Preconditioner):
    """Keeps integers, flags, and symmetric and unsymmetric matrices."""

    exact: bool = True

    def init(self, block: Tensor) -> CodesState:
        matrix = torch.arange(16.0, dtype=torch.float64).reshape(4, 4)
        matrix = matrix + matrix.mT if self.exact else matrix
        return CodesState(
            torch.arange(5, dtype=torch.uint8),
            {"absmax": block.new_ones(2, dtype=torch.bfloat16)},
            torch.tensor([True, False]),
            (matrix, matrix.to(torch.bfloat16), torch.zeros(0, 0), torch.full((2, 2), torch.nan)),
        )

    def accumulate(self, state: CodesState, grads: Tensor) -> CodesState:
        return state._replace(codes=state.codes + 1)

    def refresh(self, state: CodesState) -> CodesState:
        return state

    def apply(self, state: CodesState, updates: Tensor) -> Tensor:
        return updates

    def roles(self, state: CodesState) -> Any:
        return named_roles(state, {"symmetric": "factor"})


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("blocked", [True, False])
def test_symmetric_packing(exact: bool, blocked: bool) -> None:
    """Matrices that are symmetric in every bit are stored as triangles; others whole."""
    stage: sf.Transformation = sf.precondition(Codes(exact))
    tx = sf.blocked(stage, block_size=3, merge_dims=False) if blocked else stage
    params = {"w": torch.randn(3, 4)}
    state = tx.init(params)
    saved = sf.to_state_dict(tx, state, params, pack_symmetric=True)
    triangles = [value for key, value in saved.items() if key.endswith("/upper")]
    blocks = 2 if blocked else 1
    assert sorted(value.shape for value in triangles) == sorted(
        blocks * ([(0,), (3,), (10,), (10,)] if exact else [(0,), (3,)])
    )
    loaded = sf.from_state_dict(tx, params, through_a_file(saved))
    for own, other in zip(tree.leaves(state), tree.leaves(loaded), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)


@given(size=st.integers(0, 7), leading=st.sampled_from([(), (1,), (2, 3)]))
def test_packing_is_exact(size: int, leading: tuple[int, ...]) -> None:
    """Unpacking a packed symmetric matrix gives it back; any other is not called symmetric."""
    matrix = torch.randn(*leading, size, size)
    symmetric = matrix + matrix.mT
    assert is_symmetric(symmetric)
    assert is_symmetric(matrix) == (size < 2)
    packed = pack(symmetric)
    assert packed.shape == (*leading, size * (size + 1) // 2)
    assert torch.equal(unpack(packed, size), symmetric)


def test_minus_zero_is_not_zero() -> None:
    """A matrix that only compares equal to its transpose is stored whole."""
    assert not is_symmetric(torch.tensor([[1.0, -0.0], [0.0, 1.0]]))


def altered(change: Callable[[dict[str, Tensor]], object]) -> Callable[[], object]:
    """Load a checkpoint after changing it."""

    def load() -> object:
        tx, params = small_shampoo(momentum=0.5), {"w": torch.randn(4, 5)}
        saved = sf.to_state_dict(tx, tx.init(params), params)
        change(saved)
        return sf.from_state_dict(tx, params, saved)

    return load


def for_others(tx: sf.Transformation, params: Any) -> Callable[[], object]:
    """Load a checkpoint for another transformation or other parameters."""

    def load() -> object:
        old, old_params = small_shampoo(momentum=0.5), {"w": torch.randn(4, 5)}
        return sf.from_state_dict(
            tx, params, sf.to_state_dict(old, old.init(old_params), old_params)
        )

    return load


MISFITS = {
    "missing": (
        altered(lambda saved: saved.pop("state/trace/trace/w")),
        r"missing: 'state/trace/trace/w'\.",
    ),
    "unexpected": (
        altered(lambda saved: saved.update({"state/more": torch.ones(1)})),
        r"unexpected: 'state/more'",
    ),
    "shape": (
        altered(lambda saved: saved.update({"state/trace/trace/w": torch.ones(2)})),
        r"'state/trace/trace/w' is \(2,\) float32, expected \(4, 5\) float32",
    ),
    "dtype": (
        altered(lambda saved: saved.update({"state/trace/trace/w": torch.ones(4, 5).double()})),
        r"is \(4, 5\) float64, expected \(4, 5\) float32",
    ),
    "no tensor": (
        altered(lambda saved: saved.update({"state/trace/trace/w": 3})),  # type: ignore[dict-item]
        r"is a int, expected",
    ),
    "no metadata": (altered(lambda saved: saved.pop("metadata")), "has no key 'metadata'"),
    "damaged metadata": (
        altered(lambda saved: saved.update({"metadata": torch.zeros(3, dtype=torch.uint8)})),
        "damaged",
    ),
    "foreign metadata": (
        altered(
            lambda saved: saved.update(
                {
                    "metadata": sf.to_state_dict(
                        small_shampoo(),
                        small_shampoo().init({"w": torch.ones(4)}),
                        {"w": torch.ones(4)},
                    )["metadata"]
                }
            )
        ),
        "put together from two",
    ),
    "block size": (
        for_others(small_shampoo(momentum=0.5, block_size=4), {"w": torch.randn(4, 5)}),
        r"'precondition' was saved with block_size=3, .* merge_to=None, but has block_size=4",
    ),
    "merging": (
        for_others(small_shampoo(momentum=0.5, merge_dims=False), {"w": torch.randn(4, 5)}),
        r"merge_dims=True, merge_to=None, but has block_size=3, merge_dims=False",
    ),
    "merging up to": (
        for_others(
            sf.chain(
                precondition=sf.blocked(sf.trace(0.5), block_size=3, merge_to=2),
            ),
            {"w": torch.randn(4, 5)},
        ),
        r"merge_to=None, but has block_size=3, merge_dims=True, merge_to=2;",
    ),
    "another stage": (
        for_others(small_shampoo(), {"w": torch.randn(4, 5)}),
        r"unexpected: 'state/trace/trace/w'",
    ),
    "another name": (
        for_others(small_shampoo(momentum=0.5), {"v": torch.randn(4, 5)}),
        r"missing: 'state/precondition/v/b0_0/.*and \d+ more; unexpected: 'state/precondition/w",
    ),
    "another grafting": (
        for_others(small_shampoo(momentum=0.5, grafting="sgd"), {"w": torch.randn(4, 5)}),
        r"unexpected: 'state/precondition/w/b0_0/preconditioner/magnitude/second_moment'",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_named(name: str) -> None:
    """What does not fit is a typed error that says what differs."""
    load, message = MISFITS[name]
    with pytest.raises(CheckpointError, match=message):
        load()


def test_other_keys_are_left_alone() -> None:
    """One dict may hold the parameters and the state."""
    tx, params = sf.trace(0.9), {"w": torch.ones(2)}
    saved = {"model/w": torch.ones(2), **sf.to_state_dict(tx, tx.init(params), params)}
    check_same(sf.from_state_dict(tx, params, saved), tx.init(params))


@pytest.mark.parametrize(
    "params",
    [
        {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}},
        {"w": torch.ones(1), "w/b0": torch.ones(1)},
    ],
)
def test_equal_names_are_refused(params: Any) -> None:
    """Two leaves of one name cannot be saved, and are not silently made one."""
    tx = sf.chain(sf.blocked(sf.trace(0.9)), ("b0", sf.trace(0.9)))
    odd: dict[str, Any] = {"t/x": torch.ones(1)}
    assert sf.to_state_dict(tx, tx.init(odd), odd)
    if "a" in params:
        with pytest.raises(CheckpointError, match=r"have the name 'state/trace/a\.b/b0/trace'"):
            sf.to_state_dict(tx, tx.init(params), params)


def test_a_state_of_numbers_is_refused() -> None:
    """A state that is not made of tensors is named."""
    with pytest.raises(CheckpointError, match=r"holds 3 of type int at 'trace"):
        sf.to_state_dict(sf.trace(0.9), {"trace": 3}, {"w": torch.ones(1)})
