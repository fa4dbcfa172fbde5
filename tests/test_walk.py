"""The walks that are traced give what the pytree library gives in eager code."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shampoo_func import walk


class Pair(NamedTuple):
    """A user's own container."""

    left: Any
    right: Any


LEAVES = st.one_of(st.none(), st.integers(0, 9).map(torch.tensor))
KEYS = st.one_of(st.text("abw.10", max_size=3), st.integers(-3, 12))


def _containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dicts = st.dictionaries(KEYS, children, max_size=4)
    return st.one_of(
        dicts,
        dicts.map(OrderedDict),
        dicts.map(lambda entries: defaultdict(list, entries)),
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.builds(Pair, children, children),
    )


TREES = st.recursive(LEAVES, _containers, max_leaves=12)


@given(TREES)
def test_same_order_paths_and_containers(tree: Any) -> None:
    """Leaves, their order, their paths, and the rebuilt tree agree with optree's."""
    paths, leaves, structure = optree.tree_flatten_with_path(tree, none_is_leaf=True)
    assert [id(leaf) for leaf in walk.collect(tree, [])] == [id(leaf) for leaf in leaves]
    found: list[tuple[Any, ...]] = []
    walk.collect_paths(tree, (), found)
    assert found == [tuple(path) for path in paths]
    numbers = list(range(len(leaves)))
    mine, theirs = walk.rebuild(tree, iter(numbers)), optree.tree_unflatten(structure, numbers)
    assert mine == theirs
    assert repr(mine) == repr(theirs)  # the order of keys and the kinds of containers too
    subtrees = [{"n": number} for number in numbers]
    grown = optree.tree_unflatten(structure, subtrees)
    assert walk.collect_up_to(tree, grown, []) == structure.flatten_up_to(grown)


@pytest.mark.parametrize(
    ("template", "other"),
    [
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1}, [1]),
        ([1, 2], [1]),
        ([1], (1,)),
        (Pair(1, 2), (1, 2)),
    ],
)
def test_same_mismatches(template: Any, other: Any) -> None:
    """What optree refuses, the walk refuses."""
    with pytest.raises((ValueError, KeyError), match=r"of different|'a'"):
        walk.collect_up_to(template, other, [])
    with pytest.raises(ValueError):  # noqa: PT011  (optree's own words)
        optree.tree_structure(template, none_is_leaf=True).flatten_up_to(other)
