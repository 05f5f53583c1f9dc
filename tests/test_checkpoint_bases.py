"""When a base comes, what of it stays, and a manifest's SHA-256."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from effx_dist.checkpoint import Checkpointer, inspect_folder, verify_folder
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.storage.steps import (
    MANIFEST,
    MANIFEST_SHA256,
    MOMENTS_REMOVED,
    is_moments_file,
    step_name,
)
from effx_dist.config import ExcpConfig
from effx_dist.errors import CheckpointNotFoundError
from effx_dist.shard import SoloGroup
from tests import small_chain as chain
from tests.chain_runs import Training, go_on, rows, save_all


def test_a_base_comes_when_the_links_are_as_large_as_asked(tmp_path: Path) -> None:
    config = ExcpConfig(profile="lossless", base_every=100, base_every_size=1.5)
    training = Training()
    manifests = save_all(tmp_path, [training.advance() for _ in range(9)], config)
    base_bytes = links_bytes = 0
    for index, manifest in enumerate(manifests):
        is_due = index == 0 or links_bytes >= 1.5 * base_bytes
        assert (manifest.kind == "base") == is_due
        stored = manifest.figures.stored_bytes
        base_bytes, links_bytes = (stored, 0) if is_due else (base_bytes, links_bytes + stored)
    assert sum(m.kind == "base" for m in manifests) > 1


def test_the_size_is_counted_over_a_restart(tmp_path: Path) -> None:
    config = ExcpConfig(profile="lossless", base_every=100, base_every_size=1.5)
    training = Training()
    states = [training.advance() for _ in range(6)]
    whole = [m.kind for m in save_all(tmp_path / "whole", states, config)]
    save_all(tmp_path / "cut", states[:2], config)
    go_on(tmp_path / "cut", dict(enumerate(states[2:], 2)), config, 2, rows)
    cut = [read_manifest(tmp_path / "cut" / step_name(step))[0].kind for step in range(6)]
    assert cut == whole


def save_three(folder: Path, config: ExcpConfig) -> None:
    model, optimizer = chain.make()
    with Checkpointer(folder, config, group=SoloGroup()) as checkpointer:
        for step in (1, 2, 3):
            chain.train(model, optimizer, step)
            checkpointer.save(step, model, optimizer)


def test_moments_go_from_what_is_kept_for_its_weights_alone(tmp_path: Path) -> None:
    config = chain.CONFIG.model_copy(update={"keep_latest_k": 1})
    save_three(tmp_path, config)
    for step in (1, 2):
        files = [path.name for path in (tmp_path / step_name(step)).iterdir()]
        assert MOMENTS_REMOVED in files
        assert not any(is_moments_file(name) for name in files)
    assert not verify_folder(tmp_path).findings
    chain.load(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=r"step-2.*moments were removed"):
        chain.load(tmp_path, 2)
    model, _ = chain.make()
    with Checkpointer(tmp_path, config, group=SoloGroup()) as checkpointer:
        assert checkpointer.load(model, step=2)["step"] == 2  # the weights alone


def test_what_is_wanted_for_itself_keeps_its_moments(tmp_path: Path) -> None:
    save_three(tmp_path, chain.CONFIG.model_copy(update={"keep_latest_k": 1, "keep_every_n": 2}))
    chain.load(tmp_path, 2)


@pytest.mark.parametrize("is_asked", [True, False])
def test_the_sha256_of_a_manifest_stands_beside_it(is_asked: bool, tmp_path: Path) -> None:
    save_three(tmp_path, chain.CONFIG.model_copy(update={"manifest_sha256": is_asked}))
    for step in (1, 2, 3):
        folder = tmp_path / step_name(step)
        assert (folder / MANIFEST_SHA256).exists() == is_asked
        if is_asked:
            digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
            assert (folder / MANIFEST_SHA256).read_text() == f"{digest}  {MANIFEST}\n"
    assert not verify_folder(tmp_path).findings
    assert len(inspect_folder(tmp_path)) == 3


def test_a_manifest_that_does_not_fit_its_sha256_is_found(tmp_path: Path) -> None:
    """Somebody who can make a manifest that checks out cannot make it fit a digest that was signed."""
    save_three(tmp_path, chain.CONFIG.model_copy(update={"manifest_sha256": True}))
    chain.edit(tmp_path, 3, chain.set_at("saved_at", to="2020-01-01T00:00:00+00:00"))
    [finding] = verify_folder(tmp_path).findings
    assert str(tmp_path / step_name(3) / MANIFEST) in finding
    assert "SHA-256" in finding
