"""Start a launcher, watch it, and end it with everything it has started."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.2
STALL_LIMIT_S = 300.0
TAIL_LINES = 40
LAUNCHER_SUMMARY = re.compile(r"elastic/multiprocessing/api\.py.*failed \(exitcode")


class RunFailedError(RuntimeError):
    """A run ended badly or not at all; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Job:
    """A command, the extra environment it gets, and the file that takes what it prints."""

    name: str
    command: Sequence[str]
    log: Path
    env: dict[str, str]


def torchrun(python: str, num_ranks: int, script: Path, arguments: Sequence[str]) -> list[str]:
    """A torchrun command on this machine, on a port of its own: two can run at once."""
    launcher = [python, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(num_ranks), str(script), *arguments]


def run_to_end(job: Job, watched: Path, on_poll: Callable[[], None]) -> None:
    """Run a job; raises RunFailedError if it fails, or if `watched` stops growing."""
    with _started(job) as process:
        _poll(job, process, watched, on_poll, lambda: False)
        if process.returncode:
            raise RunFailedError(_with_tail(f"{job.name} ended with {process.returncode}", job))


def run_until(
    job: Job, watched: Path, on_poll: Callable[[], None], is_enough: Callable[[], bool]
) -> None:
    """Run a job and kill all of it, without warning, as soon as `is_enough`.

    Raises RunFailedError if it ends before that.
    """
    with _started(job) as process:
        if not _poll(job, process, watched, on_poll, is_enough):
            raise RunFailedError(_with_tail(f"{job.name} ended before it was to be killed", job))


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all its descendants.

    torchrun gives each worker a session of its own, so killing its process group is not enough.
    All are stopped first: a process that is stopped starts no other and cleans nothing up.
    """
    family: set[int] = set()
    while found := {pid, *_descendants(pid)} - family:
        for member in found:
            _signal(member, signal.SIGSTOP)
        family |= found
    for member in family:
        _signal(member, signal.SIGKILL)
    while any(_is_running(member) for member in family - {pid}):
        time.sleep(POLL_S)


@contextmanager
def _started(job: Job) -> Iterator[subprocess.Popen[bytes]]:
    with job.log.open("wb") as log:
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **job.env},
            # Ctrl-C reaches this script alone, which then ends all of them.
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                kill_tree(process.pid)
                process.wait()


def _poll(
    job: Job,
    process: subprocess.Popen[bytes],
    watched: Path,
    on_poll: Callable[[], None],
    is_enough: Callable[[], bool],
) -> bool:
    """Wait until `is_enough` (True) or the process ends (False)."""
    size, since = -1, time.monotonic()
    while process.poll() is None:
        if is_enough():
            return True
        on_poll()
        now_bytes = watched.stat().st_size if watched.exists() else 0
        if now_bytes != size:
            size, since = now_bytes, time.monotonic()
        elif time.monotonic() - since > STALL_LIMIT_S:
            raise RunFailedError(
                _with_tail(f"{job.name}: nothing in {watched} for {STALL_LIMIT_S:.0f} s", job)
            )
        time.sleep(POLL_S)
    return False


def _with_tail(message: str, job: Job) -> str:
    lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
    # What torchrun adds after a worker's failure is about torchrun itself.
    ends = [at for at, line in enumerate(lines) if LAUNCHER_SUMMARY.search(line)]
    lines = lines[: ends[0] + 1] if ends else lines
    return "\n".join([f"{message}; the end of {job.log}:", *lines[-TAIL_LINES:]])


def _descendants(pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for child, parent, _ in _processes():
        children.setdefault(parent, []).append(child)
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        fresh = [child for child in children.get(waiting.pop(), []) if child not in found]
        found.update(fresh)
        waiting += fresh
    return found


def _is_running(pid: int) -> bool:
    return any(found == pid and state != "Z" for found, _, state in _processes())


def _processes() -> Iterator[tuple[int, int, str]]:
    """(pid, parent's pid, state) of every process: from /proc, or from `ps` where there is none."""
    if Path("/proc/self/stat").exists():
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    stat = Path("/proc", entry, "stat").read_text(errors="replace")
                except OSError:  # it has ended since the listing
                    continue
                # The name, in brackets, may itself hold blanks and brackets.
                state, parent = stat.rpartition(")")[2].split()[:2]
                yield int(entry), int(parent), state
        return
    table = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,state="], capture_output=True, text=True, check=True
    )
    for line in table.stdout.splitlines():
        pid, parent, state = line.split()
        yield int(pid), int(parent), state[0]


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
