"""EffxConfig: what it accepts comes back equal, what it refuses is named with its remedy."""

from __future__ import annotations

import copy
import json
import pickle
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from effx_dist.config import CautiousConfig, EffxConfig, ExcpConfig, InfoBatchConfig
from effx_dist.errors import ConfigError

SECTIONS: dict[str, type[BaseModel]] = {
    "infobatch": InfoBatchConfig,
    "cautious": CautiousConfig,
    "excp": ExcpConfig,
}
# The block as the README and the DeepSpeed JSON spell it: the keys that users' files rely on.
BLOCK: dict[str, Any] = {
    "infobatch": {
        "enabled": True,
        "num_epochs": 4,
        "prune_ratio": 0.5,
        "delta": 0.875,
        "threshold": "mean",
        "score": "relative",
        "seed": 0,
        "drop_last": True,
        "full_epochs": "rounded",
        "max_weight": None,
        "strict": True,
    },
    "cautious": {"enabled": True, "cautious_weight_decay": False, "implementation": "auto"},
    "excp": {
        "enabled": True,
        "profile": "balanced",
        "base_every": 50,
        "base_every_size": None,
        "seeded_base": False,
        "async_mode": "process",
        "policy": "wait",
        "max_pending": 1,
        "encoder_threads": 1,
        "save_on_sigterm": False,
        "keep_latest_k": 5,
        "keep_every_n": 0,
        "max_error": None,
        "manifest_sha256": False,
    },
}
TOML = """
[effx.infobatch]
num_epochs = 4
score = "relative"
[effx.cautious]
[effx.excp]
async_mode = "process"
"""


