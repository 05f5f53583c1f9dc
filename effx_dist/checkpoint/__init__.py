"""Compressed, sharded, chained checkpoints, on floors that import downwards only.

storage/ <- format/ <- state/ <- saving/ <- loading/ <- checkpointer.py <- tools/. Begin with
checkpointer.py (what a run uses), then saving/writer.py and loading/dcp_reader.py (what
torch.distributed.checkpoint uses), format/manifest.py and saving/chain.py.
"""

from effx_dist.checkpoint.checkpointer import Checkpointer
from effx_dist.checkpoint.format import manifest
from effx_dist.checkpoint.format.whole_tensors import set_max_decoded_bytes
from effx_dist.checkpoint.loading.dcp_reader import ExcpReader
from effx_dist.checkpoint.saving import chain, drive, writer
from effx_dist.checkpoint.saving.chain import Chain
from effx_dist.checkpoint.saving.pending import PendingSave
from effx_dist.checkpoint.saving.planners import ExcpLoadPlanner, ExcpSavePlanner
from effx_dist.checkpoint.saving.writer import ExcpWriter
from effx_dist.checkpoint.state import live, rank_values
from effx_dist.checkpoint.state.fragment import Fragment
from effx_dist.checkpoint.state.live import LiveState
from effx_dist.checkpoint.state.rank_values import PerRank
from effx_dist.checkpoint.storage import steps
from effx_dist.checkpoint.tools.inspect import StepSummary, inspect_folder
from effx_dist.checkpoint.tools.verify import VerifyReport, verify_folder
from effx_dist.former_paths import keep_former_paths

keep_former_paths(__name__, drive=drive, folder=steps, live=live, manifest=manifest, writer=writer)
keep_former_paths(__name__, chain=chain, rank_values=rank_values)

__all__ = [
    "Chain",
    "Checkpointer",
    "ExcpLoadPlanner",
    "ExcpReader",
    "ExcpSavePlanner",
    "ExcpWriter",
    "Fragment",
    "LiveState",
    "PendingSave",
    "PerRank",
    "StepSummary",
    "VerifyReport",
    "inspect_folder",
    "set_max_decoded_bytes",
    "verify_folder",
]
