"""Files that are whole or absent, and rank 0 making them while the other ranks wait."""

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

POLL_S = 0.05


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; it becomes `path` by rename if nothing was raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def made_by_rank_zero(note: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run `make` on rank 0 and give its JSON result to every rank through the file `note`.

    One small broadcast names this start; the wait itself is on the file and not in a collective,
    because tokenising a large corpus outlasts a collective's timeout. If rank 0 fails, the
    launcher ends the waiting ranks.
    """
    if not dist.is_initialized():
        return make()
    start = [secrets.token_hex(8)]
    dist.broadcast_object_list(start, src=0)
    if dist.get_rank() == 0:
        result = make()
        with written_whole(note) as temporary:
            temporary.write_text(json.dumps({"start": start[0], "result": result}))
        return result
    while True:
        if note.exists():
            record = json.loads(note.read_text())
            if record["start"] == start[0]:
                return dict(record["result"])
        time.sleep(POLL_S)
