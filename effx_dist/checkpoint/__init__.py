"""Compressed, sharded, chained checkpoints.

Read checkpointer.py first (what a run uses), then writer.py and reader.py (what
torch.distributed.checkpoint uses), manifest.py (the format) and chain.py (what a link is a
difference against).
"""

from effx_dist.checkpoint.bounds import set_max_decoded_bytes
from effx_dist.checkpoint.chain import Chain
from effx_dist.checkpoint.checkpointer import Checkpointer
from effx_dist.checkpoint.dcp_reader import ExcpReader
from effx_dist.checkpoint.fragment import Fragment
from effx_dist.checkpoint.inspect import StepSummary, inspect_folder
from effx_dist.checkpoint.pending import PendingSave
from effx_dist.checkpoint.planners import ExcpLoadPlanner, ExcpSavePlanner
from effx_dist.checkpoint.rank_values import PerRank
from effx_dist.checkpoint.verify import VerifyReport, verify_folder
from effx_dist.checkpoint.writer import ExcpWriter

__all__ = [
    "Chain",
    "Checkpointer",
    "ExcpLoadPlanner",
    "ExcpReader",
    "ExcpSavePlanner",
    "ExcpWriter",
    "Fragment",
    "PendingSave",
    "PerRank",
    "StepSummary",
    "VerifyReport",
    "inspect_folder",
    "set_max_decoded_bytes",
    "verify_folder",
]
