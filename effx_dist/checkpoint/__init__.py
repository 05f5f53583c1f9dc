"""Compressed, sharded, chained checkpoints.

Read checkpointer.py first (what a run uses), then writer.py and reader.py (what
torch.distributed.checkpoint uses), manifest.py (the format) and chain.py (what a link is a
difference against).
"""

from effx_dist.checkpoint.checkpointer import Checkpointer
from effx_dist.checkpoint.format.bounds import set_max_decoded_bytes
from effx_dist.checkpoint.loading.dcp_reader import ExcpReader
from effx_dist.checkpoint.saving.chain import Chain
from effx_dist.checkpoint.saving.pending import PendingSave
from effx_dist.checkpoint.saving.planners import ExcpLoadPlanner, ExcpSavePlanner
from effx_dist.checkpoint.saving.writer import ExcpWriter
from effx_dist.checkpoint.state.fragment import Fragment
from effx_dist.checkpoint.state.rank_values import PerRank
from effx_dist.checkpoint.tools.inspect import StepSummary, inspect_folder
from effx_dist.checkpoint.tools.verify import VerifyReport, verify_folder

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
