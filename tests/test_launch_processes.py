"""Starting, watching and killing jobs, with grandchildren in sessions of their own."""

import os
import sys
from pathlib import Path

import pytest

from launch.processes import Job, RunFailedError, run_to_end, run_until

FAMILY = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                         start_new_session=True)
note = pathlib.Path(sys.argv[1])
note.with_suffix(".tmp").write_text(str(child.pid))
note.with_suffix(".tmp").replace(note)
time.sleep(600)
"""


def job(folder: Path, code: str, *arguments: str) -> Job:
    command = [sys.executable, "-c", code, *arguments]
    return Job("job", command, folder / "job.log", {"MARK": "of the job"})


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at /proc")
def test_kill_reaches_a_grandchild_in_its_own_session(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    run_until(job(tmp_path, FAMILY, str(note)), note, lambda: None, note.exists)
    assert not is_alive(int(note.read_text()))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at /proc")
def test_an_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    note = tmp_path / "pid"

    def interrupt_when_started() -> None:
        if note.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_to_end(job(tmp_path, FAMILY, str(note)), note, interrupt_when_started)
    assert not is_alive(int(note.read_text()))


def test_job_gets_its_environment_and_its_log(tmp_path: Path) -> None:
    code = "import os; print(os.environ['MARK'], 'HOME' in os.environ)"
    run_to_end(job(tmp_path, code), tmp_path / "none", lambda: None)
    assert (tmp_path / "job.log").read_text().strip() == f"of the job {'HOME' in os.environ}"


def test_failure_shows_the_end_of_the_log(tmp_path: Path) -> None:
    code = "import sys; print('first'); print('x\\n' * 200); sys.exit('the reason')"
    with pytest.raises(RunFailedError, match="ended with 1") as caught:
        run_to_end(job(tmp_path, code), tmp_path / "none", lambda: None)
    assert "the reason" in str(caught.value)
    assert "first" not in str(caught.value)


def test_a_run_that_ends_before_it_is_killed_has_failed(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="ended before"):
        run_until(job(tmp_path, "pass"), tmp_path / "none", lambda: None, lambda: False)
