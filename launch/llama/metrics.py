"""What a run says while it trains: `run.jsonl`, TensorBoard, and the terminal. Rank 0 only."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from effx_dist.report.run_log import RunLog


class Display(Protocol):
    """Where the progress of a run is shown."""

    def update(self, progress: float, text: str) -> None:
        """Show that `progress` epochs are done, and `text` about them."""
        ...

    def say(self, text: str) -> None:
        """Show one message that stays."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


class SilentDisplay:
    """Shows nothing: every rank but the first."""

    def update(self, progress: float, text: str) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class LineDisplay:
    """One plain line an update: log files and pipes."""

    def update(self, progress: float, text: str) -> None:
        """Print one line."""
        self.say(f"epoch {progress:6.3f}  {text}")

    def say(self, text: str) -> None:
        """Print one line."""
        print(text, flush=True)

    def close(self) -> None:
        """Nothing is held."""


class BarDisplay:
    """A progress bar over all epochs: terminals."""

    def __init__(self, num_epochs: int) -> None:
        self._bar = Progress(
            TextColumn("epoch {task.completed:.2f}/{task.total:.0f}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(),
        )
        self._task = self._bar.add_task("", total=num_epochs)
        self._bar.start()

    def update(self, progress: float, text: str) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=progress, description=text)

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Stop drawing."""
        self._bar.stop()


class Metrics:
    """Writes `run.jsonl` and TensorBoard, and shows progress; nothing on ranks but 0."""

    def __init__(self, run_dir: Path, rank: int, num_epochs: int, tensorboard: bool) -> None:
        self._log = RunLog(run_dir, tensorboard=tensorboard) if rank == 0 else None
        self._display: Display = SilentDisplay()
        if rank == 0:
            on_terminal = sys.stdout.isatty()
            self._display = BarDisplay(num_epochs) if on_terminal else LineDisplay()

    def log(self, step: int, values: Mapping[str, float], samples: int | None = None) -> None:
        """Record `values` at `step`; `samples` is how many all ranks have processed up to it."""
        if self._log is not None:
            self._log.log(step, dict(values), samples=samples)

    def event(self, kind: str, **fields: Any) -> None:
        """Record that something happened."""
        if self._log is not None:
            self._log.event(kind, **fields)

    def show(self, progress: float, text: str) -> None:
        """Move the progress display."""
        self._display.update(progress, text)

    def say(self, text: str) -> None:
        """Show one message."""
        self._display.say(text)

    def close(self) -> None:
        """Finish the files and the display."""
        self._display.close()
        if self._log is not None:
            self._log.close()
