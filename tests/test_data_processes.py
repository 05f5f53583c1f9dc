"""The sampler over a real process group: the same epochs as ranks in threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from effx_dist.shard import as_group
from tests.data_runs import LAYOUTS, make, merge_runs, plain_losses, train
from tests.ranks import spawn
from tests.thread_ranks import run_ranks

SETTINGS = {"num_samples": 700, "num_epochs": 4, "score": "relative", "threshold": 0.7}


def on_two_ranks() -> list:
    """Epoch 0 and 1, a save, and the rest by a sampler that loaded it; then over a part of the ranks."""
    sampler = make(as_group(None), LAYOUTS[1], **SETTINGS)
    plans = train(sampler, plain_losses, 0, 2)
    resumed = make(as_group(None), LAYOUTS[1], **SETTINGS)
    resumed.load_state_dict(sampler.state_dict())
    plans += train(resumed, plain_losses, 2)
    alone = dist.new_subgroups(group_size=1)[0]
    assert (
        len(make(alone, (1, 8, 1), num_samples=96)) == 96
    )  # every rank on its own: all the samples
    return plans


@pytest.mark.ranks
def test_processes_equal_threads(tmp_path: Path) -> None:
    threads = run_ranks(2, lambda g: train(make(g, LAYOUTS[1], **SETTINGS), plain_losses))
    assert merge_runs(spawn(2, on_two_ranks, tmp_path)) == merge_runs(threads)