def refusal(values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        EffxConfig.from_dict(values)  # type: ignore[arg-type]
    return str(caught.value)


def refusal_of_file(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        EffxConfig.from_file(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def with_value(section: str, key: str, value: object) -> dict[str, Any]:
    block = copy.deepcopy(BLOCK)
    block[section][key] = value
    return block


# ---- what is accepted


def test_the_documented_block_is_accepted_and_every_key_in_it_is_a_field() -> None:
    config = EffxConfig.from_dict({"effx": BLOCK, "train_batch_size": 8})
    assert {name: set(keys) for name, keys in BLOCK.items()} == {
        name: set(model.model_fields) for name, model in SECTIONS.items()
    }
    assert config.infobatch is not None
    assert config.infobatch.score == "relative"
    assert config.excp is not None
    assert config.excp.async_mode == "process"


def test_the_same_block_reads_equal_from_every_format(tmp_path: Path) -> None:
    texts = {
        "ds.json": json.dumps({"effx": BLOCK, "zero_optimization": {"stage": 1}}),
        "whole.json": "\ufeff" + json.dumps(BLOCK),
        "run.toml": TOML + "[train]\nsteps = 3\n",
        "run.yaml": yaml.safe_dump({"effx": BLOCK}),
        "RUN.YML": yaml.safe_dump(BLOCK),
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        assert EffxConfig.from_file(str(path)) == EffxConfig.from_dict(BLOCK), name


def test_an_absent_section_is_off_and_a_present_one_is_on() -> None:
    config = EffxConfig.from_dict({"effx": {"cautious": {}, "excp": None}})
    assert config.infobatch is None
    assert config.excp is None
    assert config.cautious is not None
    assert config.cautious.enabled
    assert EffxConfig.from_dict({}) == EffxConfig()


@pytest.mark.parametrize("name", ["empty.yaml", "empty.toml"])
def test_an_empty_file_switches_everything_off(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("# nothing yet\n", encoding="utf-8")
    assert EffxConfig.from_file(tmp_path / name) == EffxConfig()


def test_an_integer_may_stand_for_a_float() -> None:
    config = EffxConfig.from_dict(with_value("infobatch", "prune_ratio", 0))
    assert config.infobatch is not None
    assert isinstance(config.infobatch.prune_ratio, float)


def open_unit(**kwargs: Any) -> st.SearchStrategy[float]:
    return st.floats(0, 1, exclude_max=True, allow_subnormal=False, **kwargs)


infobatches = st.builds(
    InfoBatchConfig,
    enabled=st.booleans(),
    num_epochs=st.integers(1, 10**6),
    prune_ratio=open_unit(),
    delta=st.floats(0, 1, exclude_min=True),
    threshold=st.one_of(st.just("mean"), open_unit(exclude_min=True)),
    score=st.sampled_from(["loss", "relative"]),
    seed=st.integers(0, 2**63 - 1),
    drop_last=st.booleans(),
    full_epochs=st.sampled_from(["rounded", "official"]),
    max_weight=st.one_of(st.none(), st.floats(1, allow_infinity=False)),
    strict=st.booleans(),
)
excps = st.builds(
    ExcpConfig,
    profile=st.sampled_from(["excp", "balanced", "small", "safe", "lossless"]),
    base_every=st.integers(1),
    async_mode=st.sampled_from(["sync", "thread", "process"]),
    policy=st.sampled_from(["wait", "skip"]),
    base_every_size=st.one_of(st.none(), st.floats(0, exclude_min=True, allow_infinity=False)),
    seeded_base=st.booleans(),
    encoder_threads=st.integers(1, 1024),
    save_on_sigterm=st.booleans(),
    manifest_sha256=st.booleans(),
    keep_latest_k=st.integers(0),
    keep_every_n=st.integers(0),
    max_error=st.one_of(st.none(), st.floats(0, exclude_min=True, allow_infinity=False)),
)
configs = st.builds(
    EffxConfig,
    infobatch=st.one_of(st.none(), infobatches),
    cautious=st.one_of(st.none(), st.builds(CautiousConfig, enabled=st.booleans())),
    excp=st.one_of(st.none(), excps),
)


@given(configs)
def test_to_dict_and_from_dict_are_inverse_also_through_json_and_pickle(config: EffxConfig) -> None:
    values = config.to_dict()
    assert EffxConfig.from_dict(values) == config
    assert EffxConfig.from_dict({"effx": json.loads(json.dumps(values))}) == config
    assert pickle.loads(pickle.dumps(config)) == config


# ---- what is refused


@pytest.mark.parametrize(
    ("section", "key", "value", "bound"),
    [
        ("infobatch", "num_epochs", 0, ">= 1"),
        ("infobatch", "prune_ratio", 1, ">= 0 and < 1"),
        ("infobatch", "prune_ratio", -0.1, ">= 0 and < 1"),
        ("infobatch", "delta", 0, "> 0 and <= 1"),
        ("infobatch", "delta", 1.001, "> 0 and <= 1"),
        ("infobatch", "threshold", "median", '"mean" or a number > 0 and < 1'),
        ("infobatch", "threshold", 1.0, '"mean" or a number > 0 and < 1'),
        ("infobatch", "threshold", 0, '"mean" or a number > 0 and < 1'),
        ("infobatch", "score", "Loss", '"loss" or "relative"'),
        ("infobatch", "seed", -1, ">= 0"),
        ("infobatch", "seed", 2**63, f"< {2**63}"),
        ("cautious", "implementation", "cuda", '"auto" or "triton" or "compiled" or "eager"'),
        ("excp", "profile", "tiny", '"lossless"'),
        ("excp", "base_every", 0, ">= 1"),
        ("excp", "async_mode", "async", '"sync" or "thread" or "process"'),
        ("excp", "policy", None, '"wait" or "skip"'),
        ("excp", "keep_latest_k", -1, ">= 0"),
        ("excp", "keep_every_n", -1, ">= 0"),
        ("excp", "max_error", 0, "> 0 or null"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_bound(
    section: str, key: str, value: object, bound: str
) -> None:
    message = refusal(with_value(section, key, value))
    assert message.startswith(f"effx.{section}.{key} = {json.dumps(value)}: must be ")
    assert bound in message
    assert "\n" not in message


def fields_of_type(*kinds: str) -> list[tuple[str, str]]:
    """Every (section, key) whose schema, or a branch of it, is one of the JSON types `kinds`."""
    return [
        (section, name)
        for section, model in SECTIONS.items()
        for name, schema in model.model_json_schema()["properties"].items()
        if any(branch.get("type") in kinds for branch in schema.get("anyOf", [schema]))
    ]


NUMBERS = fields_of_type("integer", "number")
BOOLEANS = fields_of_type("boolean")


@pytest.mark.parametrize(("section", "key"), NUMBERS)
@pytest.mark.parametrize("value", [True, "1", float("nan"), float("inf"), [1], 10**400])
def test_nothing_but_a_finite_number_passes_for_a_number(
    section: str, key: str, value: object
) -> None:
    if value == 10**400 and key in ("num_epochs", "base_every", "keep_latest_k", "keep_every_n"):
        EffxConfig.from_dict(with_value(section, key, value))
        return
    message = refusal(with_value(section, key, value))
    assert f"effx.{section}.{key} = " in message
    assert ("without quotes" in message) == isinstance(value, str)


@pytest.mark.parametrize(("section", "key"), BOOLEANS)
@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_nothing_but_a_boolean_passes_for_a_boolean(section: str, key: str, value: object) -> None:
    assert "must be true or false" in refusal(with_value(section, key, value))


def test_both_kinds_of_field_were_found() -> None:
    """Keep the two lists above from running empty when the schema changes its form."""
    numbers = {key for _, key in NUMBERS}
    assert {"num_epochs", "prune_ratio", "threshold", "base_every", "max_error"} <= numbers
    booleans = {"enabled", "drop_last", "strict", "cautious_weight_decay"}
    booleans |= {"seeded_base", "save_on_sigterm", "manifest_sha256"}
    assert {key for _, key in BOOLEANS} == booleans


def test_all_problems_are_listed_at_once() -> None:
    message = refusal({"infobatch": {"prune_ratio": 2, "deltaa": 1}, "excp": True, "cautius": {}})
    for key in ("infobatch.num_epochs", "infobatch.prune_ratio", "infobatch.deltaa", "excp = true"):
        assert f"\n  effx.{key}" in message
    assert "\n  effx.cautius" in message
    assert "5 problems" in message


def test_building_a_section_by_hand_refuses_in_the_same_words() -> None:
    with pytest.raises(
        ConfigError, match=r"effx\.excp\.base_every = 0: must be a whole number >= 1"
    ):
        ExcpConfig(base_every=0)
    with pytest.raises(ConfigError, match=r"effx\.infobatch\.num_epochs: is required"):
        InfoBatchConfig()  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"did you mean effx\.excp\?"):
        EffxConfig(exp=None)  # type: ignore[call-arg]


def test_a_config_cannot_be_changed() -> None:
    config = EffxConfig.from_dict(BLOCK)
    assert config.excp is not None
    with pytest.raises(ValueError, match="frozen"):
        config.excp.base_every = 3  # type: ignore[misc]


ALPHABET = string.ascii_lowercase + string.digits + "_"


@st.composite
def misspelt(draw: st.DrawFn, name: str) -> str:
    """`name` with one character inserted, deleted or replaced."""
    place = draw(st.integers(0, len(name) - 1))
    new = draw(st.sampled_from(["", *ALPHABET]))
    tail = name[place if draw(st.booleans()) and new else place + 1 :]
    return name[:place] + new + tail


@given(st.data())
def test_one_wrong_letter_in_any_key_is_refused_and_the_right_key_named(
    data: st.DataObject,
) -> None:
    section = data.draw(st.sampled_from(sorted(SECTIONS)))
    key = data.draw(st.sampled_from(sorted(SECTIONS[section].model_fields)))
    typo = data.draw(misspelt(key).filter(lambda name: name != key))
    block = copy.deepcopy(BLOCK)
    block[section][typo] = block[section].pop(key)
    assert f"effx.{section}.{typo}: unknown key; did you mean effx.{section}.{key}?" in refusal(
        block
    )


@given(st.data())
def test_one_wrong_letter_in_a_section_or_in_the_block_itself(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["effx", *SECTIONS]))
    typo = data.draw(misspelt(name).filter(lambda word: word not in ("effx", *SECTIONS)))
    values = {typo: BLOCK} if name == "effx" else {typo: BLOCK[name]}
    right = name if name == "effx" else f"effx.{name}"
    assert f"effx.{typo}: unknown key; did you mean {right}?" in refusal(values)


def test_another_way_of_writing_a_key_is_recognised() -> None:
    for typo in ("Prune_Ratio", "prune-ratio", "PRUNE RATIO"):
        assert "did you mean effx.infobatch.prune_ratio?" in refusal(
            with_value("infobatch", typo, 0.5)
        )


def test_a_key_like_no_other_gets_the_list_of_keys() -> None:
    message = refusal({"effx": {"excp": {"zzz": 1}}})
    assert all(key in message for key in ExcpConfig.model_fields)


def test_a_file_without_the_block_says_how_it_was_read(tmp_path: Path) -> None:
    message = refusal_of_file(tmp_path / "ds.json", '{"train_batch_size": 8}')
    assert 'no "effx" key' in message


@pytest.mark.parametrize("values", [[], "effx", None, 3])
def test_something_that_is_no_table_is_refused(values: object) -> None:
    assert "must hold keys and values" in refusal(values)
    if values is not None:
        assert "must be a table" in refusal({"effx": values})
    assert "must be" in refusal({"effx": {"infobatch": values or 0}})


# ---- files


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", '{"effx": {\n"excp": {,}}}', "line 2"),
        ("a.json", '{"effx": {"excp": {"base_every": 1, "base_every": 2}}}', '"base_every"'),
        ("a.json", "[]", "must hold keys and values"),
        ("a.json", "", "line 1"),
        ("a.json", '{"effx": {"excp": {"max_error": NaN}}}', "effx.excp.max_error = nan"),
        ("a.json", "[" * 200_000, "not well formed"),
        ("a.json", b"\xff\xfe{}", "UTF-8"),
        ("a.toml", "[effx.excp]\nbase_every = \n", "line 2"),
        ("a.toml", "[effx.excp]\nbase_every = 1\nbase_every = 2\n", "line 3"),
        ("a.yaml", "effx:\n  excp: {base_every: 1\n", "line 3"),
        ("a.yaml", "effx:\n  excp:\n    seed: 1\n    seed: 2\n", "line 4"),
        ("a.yaml", "effx: !!python/object/apply:os.getcwd []\n", "line 1"),
        ("a.yaml", "- excp\n", "must hold keys and values"),
        ("a.yaml", "effx:\n  excp:\n    max_error: 1e-3\n", "1.0e-3"),
        ("a.yaml", "effx:\n  excp:\n    1: 2\n", "effx.excp.1: unknown key"),
        ("a.ini", "[effx]", ".json, .toml, .yaml, .yml"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    assert says in refusal_of_file(tmp_path / name, content)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read"):
        EffxConfig.from_file(tmp_path / "none.json")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.toml: cannot be read"):
        EffxConfig.from_file(tmp_path / "folder.toml")


def test_every_field_is_documented() -> None:
    for model in (EffxConfig, *SECTIONS.values()):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            assert "efault" in field.description, f"{model.__name__}.{name} gives no reason"
