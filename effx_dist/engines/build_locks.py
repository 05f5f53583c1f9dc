"""Locks of killed builds, at which DeepSpeed would wait without end and without a word.

DeepSpeed compiles its operators at the first start, under a lock file that torch makes and removes. A
start that is killed meanwhile leaves it behind, and every later start sleeps until it is gone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from torch.utils import cpp_extension

from effx_dist.errors import EffxError

logger = logging.getLogger(__name__)

LOCK = "lock"
"""The file's name in an operator's build folder, as torch.utils.cpp_extension has it."""
ON_CPU = "deepspeed_shm_comm"
"""The operator that DeepSpeed builds first on a CPU, when it sets up its communication."""
LONGEST_BUILD_S = 900.0
"""No operator takes as long to compile."""
IDLE_S = 60.0
"""A build by somebody whom this machine does not see (another node, another user) writes files at least
this often."""
SAY_EVERY_S = 10.0


class BuildLockError(EffxError, TimeoutError):
    """DeepSpeed cannot start: a build of one of its operators is under way, or seems so, and does not end.

    The message names the lock file and what to do.
    """


def await_builds(
    is_wanted: Callable[[str], bool] = lambda operator: True,
    timeout_s: float = LONGEST_BUILD_S,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return when no lock of a build of the wanted operators is left.

    A lock that no running build holds is removed, with a warning. One that is held is waited for, with a
    line every ten seconds. No communication is performed: each rank looks for itself.

    Raises BuildLockError after ``timeout_s`` seconds.
    """
    ends, says = time.monotonic() + timeout_s, 0.0
    for lock in locks(is_wanted):
        while lock.exists() and not _take_over(lock):
            now = time.monotonic()
            if now >= ends:
                raise BuildLockError(
                    f"{lock}: a build of DeepSpeed's {lock.parent.name} holds it for longer than {timeout_s:.0f} s; "
                    "if nothing is being compiled on any machine that shares this folder, remove the file "
                    "and start again"
                )
            if now >= says:
                logger.warning("%s: waiting for a build that is under way (or seems so)", lock)
                says = now + SAY_EVERY_S
            sleep(0.2)


def locks(is_wanted: Callable[[str], bool] = lambda operator: True) -> list[Path]:
    """Locks in the folders where torch builds extensions, of the operators that are asked for by name."""
    found: set[Path] = set()
    try:
        own = Path(cpp_extension._get_build_directory(ON_CPU, verbose=False)).parent
        found.update(own.glob(f"*/{LOCK}"))
        found.update(Path(cpp_extension.get_default_build_root()).glob(f"*/*/{LOCK}"))
    except OSError:  # nothing can be built there, and nothing is waited for
        pass
    return sorted(lock for lock in found if is_wanted(lock.parent.name))


def is_stale(lock: Path) -> bool:
    """Whether a lock is left over: no process of this machine has it open, as its builder does, and
    nothing in its folder was written lately."""
    if _is_open(lock):
        return False
    try:
        newest = max(path.stat().st_mtime for path in [lock, *lock.parent.iterdir()])
    except FileNotFoundError:  # it has just gone
        return False
    # A builder of this user and machine would be seen; others are told by what they write.
    return _sees_all_processes(lock) or time.time() - newest > IDLE_S


def _is_open(lock: Path) -> bool:
    try:
        wanted = lock.stat()
    except FileNotFoundError:
        return False
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            found = descriptor.stat()
        except OSError:  # gone, or another user's
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


def _sees_all_processes(lock: Path) -> bool:
    """Whether whoever can write to the folder would be seen: it lies on a file system of this machine, and
    this process may look at every other one."""
    is_local = "/dev/" in _device_of(lock) or _device_of(lock) in ("overlay", "tmpfs")
    return is_local and os.geteuid() == 0


def _device_of(path: Path) -> str:
    """What is mounted where a path lies."""
    best, device = "", ""
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in mounts:
        source, point, *_ = line.split(" ")
        if str(path).startswith(point.rstrip("/") + "/") and len(point) >= len(best):
            best, device = point, source
    return device


def _take_over(lock: Path) -> bool:
    """Remove a lock that is left over; return whether it is gone. Ranks of one machine take turns: none
    removes the lock of a build that another has begun in between."""
    turn = lock.with_name("effx-turn")
    try:
        with turn.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not is_stale(lock):
                return not lock.exists()
            lock.unlink(missing_ok=True)
            logger.warning("%s: was left behind by a build that was killed; it is removed", lock)
            return True
    except OSError as error:
        logger.warning("%s: cannot be taken over: %s", lock, error)
        return False
