"""One rank's side of a run's saves, off the training thread: the chain, the writer, retention."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch

from effx_dist.checkpoint.format.manifest import Figures, ParentRecord
from effx_dist.checkpoint.saving.chain import Chain
from effx_dist.checkpoint.saving.drive import drive_save
from effx_dist.checkpoint.saving.manifest_building import SaveFacts
from effx_dist.checkpoint.saving.retention import remove_leftovers, retire, set_aside_newer
from effx_dist.checkpoint.saving.staging import Bundle
from effx_dist.checkpoint.saving.writer import ExcpWriter
from effx_dist.checkpoint.state.fragment import Fragment
from effx_dist.checkpoint.state.rank_values import agreed
from effx_dist.checkpoint.storage.ownership import Ownership
from effx_dist.config import ExcpConfig
from effx_dist.errors import EffxError
from effx_dist.shard import Group

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveJob:
    """What one save writes: staged fragments by name, what else the manifest says, and the name of
    the checkpoint's folder."""

    state: Mapping[str, Fragment]
    facts: SaveFacts
    name: str


@dataclass(frozen=True)
class SaveResult:
    """What a committed save came to. Bytes of all ranks together; ``write_s`` seconds on this
    rank."""

    step: int
    kind: str
    figures: Figures
    write_s: float


@dataclass(frozen=True)
class Loaded:
    """The checkpoint that a run goes on from, as this rank's next save needs it."""

    id: str
    step: int
    parent: ParentRecord
    figures: Figures
    references: dict[tuple[str, tuple[int, ...]], torch.Tensor]
    is_newest: bool


@dataclass(frozen=True)
class Packed:
    """A job, or what was loaded, with its tensors in one shared memory: what a saving process is sent."""

    value: SaveJob | Loaded
    bundle: Bundle

    @classmethod
    def of(cls, value: SaveJob | Loaded) -> Packed:
        """Take the tensors out. No communication is performed."""
        return cls(_with_tensors(value, repeat(None)), Bundle.of(_tensors_of(value)))

    def unpack(self) -> SaveJob | Loaded:
        """Put them back; they share the memory."""
        return _with_tensors(self.value, iter(self.bundle.tensors()))


def _tensors_of(value: SaveJob | Loaded) -> list[torch.Tensor]:
    if isinstance(value, Loaded):
        return list(value.references.values())
    return [values for fragment in value.state.values() for _, values in fragment.pieces]


def _with_tensors(value: SaveJob | Loaded, tensors: Iterator[Any]) -> SaveJob | Loaded:
    """A copy of ``value`` with other tensors, given in the order of :func:`_tensors_of`."""
    if isinstance(value, Loaded):
        return replace(value, references={key: next(tensors) for key in value.references})
    state = {
        name: Fragment(
            f.shape, f.dtype, [(box, next(tensors)) for box, _ in f.pieces], f.is_replica
        )
        for name, f in value.state.items()
    }
    return replace(value, state=state)


class Saver:
    """Runs saves one after another. Not thread-safe: one thread or process owns it.

    Args:
        ownership: the job's claim on the run's checkpoint folder.
        config: the ``excp`` section.
        group: the ranks that save, used by nothing else.
    """

    def __init__(self, ownership: Ownership, config: ExcpConfig, group: Group) -> None:
        self._folder = ownership.folder
        self._config = config
        self._group = group
        self._ownership = ownership
        self._chain = Chain()
        self._is_first = True
        self._set_aside_above: int | None = None

    def restart(self, loaded: Loaded) -> None:
        """Go on from a checkpoint that has just been loaded. No communication is performed."""
        self._chain.restart(loaded.id, loaded.parent, loaded.figures, loaded.references)
        self._set_aside_above = None if loaded.is_newest else loaded.step

    def save(self, job: SaveJob, session: int) -> SaveResult:
        """Encode, write and commit one checkpoint; then retire old ones. Collective over the group,
        in a session of that number: the same on all ranks, and new each time.

        Raises RankFailedError on all ranks if one failed; then nothing was committed, and what was
        written is removed. Only a rank that loses touch just when rank 0 commits cannot know; the
        next save finds out and is a base.
        """
        with self._group.session(session):
            return self._save(job)

    def give_up(self, session: int, error: BaseException) -> None:
        """Tell the other ranks that this one does not come to a session."""
        rank = self._group.rank
        self._group.give_up({rank: f"{type(error).__name__}: {error}"}, session)

    def close(self) -> None:
        """Let go of the group and of the references. Rank 0 first waits a little for ranks that still
        read from it."""
        self._group.close()
        self._chain = Chain()

    def _save(self, job: SaveJob) -> SaveResult:
        started = time.perf_counter()
        self._group.everywhere(self._clear_the_way, keep_own_error=False)
        try:
            values, aliases = agreed(job.facts.extra, job.facts.aliases, job.state, self._group)
            writer = self._writer(job, replace(job.facts, extra=values, aliases=aliases))
            manifest = drive_save(dict(job.state), writer, self._group)
        except Exception:
            self._tidy(remove_leftovers, self._folder)  # a full disk wants its space back
            raise
        self._tidy(retire, self._folder, self._config)
        write_s = time.perf_counter() - started
        return SaveResult(job.facts.step, manifest.kind, manifest.figures, write_s)

    def _writer(self, job: SaveJob, facts: SaveFacts) -> ExcpWriter:
        return ExcpWriter(
            self._folder / job.name,
            self._config,
            chain=self._chain,
            group=self._group,
            facts=facts,
            before_commit=self._ownership.check,
            owns_tensors=True,
        )

    def _tidy(self, remove: Callable[..., object], *arguments: object) -> None:
        """Rank 0 removes what is not needed; what cannot be removed changes nothing for the save."""
        if self._group.rank != 0:
            return
        try:
            self._ownership.check()
            remove(*arguments)
        except (OSError, EffxError):
            logger.exception("%s: old or unfinished checkpoints stay", self._folder)

    def _clear_the_way(self) -> None:
        """Rank 0 makes sure that the folder is this job's, and empty of what is not to stay."""
        if self._group.rank != 0:
            return
        self._ownership.take()
        self._ownership.check()
        if self._is_first:
            remove_leftovers(self._folder)
            self._is_first = False
        if self._set_aside_above is not None:
            set_aside_newer(self._folder, self._set_aside_above)
            self._set_aside_above = None
