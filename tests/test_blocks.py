"""Parameters to stacks of blocks and back: exact, planned from shapes alone, found again."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import shampoo_func as sf
from shampoo_func.blocks import BlockPlan, LeafSpec, gather, merge_small_dims, plan_blocks, scatter
from shampoo_func.blocks import plan as plan_module
from shampoo_func.blocks import present_rows as rows_of_present
from shampoo_func.errors import HyperparameterError

# Naive restatements, for comparison ------------------------------------------------------------


def naive_merge(shape: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Drop ones; from the last dimension on, the left neighbour joins while the product fits."""
    if math.prod(shape) == 0:
        return (0,)
    *left, last = [size for size in shape if size > 1] or [1]
    while left and left[-1] * last <= limit:
        last *= left.pop()
    return (*(naive_merge(tuple(left), limit) if left else ()), last)


def naive_blocks(tensor: Tensor, block_size: int | None, merge_dims: bool) -> list[Tensor]:
    """Split every dimension in turn, the first one slowest: blocks in row-major order."""
    if tensor.numel() == 0:
        return []
    limit = (block_size or 0) if merge_dims else 0
    merged = naive_merge(tuple(tensor.shape), limit) if merge_dims else tuple(tensor.shape) or (1,)
    blocks = [tensor.reshape(merged)]
    for dim, size in enumerate(merged):
        pieces = [torch.split(block, block_size or size, dim) for block in blocks]
        blocks = list(itertools.chain.from_iterable(pieces))
    return blocks


def naive_stacks(
    leaves: list[Tensor], block_size: int | None, merge_dims: bool
) -> dict[tuple[tuple[int, ...], torch.dtype], Tensor]:
    """Stack the blocks that agree in shape and dtype, in the order of the parameters."""
    groups: dict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = {}
    for leaf in leaves:
        for block in naive_blocks(leaf, block_size, merge_dims):
            groups.setdefault((tuple(block.shape), block.dtype), []).append(block)
    return {kind: torch.stack(blocks) for kind, blocks in groups.items()}


# Random trees ----------------------------------------------------------------------------------


def contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def transposed(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return contiguous(shape[::-1], dtype).permute(tuple(reversed(range(len(shape)))))


def strided(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    larger = contiguous(tuple(2 * size + 1 for size in shape), dtype)
    return larger[tuple(slice(1, 1 + 2 * size, 2) for size in shape)]


def expanded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return contiguous(
        tuple(1 if dim % 2 else size for dim, size in enumerate(shape)), dtype
    ).expand(shape)


def channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    dense = contiguous(shape, dtype)
    return dense if memory_format is None else dense.contiguous(memory_format=memory_format)


LAYOUTS = (contiguous, transposed, strided, expanded, channels_last)
DENSE = (contiguous, transposed, channels_last)
SPECIAL = (math.nan, math.inf, -math.inf, -0.0)


@dataclass(frozen=True)
class Leaf:
    """A parameter to be made: its shape, dtype, layout in memory, and seed of the values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Callable[[tuple[int, ...], torch.dtype], Tensor]
    seed: int

    def tensor(self) -> Tensor:
        """Random values, with a NaN, an infinity or a negative zero now and then."""
        torch.manual_seed(self.seed)
        values = self.layout(self.shape, self.dtype)
        if values.numel() and self.layout is not expanded:
            values[(0,) * values.ndim] = SPECIAL[self.seed % len(SPECIAL)]
        return values


sizes = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 7])
shapes = st.integers(0, 5).flatmap(lambda order: st.tuples(*[sizes] * order))
dtypes = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16])
leaves_of_trees = st.lists(
    st.builds(Leaf, shapes, dtypes, st.sampled_from(LAYOUTS), st.integers(0, 99)),
    min_size=1,
    max_size=5,
)
block_sizes = st.sampled_from([None, 1, 2, 3, 4, 8, 64])


def planned(leaves: list[Tensor], block_size: int | None, merge_dims: bool) -> BlockPlan:
    specs = [LeafSpec.of(leaf) for leaf in leaves]
    return plan_blocks(specs, block_size=block_size, merge_dims=merge_dims)


def bits(tensor: Tensor) -> bytes:
    """The bytes of the elements in row-major order."""
    dense = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return bytes(dense.view(torch.uint8).numpy())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal shape, dtype and bytes: NaN equals NaN, and -0.0 does not equal 0.0."""
    return one.shape == other.shape and one.dtype == other.dtype and bits(one) == bits(other)


def strides(tensor: Tensor) -> list[int]:
    """The strides that mean something: those of dimensions larger than 1."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return [stride for stride, size in pairs if size > 1]


# Gathering and scattering ------------------------------------------------------------------------


@settings(max_examples=200)
@given(leaves_of_trees, block_sizes, st.booleans())
def test_scatter_undoes_gather(drawn: list[Leaf], block_size: int | None, merge: bool) -> None:
    """Gather, then scatter, is the identity bit for bit, and keeps dense strides."""
    leaves = [leaf.tensor() for leaf in drawn]
    plan = planned(leaves, block_size, merge)
    back = scatter(plan, gather(plan, leaves), leaves)
    for leaf, tensor, result in zip(drawn, leaves, back, strict=True):
        assert result is not None and same_bits(result, tensor)
        if leaf.layout in DENSE and tensor.numel():
            assert strides(result) == strides(tensor)


@settings(max_examples=200)
@given(leaves_of_trees, block_sizes, st.booleans())
def test_stacks_hold_the_naive_blocks(
    drawn: list[Leaf], block_size: int | None, merge: bool
) -> None:
    """The stacks are those that splitting every parameter with `torch.split` gives."""
    leaves = [leaf.tensor() for leaf in drawn]
    plan = planned(leaves, block_size, merge)
    stacks = gather(plan, leaves)
    expected = naive_stacks(leaves, block_size, merge)
    found = {(tuple(stack.shape[1:]), stack.dtype): stack for stack in stacks.values()}
    assert found.keys() == expected.keys() and len(stacks) == len(expected)
    assert all(same_bits(found[kind], stack) for kind, stack in expected.items())
    assert dict(plan.stacks) == {name: len(stack) for name, stack in stacks.items()}


@settings(max_examples=100)
@given(leaves_of_trees, block_sizes, st.booleans())
def test_stacks_are_named_by_block_shape(
    drawn: list[Leaf], block_size: int | None, merge: bool
) -> None:
    """A stack is called "256x256"; the dtype follows only where two stacks share a shape."""
    leaves = [leaf.tensor() for leaf in drawn]
    stacks = gather(planned(leaves, block_size, merge), leaves)
    names = {name: "x".join(map(str, stack.shape[1:])) for name, stack in stacks.items()}
    for name, block in names.items():
        alone = list(names.values()).count(block) == 1
        kind = str(stacks[name].dtype).removeprefix("torch.")
        assert name == (block if alone else f"{block}:{kind}:cpu")


@settings(max_examples=100)
@given(leaves_of_trees, block_sizes, st.booleans(), st.data())
def test_missing_leaves_leave_their_rows_out(
    drawn: list[Leaf], block_size: int | None, merge: bool, data: st.DataObject
) -> None:
    """Without some leaves, a stack holds the rows of those present, and None comes back as None."""
    leaves = [leaf.tensor() for leaf in drawn]
    present = [data.draw(st.booleans()) for _ in leaves]
    plan = planned(leaves, block_size, merge)
    given_leaves = [leaf if there else None for leaf, there in zip(leaves, present, strict=True)]
    whole, part = gather(plan, leaves), gather(plan, given_leaves)
    rows = rows_of_present(plan, present)
    assert part.keys() == {name for name, own in rows.items() if own}
    assert all(same_bits(stack, whole[name][rows[name]]) for name, stack in part.items())
    for leaf, result in zip(given_leaves, scatter(plan, part, given_leaves), strict=True):
        assert (leaf is None) == (result is None)
        assert leaf is None or result is None or same_bits(result, leaf)


@settings(max_examples=100)
@given(leaves_of_trees, block_sizes, st.booleans())
def test_blocks_of_a_plan_are_where_it_says(
    drawn: list[Leaf], block_size: int | None, merge: bool
) -> None:
    """`ParameterPlan.blocks` lists row-major starts and shapes, and each block's row."""
    leaves = [leaf.tensor() for leaf in drawn]
    plan = planned(leaves, block_size, merge)
    stacks = gather(plan, leaves)
    for leaf, parameter in zip(leaves, plan.parameters, strict=True):
        expected = naive_blocks(leaf, block_size, merge)
        blocks = parameter.blocks()
        assert [start for start, *_ in blocks] == sorted(start for start, *_ in blocks)
        for (start, shape, stack, row), block in zip(blocks, expected, strict=True):
            ends = zip(start, shape, strict=True)
            here = leaf.reshape(parameter.merged)[tuple(slice(a, a + size) for a, size in ends)]
            assert same_bits(here, block) and same_bits(stacks[stack][row], block)


def test_derivative_of_gather_and_scatter_is_the_identity() -> None:
    """Both are linear maps that torch differentiates."""
    leaf = torch.randn(5, 3, requires_grad=True)
    plan = planned([leaf], 2, True)
    (result,) = scatter(plan, gather(plan, [leaf]), [leaf])
    assert result is not None
    weights = torch.randn(5, 3)
    (derivative,) = torch.autograd.grad((result * weights).sum(), leaf)
    assert torch.equal(derivative, weights)


# Plans -------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(shapes, st.sampled_from([0, 1, 2, 6, 10, 12, 50, 1024]))
def test_merging_is_the_rule_of_its_docstring(shape: tuple[int, ...], limit: int) -> None:
    """Ones are dropped, and neighbours merge from the last on while the product fits."""
    assert merge_small_dims(shape, limit) == naive_merge(shape, limit)


@pytest.mark.parametrize(
    ("shape", "limit", "merged"),
    [
        ((), 10, (1,)),
        ((1, 1, 1), 10, (1,)),
        ((3, 0, 2), 10, (0,)),
        ((2, 3, 4), 24, (24,)),
        ((2, 3, 4), 23, (2, 12)),
        ((2, 3, 4), 11, (6, 4)),
        ((100, 1, 3), 10, (100, 3)),
        ((64, 3, 7, 7), 256, (64, 147)),
    ],
)
def test_merging_examples(shape: tuple[int, ...], limit: int, merged: tuple[int, ...]) -> None:
    """The rule by hand, at its edges."""
    assert merge_small_dims(shape, limit) == merged


@settings(max_examples=200)
@given(shapes, st.sampled_from([0, 2, 6, 12, 1024]), st.integers(1, 4))
def test_merging_stops_at_the_wanted_number_of_dimensions(
    shape: tuple[int, ...], limit: int, merge_to: int
) -> None:
    """No dimension is lost that was wanted, and what is left over is what the limit forbids."""
    merged = merge_small_dims(shape, limit, merge_to)
    sizes = [size for size in shape if size > 1] or [1]
    assert math.prod(merged) == math.prod(shape)
    if 0 not in shape:
        assert len(merged) >= min(merge_to, len(sizes))
    if len(merged) > merge_to:
        assert all(a * b > limit for a, b in itertools.pairwise(merged))


@pytest.mark.parametrize(
    ("shape", "limit", "merge_to", "merged"),
    [
        ((32, 3, 64, 64), 1_000_000, 2, (32, 12_288)),
        ((2, 3, 4), 24, 2, (2, 12)),
        ((2, 3, 4), 11, 2, (6, 4)),
        ((2, 3, 4), 24, 3, (2, 3, 4)),
        ((2, 1, 4), 24, 3, (2, 4)),
        ((5,), 24, 2, (5,)),
    ],
)
def test_merging_examples_with_a_target(
    shape: tuple[int, ...], limit: int, merge_to: int, merged: tuple[int, ...]
) -> None:
    """The last dimensions merge first, and only while too many are left."""
    assert merge_small_dims(shape, limit, merge_to) == merged


@pytest.mark.parametrize(
    ("block_size", "merge_to", "stack"),
    [
        (None, 2, "8x18"),
        (None, 1, "144"),
        (None, None, "8x2x3x3"),
        (18, 2, "8x18"),
        (6, 2, "6x6x3"),
    ],
)
def test_convolutions_become_matrices(
    block_size: int | None, merge_to: int | None, stack: str
) -> None:
    """`merge_to` is how a spectral method sees a convolution: one row per output channel."""
    leaf = torch.randn(8, 2, 3, 3)
    plan = plan_blocks([LeafSpec.of(leaf)], block_size=block_size, merge_to=merge_to)
    assert next(iter(gather(plan, [leaf]))) == stack
    (back,) = scatter(plan, gather(plan, [leaf]), [leaf])
    assert back is not None and torch.equal(back, leaf)


def test_merge_to_needs_merging() -> None:
    """Two arguments that contradict each other are refused."""
    with pytest.raises(HyperparameterError, match=r"merge_to=2.*merge_dims is False"):
        sf.blocked(sf.precondition(sf.kronecker()), merge_dims=False, merge_to=2)


@settings(max_examples=50)
@given(leaves_of_trees, block_sizes, st.booleans())
def test_plans_are_values(drawn: list[Leaf], block_size: int | None, merge: bool) -> None:
    """Equal shapes give equal plans that hash alike, pickle and print."""
    leaves = [leaf.tensor() for leaf in drawn]
    first = planned(leaves, block_size, merge)
    plan_module._plan.cache_clear()
    second = planned([leaf.tensor() for leaf in drawn], block_size, merge)
    assert first is not second and first == second and hash(first) == hash(second)
    assert pickle.loads(pickle.dumps(first)) == first
    assert repr(first) == repr(second)


@settings(max_examples=50)
@given(leaves_of_trees, block_sizes, st.booleans())
def test_plans_need_shapes_only(drawn: list[Leaf], block_size: int | None, merge: bool) -> None:
    """Tensors without data (device meta) make the same stacks."""
    leaves = [leaf.tensor() for leaf in drawn]
    meta = [leaf.to("meta") for leaf in leaves]
    plan, planned_on_meta = planned(leaves, block_size, merge), planned(meta, block_size, merge)
    shapes = {name.replace(":cpu", ":meta"): count for name, count in plan.stacks}
    assert dict(planned_on_meta.stacks) == shapes
    assert [p.merged for p in plan.parameters] == [p.merged for p in planned_on_meta.parameters]
    assert {name: tuple(stack.shape) for name, stack in gather(planned_on_meta, meta).items()} == {
        name.replace(":cpu", ":meta"): tuple(stack.shape)
        for name, stack in gather(plan, leaves).items()
    }


def test_large_parameter_is_planned_at_once() -> None:
    """A plan lists rectangles, not blocks: its length does not grow with the parameter."""
    (parameter,) = planned([torch.empty(2**20 + 1, 2**20 + 1, device="meta")], 16, True).parameters
    assert len(parameter.tiles) == 4
    assert sum(tile.count for tile in parameter.tiles) == (2**16 + 1) ** 2


def test_no_block_size_leaves_parameters_whole() -> None:
    """None cuts nothing; dimensions of size 1 still go if `merge_dims`."""
    leaf = torch.randn(5, 1, 3)
    assert list(gather(planned([leaf], None, True), [leaf])) == ["5x3"]
    assert list(gather(planned([leaf], None, False), [leaf])) == ["5x1x3"]


# One parameter's state ---------------------------------------------------------------------------

PARAMS = {
    "conv": torch.Size([4, 3, 3]),
    "layers.0.bias": torch.Size([5]),
    "layers.0.weight": torch.Size([7, 4]),
    "layers.1.weight": torch.Size([4, 4]),
    "scale": torch.Size([]),
}


def nest(flat: dict[str, Tensor]) -> Any:
    """The same tensors as a nested tree."""
    return {
        "conv": flat["conv"],
        "layers": [
            {"weight": flat["layers.0.weight"], "bias": flat["layers.0.bias"]},
            {"weight": flat["layers.1.weight"]},
        ],
        "scale": flat["scale"],
    }


def shampoo(learning_rate: sf.types.Scalar = 0.1) -> sf.Transformation:
    # a damping that keeps rounding errors of the batched products small
    return sf.shampoo(
        learning_rate, epsilon=1e-2, beta2=0.9, block_size=4, refresh_every=2, grafting="adam"
    )


def matrices(path: str, leaf: Tensor) -> bool:
    return leaf.ndim > 1


def label(path: str, leaf: Tensor) -> str:
    return "matrices" if leaf.ndim > 1 else "rest"


MASK = {
    "conv": True,
    "layers": [{"weight": True, "bias": False}, {"weight": True}],
    "scale": False,
}

WRAPPERS: dict[str, Callable[[], sf.Transformation]] = {
    "recipe": shampoo,
    "chain": lambda: sf.chain(sf.clip(1e3), ("shampoo", shampoo()), sf.trace(0.5)),
    "partition": lambda: sf.partition({"rest": sf.adamw(0.1), "matrices": shampoo()}, label),
    "partition by regex": lambda: sf.partition(
        {"matrices": shampoo(), "rest": sf.sgd(0.1)}, [("weight$|conv", "matrices"), (".*", "rest")]
    ),
    "masked": lambda: sf.masked(shampoo(), where=matrices),
    "masked by tree": lambda: sf.masked(shampoo(), mask=MASK),
    "hyperparams": lambda: sf.with_hyperparams(shampoo, learning_rate=0.1),
    "if finite": lambda: sf.apply_if_finite(shampoo()),
    "accumulate": lambda: sf.accumulate(shampoo(), every=1),
    "all": lambda: sf.apply_if_finite(
        sf.accumulate(
            sf.chain(
                sf.masked(sf.with_hyperparams(shampoo, learning_rate=0.1), where=matrices),
                sf.partition({"matrices": sf.trace(0.1), "rest": shampoo()}, label),
            ),
            every=1,
        )
    ),
}


def trained(tx: sf.Transformation, params: Any, gradients: list[Any]) -> Any:
    """The state after some updates."""
    state = tx.init(params)
    for gradient in gradients:
        _, state = tx.update(gradient, state, params)
    return state


def block_views(view: Any) -> Iterator[Any]:
    """Every `BlockView` in what `parameter_state` returned."""
    if isinstance(view, list):
        yield from view
    elif isinstance(view, dict):
        yield from itertools.chain.from_iterable(map(block_views, view.values()))
    elif hasattr(view, "inner"):
        yield from block_views(view.inner)


def tensors(state: Any) -> list[Tensor]:
    """The tensors of a state of nested tuples, in order."""
    if isinstance(state, Tensor):
        return [state]
    return [leaf for entry in state for leaf in tensors(entry)]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_parameter_state_finds_the_state_of_a_parameter(wrapper: str) -> None:
    """Factors, roots and grafting rows are those of an optimizer of that parameter alone."""
    tx = WRAPPERS[wrapper]()
    params = {path: torch.randn(shape, dtype=torch.float64) for path, shape in PARAMS.items()}
    steps = [{path: torch.randn_like(leaf) for path, leaf in params.items()} for _ in range(5)]
    tree = nest(params)
    state = trained(tx, tree, [nest(step) for step in steps])
    for path, leaf in params.items():
        views = list(block_views(sf.parameter_state(tx, state, tree, path)))
        if leaf.ndim < 2 and wrapper.startswith(("partition", "masked")):
            assert views == []
            continue
        own = trained(shampoo(), leaf, [step[path] for step in steps])
        expected = list(block_views(sf.parameter_state(shampoo(), own, leaf, "")))
        blocks = naive_blocks(leaf, 4, True)
        assert [view.shape for view in views] == [tuple(block.shape) for block in blocks]
        for view, partner in zip(views, expected, strict=True):
            assert (view.start, view.shape) == (partner.start, partner.shape)
            torch.testing.assert_close(
                tensors(view.state), tensors(partner.state), rtol=1e-12, atol=1e-14
            )


def test_parameter_state_holds_the_statistics_of_its_blocks() -> None:
    """A block's factor is the sum of its own Gram matrices; the grafting row, of its squares."""
    graft = sf.graft(direction=sf.kronecker(1.0), magnitude=sf.second_moment(1.0))
    tx = sf.blocked(sf.precondition(graft, start=math.inf), block_size=4)
    tree = nest({path: torch.randn(shape, dtype=torch.float64) for path, shape in PARAMS.items()})
    steps = [nest({p: torch.randn(s, dtype=torch.float64) for p, s in PARAMS.items()})] * 3
    state = trained(tx, tree, steps)
    views = sf.parameter_state(tx, state, tree, "layers.0.weight")
    blocks = naive_blocks(steps[0]["layers"][0]["weight"], 4, True)
    for view, block in zip(views, blocks, strict=True):
        direction, magnitude, started = view.state.preconditioner
        left, right = direction.factors
        torch.testing.assert_close(left, 3 * block @ block.mT, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(right, 3 * block.mT @ block, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(magnitude.second_moment, 3 * block**2, rtol=1e-12, atol=0.0)
        assert (direction.step, magnitude.step, bool(started)) == (3, 3, False)


def test_parameter_state_cuts_trees_down_to_the_parameter() -> None:
    """Momentum, averages and counters outside `blocked` are those of the parameter."""
    tx = sf.chain(sf.accumulate(sf.trace(0.9), every=2), sf.ema(0.9), sf.scale_by_adam())
    tree = nest({path: torch.randn(shape) for path, shape in PARAMS.items()})
    state = trained(tx, tree, [tree])
    view = sf.parameter_state(tx, state, tree, "layers.0.weight")
    weight = tree["layers"][0]["weight"]
    assert torch.equal(view["trace"].mean, weight / 2)
    assert torch.equal(view["trace"].inner.trace, torch.zeros(7, 4))
    assert view["ema"].step == 1 and view["ema"].ema.shape == (7, 4)
    assert view["precondition"].step == 1
    assert view["precondition"].filter.ema.shape == (7, 4)
    assert view["precondition"].preconditioner.second_moment.shape == (7, 4)
