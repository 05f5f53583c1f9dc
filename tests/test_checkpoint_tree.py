"""Nested values come back from JSON as they went in; what JSON cannot say is refused by its path."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.checkpoint.state.tree import TAGS, Leaf, leaf_paths, tree_from_json, tree_to_json
from effx_dist.shard import LocalRows

TRICKY_NAMES = st.sampled_from(
    [*sorted(TAGS), "", "a.b", ".", "a", "b", "0", "1", "$", "\ud800", "é"]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | TRICKY_NAMES
)
KEYS = (
    TRICKY_NAMES
    | st.text(max_size=3)
    | st.integers(-3, 3)
    | st.booleans()
    | st.none()
    | st.floats(allow_nan=False, width=16)
    | st.tuples(st.integers(0, 3), TRICKY_NAMES)
)
TENSORS = st.integers(0, 9).map(lambda i: torch.full((2,), i))


def trees(leaves: st.SearchStrategy[Any], keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(keys, inner, max_size=3)
        ),
        max_leaves=12,
    )


def round_trip(value: Any) -> Any:
    tensors: dict[str, Leaf] = {}
    text = json.dumps(tree_to_json(value, "extra", tensors), allow_nan=False)
    document = json.loads(text)
    assert set(leaf_paths(document)) == set(tensors)
    return tree_from_json(document, tensors.__getitem__)


def same(a: Any, b: Any) -> bool:
    """Equal in value and in type, also inside; True is not 1 and a list is no tuple."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True) if len(a) == len(b) else [((0, 0), (1, 1))]
        return all(same(k, j) and same(v, w) for (k, v), (j, w) in pairs)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(v, w) for v, w in zip(a, b, strict=True))
    if isinstance(a, float):
        return a.hex() == b.hex()
    return bool(a == b)


@given(trees(SCALARS, KEYS))
def test_values_come_back_with_their_types(value: Any) -> None:
    assert same(round_trip(value), value)


@given(trees(TENSORS | st.integers(0, 2), st.sampled_from(["a", "b", *sorted(TAGS), 7, (1, 2)])))
def test_tensors_come_back_in_their_places(value: Any) -> None:
    assert same(round_trip(value), value)


@given(trees(TENSORS, st.sampled_from(["a", "b", "a.b", "", "0", 0])))
def test_tensors_whose_dotted_paths_coincide_are_kept_apart_or_refused(value: Any) -> None:
    """{"a.b": x} and {"a": {"b": y}} have one dotted path; losing x without a word is no option."""
    try:
        found = round_trip(value)
    except (TypeError, ValueError):
        return
    assert same(found, value)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -0.0])
def test_odd_floats_come_back(number: float) -> None:
    found = round_trip({"x": [number], number: 1})
    assert same(list(found.values()), [[number], 1]) or math.isnan(number)
    assert repr(found["x"][0]) == repr(number)
    assert repr(list(found)[1]) == repr(number)


@pytest.mark.parametrize("number", [np.float64(1.5), np.float64("nan"), np.float64("inf")])
def test_numpy_floats_are_floats(number: np.float64) -> None:
    assert repr(round_trip([number])[0]) == repr(float(number))


def test_local_rows_are_leaves() -> None:
    rows = LocalRows(torch.arange(6).reshape(2, 3), 1, 5)
    tensors: dict[str, Leaf] = {}
    document = tree_to_json({"scores": rows, "epoch": 3}, "stateful.sampler", tensors)
    assert tensors == {"stateful.sampler.scores": rows}
    assert leaf_paths(document) == {"stateful.sampler.scores": "$rows"}
    assert tree_from_json(document, tensors.__getitem__) == {"scores": rows, "epoch": 3}


def test_tensors_are_named_by_their_path() -> None:
    tensors: dict[str, Leaf] = {}
    value = {"ema": [torch.zeros(1), (torch.ones(1),)], 3: torch.ones(2)}
    tree_to_json(value, "extra", tensors)
    assert sorted(tensors) == ["extra.3", "extra.ema.0", "extra.ema.1.0"]


def test_ordered_dictionaries_keep_their_order() -> None:
    value = OrderedDict([("z", 1), ("a", 2)])
    assert list(round_trip(value).items()) == [("z", 1), ("a", 2)]


def test_names_that_look_like_tags_are_data() -> None:
    value = {"$tensor": "/etc/passwd", "$tuple": [1], "$items": [[1, 2]]}
    assert round_trip(value) == value
    assert round_trip({"$float": "x"}) == {"$float": "x"}
    assert leaf_paths(tree_to_json(value, "extra", {})) == {}


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        ({"a": [1, {2, 3}]}, "extra.a.1", "set"),
        ({"fn": print}, "extra.fn", "builtin_function_or_method"),
        ({"raw": bytearray(b"bytes")}, "extra.raw", "bytearray"),
        ({"array": np.zeros(2)}, "extra.array", "ndarray"),
        ((1, (2, 1j)), "extra.1.1", "complex"),
        ({"dtype": torch.float32}, "extra.dtype", "dtype"),
        (object(), "extra", "object"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_path_and_type(
    value: Any, path: str, kind: str
) -> None:
    with pytest.raises(TypeError) as caught:
        tree_to_json(value, "extra", {})
    assert str(caught.value).startswith(f"{path}: a {kind} ")


@pytest.mark.parametrize("key", [frozenset({1}), torch.ones(1), (1, torch.ones(1))])
def test_a_key_that_json_cannot_hold_is_refused_by_the_path_of_its_dictionary(key: Any) -> None:
    with pytest.raises(TypeError, match=r"extra\.groups"):
        tree_to_json({"groups": {key: 1}}, "extra", {})


@pytest.mark.parametrize(
    ("scalar", "plain"),
    [
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.float32(0.5), 0.5),
        (np.float64("inf"), math.inf),
    ],
)
def test_numpy_scalars_come_back_as_pythons(scalar: np.generic, plain: object) -> None:
    text = json.dumps(tree_to_json({"a": scalar}, "extra", {}), allow_nan=False)
    found = tree_from_json(json.loads(text), {}.__getitem__)["a"]
    assert (found, type(found)) == (plain, type(plain))
