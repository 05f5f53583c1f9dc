"""One epoch as this rank goes through it: its plan, what was handed out of it, and what was weighed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from effx_dist.data.handed_out import HandedOut
from effx_dist.data.plan import EpochPlan
from effx_dist.data.recorder import LossRecorder


@dataclass(frozen=True)
class Tally:
    """What one rank has done of its plan; told to all ranks when the epoch ends."""

    num_planned: int
    num_weighed: int
    num_missing: int
    """Samples, pads not counted, that were not weighed."""
    num_given: int | None
    """Places handed out; None: by no iterator of this process."""
    num_skipped: int
    """Batches that whoever asked threw away, although no state was loaded."""
    is_untouched: bool
    """Whether nothing of the epoch was handed out or weighed, by this process or before it."""
    has_ended: bool
    """Whether the caller has declared that the epoch ends here."""


class EpochRun:
    """The current epoch of one rank.

    Attributes:
        plan: What this rank does in it.
        recorder: What was weighed, and the losses.
        has_ended: Whether the caller has declared that the epoch ends here.
        is_resumed: Whether a state was loaded within the epoch, or at its end.
        has_losses: Whether this rank weighs losses, or counts samples that a peer weighs.
        num_weighs: Micro-batches that were weighed.
        num_skipped: Batches that whoever asks throws away, although no state was loaded that says that they are done.
    """

    def __init__(
        self, plan: EpochPlan, is_strict: bool, has_losses: bool, is_resumed: bool = False
    ) -> None:
        self.plan = plan
        self.recorder = LossRecorder(plan.local_ids, plan.local_weights, is_strict)
        self.has_ended = False
        self.is_resumed = is_resumed
        self.has_losses = has_losses
        self.num_weighs = 0
        self.num_skipped = 0
        self._num_counted = 0  # samples that a peer weighs
        self._newest: HandedOut | None = None
        self._num_given = 0  # by the iterators before the newest
        self._weighed_before = 0  # when the newest began

    @property
    def num_weighed(self) -> int:
        """Places of the plan that were weighed; exact where ids are on the host, else until `weighed` is called an
        estimate (see `LossRecorder`)."""
        return self.recorder.num_weighed if self.has_losses else self._num_counted

    @property
    def num_remaining(self) -> int:
        """Places of the plan that were not weighed."""
        return len(self.plan.local_ids) - self.num_weighed

    @property
    def num_given(self) -> int | None:
        """Places that were handed out; None: by no iterator of this process."""
        return None if self._newest is None else max(self._num_given, self._newest.end)

    @property
    def is_untouched(self) -> bool:
        """Whether nothing of it was handed out or weighed, by this process or before it."""
        return not (self.num_given or self.num_weighed or self.is_resumed)

    @property
    def is_through(self) -> bool:
        """Whether the newest iterator has given all that it had to give."""
        return self._newest is not None and self._newest.is_exhausted

    @property
    def num_weighed_since(self) -> int:
        """Places weighed since the newest iterator was made."""
        return self.num_weighed - self._weighed_before

    def count(self, num_samples: int) -> None:
        """Count samples that a peer weighs."""
        self._num_counted = min(self._num_counted + num_samples, len(self.plan.local_ids))

    def weighed(self) -> npt.NDArray[np.bool_]:
        """Which places were weighed, ``[num_local]``. Waits for the device."""
        if self.has_losses:
            return self.recorder.weighed()
        return np.arange(len(self.plan.local_ids)) < self._num_counted

    def places_left(self) -> npt.NDArray[np.int64]:
        """The places that were not weighed, ascending. Waits for the device."""
        return np.flatnonzero(~self.weighed())

    def prefix(self) -> int:
        """Number of places before the first that was not weighed. Waits for the device."""
        left = self.places_left()
        return int(left[0]) if len(left) else len(self.plan.local_ids)

    def hand_out(self, given: HandedOut) -> HandedOut:
        """Note an iterator that is given away."""
        self._num_given = self.num_given or 0
        self._newest, self._weighed_before = given, self.num_weighed
        return given

    def __getstate__(self) -> dict[str, object]:
        """For pickle and copies: they begin iterators of their own."""
        return {**self.__dict__, "_newest": None, "_num_given": 0}

    def tally(self) -> Tally:
        """Where this rank stands. Waits for the device."""
        is_weighed = self.weighed()
        counts = self.plan.local_weights > 0 if self.has_losses else np.ones_like(is_weighed)
        return Tally(
            num_planned=len(is_weighed),
            num_weighed=int(np.count_nonzero(is_weighed)),
            num_missing=int(np.count_nonzero(counts & ~is_weighed)),
            num_given=self.num_given,
            num_skipped=self.num_skipped,
            is_untouched=self.is_untouched,
            has_ended=self.has_ended,
        )
