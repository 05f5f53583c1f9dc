"""Who holds which box of which whole tensor, and how the holders talk to each other."""

from effx_dist.former_paths import keep_former_paths
from effx_dist.shard import group, piece
from effx_dist.shard.box import Box, boxes_to_flat_range, flat_range_to_boxes, flat_start, whole_box
from effx_dist.shard.group import Group, SoloGroup, TorchGroup, as_group, separate_group
from effx_dist.shard.mpi_group import MpiGroup
from effx_dist.shard.piece import (
    EvenShare,
    Held,
    LocalRows,
    Part,
    Piece,
    PlacedBox,
    ShardMap,
    WholeTensor,
    local_of,
    pieces_of_boxes,
    pieces_of_flat_range,
    pieces_of_parts,
    pieces_of_tensor,
    start_sum,
)
from effx_dist.shard.store_group import Rendezvous, StoreGroup, meet
from effx_dist.shard.worker import Worker

keep_former_paths(__name__, mesh=group, rows=piece)
