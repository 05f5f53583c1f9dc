"""Ranks that get the same samples: the pipeline stages, tensor- and context-parallel parts of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.device_mesh import DeviceMesh

from effx_dist.data.surroundings import parallel_sizes
from effx_dist.errors import ConfigError, RankFailedError
from effx_dist.shard import Group, SoloGroup, as_group
from effx_dist.shard.group import ReduceOp

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Peers:
    """The ranks that get the same samples as this one. One of them reports the losses of all.

    Each peer plans for itself, together with the ranks that have its place in the other models. For the plans to be
    the same, the scores must be equal to the last bit: what the reporter recorded is sent to its peers before it is
    used.

    Attributes:
        groups: Ranks that hear of each other, in steps: what a rank tells those of the first group, and all of them
            then tell those of the next, reaches every peer. The same number of them on every peer.
        is_reporter: Whether the losses that this rank records are those that count; true of one of the peers.
        has_losses: Whether this rank weighs losses; a rank that does not (an earlier pipeline stage) calls
            `InfoBatchSampler.advance` in place of it. True of the reporter.
    """

    groups: tuple[Group, ...] = ()
    is_reporter: bool = True
    has_losses: bool = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Peers:
        return self  # groups of ranks are not copied

    def agree(
        self, error: Exception | None, consumed: int = 0, has_ended: bool = False
    ) -> Exception | None:
        """This rank's ``error``; else one that tells of a peer's; else one if not all have ``consumed`` the same, or
        some and not all have ended the epoch.

        None on all peers, or an error on all. One small gather a group.
        """
        for group in self.groups:
            try:
                told_all = group.tell_all(error, (consumed, has_ended), keep_own_error=False)
            except RankFailedError as told:  # names the peers that failed
                error = error or told
                continue
            counts = [count for count, _ in told_all]
            if len({ended for _, ended in told_all}) > 1:
                error = ConfigError(
                    "end_epoch: was called on some of the ranks that get the same samples; call it on all"
                )
            if min(counts) < max(counts):
                error = ConfigError(
                    f"{', '.join(map(str, counts))} samples of the epoch were consumed by the ranks that get the same "
                    "ones: weigh every micro-batch where there are losses, and call advance after each step where "
                    "there are none"
                )
        return error

    def share(
        self, ids: npt.NDArray[np.int64], losses: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """What the reporter has recorded, on every peer. Two all-to-alls a group."""
        if not self.groups:
            return ids, losses
        return self.spread(ids), self.spread(losses)

    def spread(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The reporter's values, on every peer. One all-to-all a group."""
        if not self.groups:
            return values
        return self._spread(values if self.is_reporter else values[:0])

    def _spread(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """One peer's values, on all peers; the others give empty arrays."""
        for group in self.groups:
            sent = [torch.from_numpy(values)] * group.size
            values = torch.cat(group.all_to_all(sent)).numpy()
        return values


T = TypeVar("T")


class DetachedGroup(Group):
    """Knows its rank and size, and refuses to communicate."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        self._refuse()

    def all_to_all(self, send: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self._refuse()

    def all_gather_object(self, value: T) -> list[T]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            f"group: this sampler was unpickled and has lost its group of {self.size} ranks; it can finish its epoch, "
            "but not plan or save. Make a new one with group=... and load_state_dict into it"
        )


def detached(group: Group) -> Group:
    """What stands in for ``group`` in a copy: one process alone is its own."""
    return group if isinstance(group, SoloGroup) else DetachedGroup(group.rank, group.size)


_DATA_DIMENSIONS = ("dp", "data", "dp_replicate", "dp_shard", "fsdp", "replicate", "shard")
_SAME_DIMENSIONS = ("tp", "cp", "sp", "pp", "tensor", "context", "sequence", "pipeline", "model")


def data_ranks(
    group: Group | ProcessGroup | DeviceMesh | None, peers: Peers | None
) -> tuple[Group, Peers]:
    """The ranks that see different samples, and those that get the same as this one.

    Of a device mesh (torchtitan's, or ``accelerator.torch_device_mesh``) the dimensions named dp, data, dp_replicate,
    dp_shard, fsdp, replicate and shard are data-parallel; ranks along tp, cp, sp and pp (or tensor, context, sequence,
    pipeline and model) are peers, of which the first reports. A mesh of one dimension with another name is taken
    whole. No communication is performed.

    Raises:
        ConfigError: A dimension has another name, or none; ``group`` is None, and accelerate has a mesh along which
            ranks must get the same samples.
    """
    if isinstance(group, DeviceMesh):
        return _of_mesh(group, peers)
    if group is None:
        others = {n: s for n, s in parallel_sizes().items() if s > 1 and n in _SAME_DIMENSIONS}
        if others:
            raise ConfigError(
                f"group=None: stands for all ranks, and accelerate's ParallelismConfig has {others}, along which ranks "
                "must get the same samples; pass group=accelerator.torch_device_mesh"
            )
    return as_group(group), peers if peers is not None else Peers()


def _of_mesh(mesh: DeviceMesh, peers: Peers | None) -> tuple[Group, Peers]:
    names = mesh.mesh_dim_names or ()
    if mesh.ndim == 1 and not set(names) & set(_SAME_DIMENSIONS):
        return as_group(mesh.get_group()), peers if peers is not None else Peers()
    if not names or not set(names) <= {*_DATA_DIMENSIONS, *_SAME_DIMENSIONS}:
        raise ConfigError(
            f"group: is a device mesh of the dimensions {', '.join(names) or '(without names)'}; must be of "
            f"{', '.join((*_DATA_DIMENSIONS, *_SAME_DIMENSIONS))}, so that it is known along which of them samples "
            "differ. Else pass the process group of the ranks that see different samples"
        )
    data = tuple(name for name in names if name in _DATA_DIMENSIONS and mesh[name].size() > 1)
    same = tuple(name for name in names if name in _SAME_DIMENSIONS and mesh[name].size() > 1)
    if not data:
        data_group: Group = SoloGroup()
    else:
        flat = mesh[data] if len(data) == 1 else mesh[data]._flatten()
        data_group = as_group(flat.get_group())
    if peers is None:
        is_first = all(mesh[name].get_local_rank() == 0 for name in same)
        peers = Peers(
            tuple(as_group(mesh[name].get_group()) for name in same), is_reporter=is_first
        )
    return data_group, peers
