"""What a training loop holds of a save that is under way."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait

from effx_dist.checkpoint.saving.saver import SaveResult
from effx_dist.forwarded import Forwarded


class PendingSave:
    """A save under way.

    Attributes:
        step: the optimizer step it is of.
        blocked_s: seconds that ``async_save`` kept the training loop, waiting for an earlier save
            included.
        skipped: True where policy "skip" left it out because another save was in flight.
        reported: whether somebody has waited for it, and so knows how it ended.
    """

    def __init__(self, step: int, future: Future[SaveResult] | None, blocked_s: float) -> None:
        self.step = step
        self.blocked_s = blocked_s
        self.skipped = future is None
        self._future = future
        self.reported = False

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future is None or self._future.done()

    def on_end(self, call: Callable[[], object]) -> None:
        """Have ``call`` called once it has ended, well or not: at once if it has."""
        if self._future is None:
            call()
        else:
            self._future.add_done_callback(lambda _: call())

    def wait(self) -> PendingSave:
        """Wait for the end; re-raises, with its traceback, what made it fail on this or another
        rank. From a saving process the traceback comes as a note of the exception.

        Ctrl-C while waiting ends the wait, not the save.
        """
        if self._future is not None:
            # in slices: an interrupt that comes just before a thread blocks is seen only after it
            while not wait([self._future], timeout=1).done:
                pass
            self.reported = True
            self._future.result()
        return self

    def failure(self) -> BaseException | None:
        """What made an ended save fail, or None."""
        if self._future is None or not self._future.done():
            return None
        return self._future.exception()

    @property
    def result(self) -> SaveResult:
        """What the committed save came to; waits for it."""
        if self._future is None:
            raise ValueError(f"the save of step {self.step} was skipped; it has no result")
        return self.wait()._future.result()  # type: ignore[union-attr]

    raw_bytes = Forwarded[int]("result.figures.raw_bytes")
    """Bytes of all saved tensors, uncompressed, all ranks together. Waits for the save."""

    stored_bytes = Forwarded[int]("result.figures.stored_bytes")
    """Bytes of all files written, manifest included. Waits for the save."""

    ratio = Forwarded[float]("result.figures.ratio")
    """raw_bytes / stored_bytes. Waits for the save."""

    run_ratio = Forwarded[float]("result.figures.run_ratio")
    """The same ratio over all saves of the run so far, bases included. Waits for the save."""

    error = Forwarded[float]("result.figures.error")
    """Largest relative root-mean-square weight error over the tensors; 0 if exact. Waits for
    the save."""

    write_s = Forwarded[float]("result.write_s")
    """Seconds from the start of encoding to the commit, on this rank. Waits for the save."""

    def metrics(self) -> dict[str, float]:
        """Sizes, times and error by their names in logs. Waits for the save."""
        names = ("raw_bytes", "stored_bytes", "ratio", "run_ratio", "blocked_s", "write_s", "error")
        return {f"effx/checkpoint/{name}": float(getattr(self, name)) for name in names}
