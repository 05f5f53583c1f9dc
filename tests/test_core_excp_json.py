"""Quantiser JSON: exact both ways, and no harm from a hostile one."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effx_dist.core.excp import PROFILES, JointArrays, JointQuantiser, JointSymbols
from effx_dist.core.excp.json_fields import float32_json, table_json
from tests.excp_pieces import must_build, same_bits, whole_tensor

NAMES = sorted(PROFILES)
MANIFESTS = {name: must_build(name, [whole_tensor(1, 3000)]).to_json() for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("states", [(False, False), (True, False), (True, True)])
def test_json_round_trip_decodes_to_the_same_bits(name: str, states: tuple[bool, bool]) -> None:
    whole = whole_tensor(2, 3000, *states)
    quantiser = must_build(name, [whole])
    again = JointQuantiser.from_json(json.loads(json.dumps(quantiser.to_json())))
    symbols = quantiser.encode(whole)
    assert same_bits(symbols.w, again.encode(whole).w)
    assert same_bits(symbols.m, again.encode(whole).m)
    assert same_bits(symbols.v, again.encode(whole).v)
    ours, theirs = quantiser.decode(symbols), again.decode(symbols)
    assert same_bits(ours.r, theirs.r)
    assert same_bits(ours.m, theirs.m)
    assert same_bits(ours.v, theirs.v)
    assert (again.num_m_symbols > 0, again.num_v_symbols > 0) == states
    assert again.error == quantiser.error


@given(st.floats(width=32, min_value=0, allow_infinity=False, allow_nan=False))
def test_short_float32_reads_back(value: float) -> None:
    assert np.float32(json.loads(json.dumps(float32_json(np.float32(value))))) == np.float32(value)


def _table(*values: float) -> str:
    return table_json(np.array(values, dtype=np.float32))


HOSTILE = [
    ("balanced", "weight.kind", "pickle", "kind"),
    ("balanced", "weight.kind", None, "kind"),
    ("balanced", "weight", [], "weight"),
    ("balanced", "weight.step", 0, "step"),
    ("balanced", "weight.step", -1.0, "step"),
    ("balanced", "weight.step", float("nan"), "step"),
    ("balanced", "weight.step", 1e300, "step"),
    ("balanced", "weight.step", 10**5000, "step"),
    ("balanced", "weight.step", "1", "step"),
    ("balanced", "weight.step", True, "step"),
    ("balanced", "weight.max_level", 0, "max_level"),
    ("balanced", "weight.max_level", 127, "max_level"),
    ("balanced", "weight.max_level", 10**5000, "max_level"),
    ("balanced", "weight.max_level", 3.0, "max_level"),
    ("balanced", "weight.levels", "A" * 10**6, "levels"),
    ("balanced", "weight.levels", "AAA", "levels"),
    ("balanced", "weight.levels", "AAAA", "levels"),
    ("balanced", "weight.levels", "\u00e9", "levels"),
    ("balanced", "weight.levels", _table(*range(16)), "levels"),
    ("balanced", "weight.levels", base64.b64encode(b"\x00\x00\xc0\x7f").decode(), "levels"),
    ("excp", "weight.centroids", _table(*range(256)), "centroids"),
    ("excp", "weight.centroids", _table(2, 1), "centroids"),
    ("excp", "weight.threshold", float("inf"), "threshold"),
    ("excp", "weight.limit", None, "limit"),
    ("balanced", "moments", "x", "moments"),
    ("balanced", "moments.m", _table(1, 1), "m"),
    ("balanced", "moments.v", _table(-1, 1), "v"),
    ("balanced", "moments.v", _table(0, 1), "v"),
    ("balanced", "moments.fill", -1e-9, "fill"),
    ("balanced", "moments.fill", float("nan"), "fill"),
    ("balanced", "moments.threshold", [], "threshold"),
    ("balanced", "profile", "x" * 33, "profile"),
    ("balanced", "squared_error", -1, "squared_error"),
    ("balanced", "squared_norm", None, "squared_norm"),
]


@pytest.mark.parametrize(
    ("name", "path", "value", "field"),
    HOSTILE,
    ids=[f"{i}-{row[1]}" for i, row in enumerate(HOSTILE)],
)
def test_a_hostile_field_is_refused_by_name(name: str, path: str, value: Any, field: str) -> None:
    fields = copy.deepcopy(MANIFESTS[name])
    *parents, last = path.split(".")
    target = fields
    for parent in parents:
        target = target[parent]
    target[last] = value
    with pytest.raises(ValueError, match=f"^{field}: "):
        JointQuantiser.from_json(fields)


@pytest.mark.parametrize("fields", [None, [], "x", {}, {"profile": "balanced"}])
def test_something_else_is_refused(fields: Any) -> None:
    with pytest.raises(ValueError, match=r": "):
        JointQuantiser.from_json(fields)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@pytest.mark.parametrize("name", ["balanced", "excp"])
@given(data=st.data(), value=JSON)
@settings(max_examples=60, deadline=None)
def test_any_value_in_any_field_is_read_or_refused(
    name: str, data: st.DataObject, value: Any
) -> None:
    fields = copy.deepcopy(MANIFESTS[name])
    target = data.draw(st.sampled_from([fields, fields["weight"], fields["moments"]]))
    target[data.draw(st.sampled_from(sorted(target)))] = value
    try:
        quantiser = JointQuantiser.from_json(fields)
    except ValueError:
        return
    whole = whole_tensor(1, 64)
    symbols = JointSymbols(np.ones(64, dtype=np.uint8), whole.r[:0])
    if quantiser.moments is None:
        assert np.isfinite(quantiser.decode(symbols).r).all()


def _symbols(w: list[int], escapes: int = 0, m: object = (), v: object = ()) -> JointSymbols:
    def flat(values: Any) -> np.ndarray | None:
        return None if values is None else np.array(values or [0] * len(w), dtype=np.uint8)

    exact = np.zeros(escapes, dtype=np.float32)
    return JointSymbols(np.array(w, dtype=np.uint8), exact, flat(m), flat(v))


@pytest.mark.parametrize(
    ("name", "symbols", "message"),
    [
        ("balanced", _symbols([32]), "w: symbol 32"),
        ("balanced", _symbols([31]), "escapes: 0 values for 1"),
        ("balanced", _symbols([0], escapes=1), "escapes: 1 values for 0"),
        ("excp", _symbols([16]), "w: symbol 16"),
        ("excp", _symbols([0], escapes=1), "escapes: 1 values"),
        ("balanced", _symbols([1], m=[255], v=[1]), "m: symbol 255"),
        ("balanced", _symbols([1], m=[1], v=[255]), "v: symbol 255"),
        ("balanced", _symbols([1], m=[1], v=[0]), "v: symbols must be 0 exactly"),
        ("balanced", _symbols([1], m=[0], v=[1]), "v: symbols must be 0 exactly"),
        ("balanced", _symbols([1], m=None, v=None), "m: no symbols"),
        ("balanced", _symbols([1], v=None), "v: no symbols"),
    ],
)
def test_symbols_that_do_not_fit_are_refused(
    name: str, symbols: JointSymbols, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        JointQuantiser.from_json(MANIFESTS[name]).decode(symbols)


def test_symbols_for_a_state_that_is_not_there_are_refused() -> None:
    whole = whole_tensor(1, 100)
    alone = must_build("balanced", [JointArrays(whole.r)])
    with pytest.raises(ValueError, match=r"^m, v: symbols given"):
        alone.decode(_symbols([0]))
    single = must_build("balanced", [JointArrays(whole.r, whole.m)])
    with pytest.raises(ValueError, match=r"^v: symbols given"):
        single.decode(_symbols([0]))
