"""Who stands between the sampler and the loop: frameworks that shard, skip or snapshot what a sampler gives.

They wrap a sampler after it was made, tell it nothing, and take it for one that gives the whole data set's order. Whom
it is asked by is only to be seen in the frames of the call, where their wrappers stand by name. Nothing of theirs is
imported or changed. No communication is performed.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from effx_dist.errors import ConfigError

_MAX_FRAMES = 24
_TRAINERS = ("transformers.trainer", "lightning.pytorch", "pytorch_lightning")
_ACCELERATE, _TORCHDATA = "accelerate.data_loader", "torchdata.stateful_dataloader"


@dataclass(frozen=True)
class Surroundings:
    """What the callers do with the batches of a sampler.

    Attributes:
        num_shards: a wrapper gives every so many-th batch to this process (accelerate's BatchSamplerShard); 1: there is
            none.
        batch_size: samples of a process's batch there; 0 where the wrapper does not know.
        is_dealt_out: one process reads for all, and deals its batches out (accelerate's DataLoaderDispatcher).
        takes_one_length: a trainer asks that takes the length of the first epoch it sees for that of all.
        num_skipped: batches of this process that will be thrown away, since they were trained before a resume.
    """

    num_shards: int = 1
    batch_size: int = 0
    num_skipped: int = 0
    is_dealt_out: bool = False
    takes_one_length: bool = False


def find() -> Surroundings:
    """Those of whoever asks the sampler for its samples or its length."""
    num_shards, batch_size, num_skipped, is_dealt_out, takes_one_length = 1, 0, 0, False, False
    for module, owner in _callers():
        kind = type(owner).__name__
        takes_one_length |= module.startswith(_TRAINERS)
        if module == _ACCELERATE and kind == "BatchSamplerShard":
            num_shards = owner.num_processes
            batch_size = owner.batch_size or 0
            if owner.split_batches:
                batch_size //= num_shards
        elif module == _ACCELERATE and kind == "SkipBatchSampler":
            num_skipped += owner.skip_batches
        elif module == _ACCELERATE and kind == "DataLoaderDispatcher":
            is_dealt_out = owner.state.num_processes > 1
        elif module.startswith(_TORCHDATA) and isinstance(
            getattr(owner, "_sampler_iter", None), itertools.islice
        ):
            # Where nothing below it has a state of its own, it draws and throws away what it had given.
            num_skipped += owner._sampler_iter_yielded
    return Surroundings(num_shards, batch_size, num_skipped, is_dealt_out, takes_one_length)


def check(around: Surroundings, num_ranks: int) -> None:
    """Refuse those for whom nothing that could be handed out would be right.

    Raises:
        ConfigError: One process reads for all, or the loader is sharded over other ranks than the sampler's.
    """
    if around.is_dealt_out and num_ranks > 1:
        raise ConfigError(
            f"dispatch_batches=True: process 0 would read its samples for all {num_ranks}; the sampler gives each its "
            "own, so leave dispatch_batches at False"
        )
    if around.num_shards not in (1, num_ranks):
        raise ConfigError(
            f"the loader is sharded over {around.num_shards} processes, and the sampler has {num_ranks} ranks that see "
            "different samples: pass it the data-parallel ranks, group=accelerator.torch_device_mesh"
        )


def is_asked_by_loader() -> bool:
    """Whether a loader asks for a snapshot, or gives one back (torchdata's StatefulDataLoader)."""
    module, _ = next(_callers(), ("", None))
    return module.startswith(_TORCHDATA)


def parallel_sizes() -> dict[str, int]:
    """The dimensions of accelerate's device mesh, where one was set up in this process."""
    state = sys.modules.get("accelerate.state")
    shared: dict[str, Any] = {} if state is None else dict(state.AcceleratorState._shared_state)
    mesh: Any = shared.get("device_mesh")
    names = getattr(mesh, "mesh_dim_names", None) or ()
    return {name: mesh[name].size() for name in names}


def _callers() -> Iterator[tuple[str, Any]]:
    """The module of each calling function outside this package, the nearest first, and what it is a method of."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        if frame is None:
            return
        module = frame.f_globals.get("__name__", "")
        if not module.startswith("effx_dist."):
            yield module, frame.f_locals.get("self")
        frame = frame.f_back
