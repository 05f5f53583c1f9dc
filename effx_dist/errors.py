"""The errors that effx_dist raises.

Each one also derives from the built-in class that a caller would have caught anyway, so that
existing `except ValueError:` or `except FileNotFoundError:` blocks keep working. Imports nothing of
the package.
"""

from __future__ import annotations

from collections.abc import Mapping


class EffxError(Exception):
    """Base of every error that effx_dist raises on purpose.

    Catch it to tell a refusal by this library from a fault in the code around it.
    """


class ConfigError(EffxError, ValueError):
    """A setting is unknown, of the wrong type or out of its range, or a config file cannot be read.

    The message names every faulty key at once, each with its value, its bound and what to write
    instead.
    """


class PlanNotTrainedError(EffxError, RuntimeError):
    """What InfoBatch planned for an epoch is not what was trained.

    Samples of the plan were never weighed, others were, or an epoch was never set: mostly because a
    framework stands between the sampler and the loop. Every rank raises it. The message names the
    epoch, the counts, the likely cause and the remedy.
    """


class LayoutMismatchError(EffxError, ValueError):
    """What a rank holds does not fit the whole tensor, or does not fit what a checkpoint stores.

    Raised when pieces overlap, leave a gap or exceed the whole tensor's shape, and when a
    checkpoint's tensor has another shape or data type than the live one. The message names the
    tensor, both layouts and the rank.
    """


class CorruptCheckpointError(EffxError, RuntimeError):
    """The bytes of a committed checkpoint are not the bytes that were written.

    Raised for a checksum that differs, a file that is too short, and a manifest that does not hold
    together. The message names the file, the tensor, the block, and the checkpoint to fall back on
    where there is one.
    """


class UnreadableSaveError(EffxError, RuntimeError):
    """What is about to be published does not pass the checks that a reader makes.

    The save fails and the checkpoint before it stays the newest: a checkpoint that exists loads. The
    message names the tensor and what a reader would refuse.
    """


class CheckpointNotFoundError(EffxError, FileNotFoundError):
    """A folder holds no committed checkpoint, or not the step that was asked for.

    A save that was cut off before its manifest appeared does not count as a checkpoint.
    """


class FolderTakenError(EffxError, RuntimeError):
    """Another job has begun to save to this run's folder, so this one no longer may.

    The message names the folder, and the host and process of the other job.
    """


class MissingEngineError(EffxError, ImportError):
    """An engine (DeepSpeed, Megatron-core) is not installed, or this version of effx_dist does not
    support it.

    The message names the package to install, or says that there is no adapter for the engine yet.
    """


class RankFailedError(EffxError, RuntimeError):
    """One or more ranks failed in something that all ranks do together, so nobody may go on with
    it.

    Every rank raises it, those that failed and those that did not: a failed save leaves the
    previous checkpoint in place, and training may continue.

    Attributes:
        failures: Global rank -> what went wrong there, in rank order.
    """

    failures: dict[int, str]

    def __init__(self, failures: Mapping[int, str]) -> None:
        self.failures = dict(sorted(failures.items()))
        ranks = "rank" if len(self.failures) == 1 else "ranks"
        names = ", ".join(str(rank) for rank in self.failures)
        reasons = "; ".join(f"rank {rank}: {reason}" for rank, reason in self.failures.items())
        super().__init__(f"{ranks} {names} failed ({reasons})")

    def __reduce__(self) -> tuple[type[RankFailedError], tuple[dict[int, str]]]:
        """Pickle by the failures, not by the message: launchers carry errors between processes."""
        return type(self), (self.failures,)
