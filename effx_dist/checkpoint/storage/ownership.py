"""Which job writes to a run's folder: the one that came last.

Two jobs on one folder would remove each other's unfinished saves and retire each other's chains. A
lock would have to be broken by hand after every killed job, and clocks of two machines cannot say
whether it is stale; so the newcomer simply puts its name into ``owner.json``, and the job before it
finds that out before it commits or deletes anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from effx_dist.checkpoint.storage.places import Location
from effx_dist.errors import CorruptCheckpointError, FolderTakenError

OWNER = "owner.json"
_MAX_BYTES = 4096


@dataclass
class Ownership:
    """This job's claim on a folder. Used by the coordinator only; can be pickled.

    Attributes:
        folder: the run's folder.
        id: names the job.
        is_taken: whether the job has owned the folder before. It then never takes it again.
    """

    folder: Location
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    is_taken: bool = False

    def take(self) -> None:
        """Become the folder's owner, also in the place of another job, but once only."""
        if self.is_taken:
            return
        if not self.folder.is_folder(follow_link=True):
            with contextlib.suppress(FileExistsError):  # another job has just made it
                self.folder.make()
        started = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"host": socket.gethostname(), "pid": os.getpid(), "first_save": started}
        content = json.dumps({"id": self.id, **about})
        self.folder.replace_file(OWNER, f"{content}\n".encode())
        self.is_taken = True

    def check(self) -> None:
        """Raise FolderTakenError unless this job still owns the folder."""
        owner = _read(self.folder)
        if owner.get("id") != self.id:
            who = " ".join(f"{key} {owner[key]}" for key in ("host", "pid") if key in owner)
            raise FolderTakenError(
                f"{self.folder}: another job ({who or 'unknown'}) saves to it since; nothing more is "
                "committed from here. Stop one of them, or give each a folder of its own"
            )


def _read(folder: Location) -> dict[str, Any]:
    """What the file says; nothing where it is missing, damaged or none."""
    try:
        found = json.loads(folder.read_file(OWNER, _MAX_BYTES))
    except (CorruptCheckpointError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
