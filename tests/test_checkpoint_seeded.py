"""A run whose first base is its seeded initialisation, which nobody stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.checkpoint import Checkpointer, inspect_folder, verify_folder
from effx_dist.checkpoint.loading.seeded import PREFIX, whole_fingerprints
from effx_dist.checkpoint.state.fragment import Fragment
from effx_dist.checkpoint.tools.compact import compact
from effx_dist.config import ExcpConfig
from effx_dist.core.fingerprint import add_fingerprints, fingerprint
from effx_dist.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    LayoutMismatchError,
)
from effx_dist.shard import Group, SoloGroup
from tests.chain_runs import Cut, Training, cut_state, flat, hybrid, replicas, rows
from tests.thread_ranks import run_ranks

CONFIG = ExcpConfig(profile="balanced", async_mode="sync", seeded_base=True, keep_latest_k=0)


def make(seed: int = 1) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20, bias=False))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    random = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random)
    optimizer.step()


def run(folder: Path, config: ExcpConfig = CONFIG, num_steps: int = 3) -> torch.nn.Module:
    """Begin from the seed, save every step."""
    model, optimizer = make()
    with Checkpointer(folder, config, group=SoloGroup()) as checkpointer:
        checkpointer.begin(model)
        for step in range(1, num_steps + 1):
            train(model, optimizer, step)
            checkpointer.save(step, model, optimizer)
    return model


def load(folder: Path, seed: int = 1, step: int | None = None) -> torch.nn.Module:
    model, optimizer = make(seed)
    with Checkpointer(folder, CONFIG, group=SoloGroup()) as checkpointer:
        checkpointer.load(model, optimizer, step=step)
    return model


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def test_a_model_made_from_the_seed_reads_it(tmp_path: Path) -> None:
    trained = run(tmp_path)
    assert [step.kind for step in inspect_folder(tmp_path)] == ["link"] * 3
    assert not verify_folder(tmp_path).findings
    loaded = weights(load(tmp_path))
    assert (loaded - weights(trained)).norm() < 0.5 * (loaded - weights(make()[0])).norm()


def test_lossless_links_on_it_are_exact(tmp_path: Path) -> None:
    trained = run(tmp_path, CONFIG.model_copy(update={"profile": "lossless"}))
    assert torch.equal(weights(load(tmp_path)), weights(trained))


def test_another_seed_is_refused_before_anything_changes(tmp_path: Path) -> None:
    run(tmp_path)
    model, optimizer = make(seed=2)
    before = weights(model).clone()
    with (
        Checkpointer(tmp_path, CONFIG, group=SoloGroup()) as checkpointer,
        pytest.raises(LayoutMismatchError, match=r"seeded initialisation.*2 of 2 tensors differ"),
    ):
        checkpointer.load(model, optimizer)
    assert torch.equal(weights(model), before)


def test_a_resumed_run_goes_on_and_its_next_base_is_stored(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"base_every": 5, "profile": "lossless"})
    run(tmp_path, config)
    model, optimizer = make()
    with Checkpointer(tmp_path, config, group=SoloGroup()) as checkpointer:
        checkpointer.load(model, optimizer)
        for step in range(4, 7):
            train(model, optimizer, step)
            checkpointer.save(step, model, optimizer)
    kinds = [step.kind for step in inspect_folder(tmp_path)]
    assert kinds == ["link"] * 4 + ["base", "link"]
    assert torch.equal(
        weights(load(tmp_path, seed=9)), weights(model)
    )  # no seed is needed above it


def test_what_reads_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(CorruptCheckpointError, match="seeded initialisation, which is not stored"):
        compact(tmp_path)


def test_it_is_only_for_runs_that_begin(tmp_path: Path) -> None:
    run(tmp_path)
    with (
        Checkpointer(tmp_path, CONFIG, group=SoloGroup()) as checkpointer,
        pytest.raises(ConfigError, match="holds checkpoints"),
    ):
        checkpointer.begin(make()[0])


def test_without_the_key_the_first_save_is_a_base(tmp_path: Path) -> None:
    run(tmp_path, CONFIG.model_copy(update={"seeded_base": False}))
    assert inspect_folder(tmp_path)[0].kind == "base"
    assert not list(tmp_path.glob(f"{PREFIX}*"))


def test_an_initialisation_alone_is_no_checkpoint(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, CONFIG, group=SoloGroup()) as checkpointer:
        checkpointer.begin(make()[0])
        assert checkpointer.newest() is None
        with pytest.raises(CheckpointNotFoundError):
            checkpointer.load(make()[0])


@pytest.mark.parametrize("cut", [rows, flat, replicas, hybrid])
def test_hashes_do_not_depend_on_the_cut(cut: Cut) -> None:
    state = Training().advance()

    def body(group: Group) -> dict[str, str]:
        return whole_fingerprints(cut_state(state, cut, group), group)

    whole = {name: Fragment.of(name, tensor) for name, tensor in state.items()}
    expected = whole_fingerprints(whole, SoloGroup())
    assert len(set(expected.values())) == len(state)
    assert run_ranks(4, body) == [expected] * 4


def test_copies_that_differ_are_noticed() -> None:
    def body(group: Group) -> None:
        mine = torch.full((2, 3), float(group.rank))
        with pytest.raises(LayoutMismatchError, match="differs from another rank's"):
            whole_fingerprints({"w": Fragment.of("w", mine)}, group)

    run_ranks(2, body)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=30), st.data())
def test_a_hash_sees_every_value_and_its_place(words: list[int], data: st.DataObject) -> None:
    values = np.array(words, dtype=np.uint32)
    places = np.arange(values.size)
    split = data.draw(st.integers(0, values.size))
    whole = fingerprint(values, places)
    parts = [fingerprint(values[part], places[part]) for part in (slice(split), slice(split, None))]
    assert add_fingerprints(reversed(parts)) == whole
    first, second = data.draw(st.permutations(range(values.size)))[:2]
    swapped = values.copy()
    swapped[[first, second]] = values[[second, first]]
    assert (fingerprint(swapped, places) == whole) == (values[first] == values[second])
    changed = values.copy()
    changed[first] ^= np.uint32(1) << np.uint32(data.draw(st.integers(0, 31)))
    assert fingerprint(changed, places) != whole
