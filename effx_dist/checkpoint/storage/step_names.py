"""Names inside a checkpoint folder."""

from __future__ import annotations

import re
from typing import Literal, get_args

from effx_dist.checkpoint.storage.local_folder import STAGED
from effx_dist.checkpoint.storage.places import WRITING
from effx_dist.errors import ConfigError, CorruptCheckpointError

MANIFEST = "manifest.json"
MANIFEST_SHA256 = "manifest.json.sha256"
LATEST = "latest"
MOMENTS_REMOVED = "moments-removed"
PINNED = "pinned"
TAG = "tag.json"
"""In a folder that is named like a tag: which step the tag stands for."""
MERGED = "merged"
"""Inside a step: its weights once more as a base, made from the chain below it, which then may go."""
WRITING_NAME = re.compile(WRITING + r"[0-9a-f]{8}-(.+)")
REMOVING = "removing-"
"""Begins the name of a folder on its way out."""
SUPERSEDED = "superseded-"
"""Begins the name of a checkpoint set aside because the run went back to an older one."""
StepPrefix = Literal["step-", "global_step"]
"""Begins the name of a step's folder: this library's own, and DeepSpeed's."""
STEP_PREFIXES: tuple[StepPrefix, ...] = get_args(StepPrefix)
_STEP_NAME = re.compile(rf"(?:{'|'.join(STEP_PREFIXES)})(0|[1-9][0-9]{{0,17}})")
_SIBLING = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_RANK_FILE = re.compile(r"rank-[0-9]{5}(\.moments)?\.effx")
_OWN_FILES = frozenset({MANIFEST, MANIFEST_SHA256, MOMENTS_REMOVED, PINNED})
_MOMENTS = ".moments.effx"


def step_name(step: int, prefix: StepPrefix = "step-") -> str:
    """Folder name of a new checkpoint of ``step``. Raises ConfigError for what is no step or prefix."""
    if step < 0:
        raise ConfigError(f"{step=}: must be >= 0, the number of optimizer steps taken")
    if prefix not in STEP_PREFIXES:
        raise ConfigError(f"step_prefix={prefix!r}: must be one of {list(STEP_PREFIXES)}")
    return f"{prefix}{step}"


def step_of(name: str) -> int | None:
    """The step of a folder's name, either of the two, or None where it is not one."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def rank_file_name(rank: int) -> str:
    """Name of the file that one rank writes."""
    return f"rank-{rank:05d}.effx"


def moments_file_name(rank: int) -> str:
    """Name of the file that one rank writes moments to: what only this step's own restore needs."""
    return f"rank-{rank:05d}{_MOMENTS}"


def is_moments_file(name: str) -> bool:
    """Whether a data file holds moments only."""
    return name.endswith(_MOMENTS)


def checked_sibling_name(name: str, where: str) -> str:
    """A checkpoint folder's name read from a file; raises CorruptCheckpointError for what could
    leave the folder."""
    if not _SIBLING.fullmatch(name):
        raise CorruptCheckpointError(
            f"{where}: {name!r} is not the name of a checkpoint beside it; nothing was opened"
        )
    return name


def checked_rank_file_name(name: str, where: str) -> str:
    """A data file's name read from a manifest; raises CorruptCheckpointError for anything but
    ``rank-NNNNN.effx`` or ``rank-NNNNN.moments.effx``."""
    if not _RANK_FILE.fullmatch(name):
        raise CorruptCheckpointError(
            f"{where}: {name!r} is not the name of a data file (rank-NNNNN.effx); "
            "the manifest was damaged or made by something else, nothing was opened"
        )
    return name


def is_own_file(name: str) -> bool:
    is_whole = name in _OWN_FILES or _RANK_FILE.fullmatch(name) is not None
    return is_whole or name.endswith(STAGED)
