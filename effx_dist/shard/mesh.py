"""The ranks over which a DTensor is spread, also where several axes of its mesh cut it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from effx_dist.shard.group import TorchGroup

_made: dict[tuple[int, ...], tuple[dist.ProcessGroup | None, dist.ProcessGroup]] = {}
"""By its ranks: the default group at the time, and the process group made for these ranks."""


class JointGroup(TorchGroup):
    """Ranks that no axis of a mesh has together. Their process group is made on first use.

    That makes the first collective one over these ranks in which the group is made; ranks that
    share several such sets use them in the same order.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(sorted(ranks))
        self.rank = self.ranks.index(dist.get_rank())
        self.size = len(self.ranks)

    @property
    def process_group(self) -> dist.ProcessGroup:
        world = dist.group.WORLD
        made_in, group = _made.get(self.ranks, (None, None))
        if group is None or made_in is not world:  # the default group was destroyed in between
            group = dist.new_group(list(self.ranks), use_local_synchronization=True)
            _made[self.ranks] = (world, group)
        return group

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JointGroup) and other.ranks == self.ranks

    def __hash__(self) -> int:
        return hash(self.ranks)


def group_of_axes(mesh: DeviceMesh, axes: Sequence[int]) -> TorchGroup:
    """The ranks that differ from this one, a rank of the mesh, in ``axes`` (one at least) alone.

    An axis on its own has a group already, and so have all ranks there are. No communication is
    performed.
    """
    if len(axes) == 1:
        return TorchGroup(mesh.get_group(axes[0]))
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "callers ask on ranks of the mesh"
    within = tuple(slice(None) if axis in axes else at for axis, at in enumerate(coordinate))
    return group_of_ranks(mesh.mesh[within].flatten().tolist())


def group_of_ranks(ranks: Sequence[int]) -> TorchGroup:
    """These ranks of the default group, this one among them. No communication is performed."""
    return TorchGroup() if len(ranks) == dist.get_world_size() else JointGroup(ranks)
