"""A series of plain checkpoints into a chain, one commit after another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effx_dist.checkpoint.checkpointer import Checkpointer
from effx_dist.checkpoint.format.manifest import Manifest
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.format.whole_tensors import OnProgress
from effx_dist.checkpoint.saving.pending import PendingSave
from effx_dist.checkpoint.state.joints import TensorFacts
from effx_dist.checkpoint.state.matching import MODEL, OPTIMIZER, listed
from effx_dist.checkpoint.state.training_state import run_values
from effx_dist.checkpoint.storage.places import Location, location
from effx_dist.checkpoint.storage.steps import committed_steps, step_folder
from effx_dist.checkpoint.tools.compress.content import PlainContent, ReadOptions
from effx_dist.checkpoint.tools.compress.series import PlainCheckpoint, find_series
from effx_dist.checkpoint.tools.compress.share import Division, EmptyShare, Share
from effx_dist.config import ExcpConfig
from effx_dist.errors import ConfigError, LayoutMismatchError
from effx_dist.shard import Group, SoloGroup


@dataclass
class CompressReport:
    """What came of a series.

    Attributes:
        num_steps: checkpoints that were compressed now.
        num_there: those that the chain held already.
        read_bytes: bytes of the files of those that were compressed.
        stored_bytes: bytes that they take up now.
        error: greatest relative root-mean-square error of a weight tensor.
    """

    num_steps: int = 0
    num_there: int = 0
    read_bytes: int = 0
    stored_bytes: int = 0
    error: float = 0.0


def compress_series(
    series: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    config: ExcpConfig | None = None,
    *,
    options: ReadOptions | None = None,
    group: Group | None = None,
    on_progress: OnProgress | None = None,
) -> CompressReport:
    """Compress plain checkpoints into the chain in ``output``, as a Checkpointer would have saved them.

    Collective over ``group`` (default: this process alone), which shares the work by tensors. Each
    step is committed before the next is read. Steps that ``output`` holds are left alone, so that a
    run that was cut off goes on where it was; a chain that is there already is continued.

    Args:
        series: checkpoints, or folders of them; see :func:`find_series`. Never changed.
        output: a local path or an fsspec URL.
        config: profile, base_every and the like. All steps are kept, and saved in this call.
        options: how the checkpoints are read.
        on_progress: called with the bytes of the checkpoints that are done, and of all.

    Memory per rank: its share of a checkpoint, and that of the weights twice more at most; of a folder
    of torch.distributed.checkpoint the share is held twice.

    Raises ConfigError, CheckpointNotFoundError, LayoutMismatchError (a tensor that is missing, or of
    another shape or dtype than the step before it has), CorruptCheckpointError, OSError; RankFailedError
    on all of several ranks if one of them failed. What was committed before stays valid.
    """
    group = group or SoloGroup()
    place = location(output)
    options = options or ReadOptions()
    base = config or ExcpConfig()
    settings = base.model_copy(
        update={"async_mode": "sync", "policy": "wait", "keep_latest_k": 0, "keep_every_n": 0}
    )
    todo, newest, num_there = _plan(series, output, place, group)
    report = CompressReport(num_there=num_there)
    if not todo:
        return report
    total_bytes = sum(checkpoint.num_bytes for checkpoint in todo)
    with Checkpointer(output, settings, group=group) as checkpoints:
        run = _Run(checkpoints, options, group)
        for checkpoint in todo:
            run.compress(checkpoint, newest, report)
            newest = checkpoint.step
            if on_progress is not None:
                on_progress(report.read_bytes, total_bytes)
    return report


def _plan(
    series: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    place: Location,
    group: Group,
) -> tuple[list[PlainCheckpoint], int | None, int]:
    """The checkpoints that are not there yet, the newest step that is, and how many are, as rank 0
    sees them. Two small gathers."""

    def look() -> tuple[list[PlainCheckpoint], int | None, int]:
        found, there = find_series(series, output), committed_steps(place)
        todo = [checkpoint for checkpoint in found if checkpoint.step not in there]
        newest = max(there, default=None)
        late = [str(c.path) for c in todo if newest is not None and c.step < newest]
        if late:
            raise ConfigError(
                f"{place}: ends with step {newest}, and these would come before it: {listed(late)}; leave "
                "them out, or compress the series into another folder"
            )
        return todo, newest, len(found) - len(todo)

    return group.from_first(look, keep_own_error=group.size == 1)


class _Run:
    """What goes from one checkpoint of the series to the next."""

    def __init__(self, checkpoints: Checkpointer, options: ReadOptions, group: Group) -> None:
        self._checkpoints = checkpoints
        self._options = options
        self._group = group
        self._before: _Contents | None = None
        self._division: Division | None = None

    def compress(
        self, checkpoint: PlainCheckpoint, parent: int | None, report: CompressReport
    ) -> None:
        """Save one checkpoint; ``parent`` is the step before it, if there is one. Collective."""

        def opened() -> tuple[PlainContent, _Contents]:
            found = checkpoint.open(self._options)
            layout = _Contents.of(checkpoint.step, found)
            if self._before is None and parent is not None:
                folder = step_folder(self._checkpoints.folder, parent)
                self._before = _Contents.of_manifest(read_manifest(folder)[0])
            if self._before is not None:
                layout.check(self._before, self._options.weights_only, checkpoint.path)
            return found, layout

        group, is_alone = self._group, self._group.size == 1
        content, layout = group.everywhere(opened, keep_own_error=is_alone)
        if self._division is None:
            self._division = Division(content, group.size)
            if parent is not None:  # its weights are what the first save here is a difference to
                room = EmptyShare(content, self._division, group.rank)
                group.everywhere(
                    lambda: self._checkpoints.load(room, strict=False), keep_own_error=is_alone
                )
        state = Share(content, self._division, group.rank)
        stateful = {name: _Stated(value) for name, value in content.stateful.items()}

        def save() -> PendingSave:
            return self._checkpoints.save(
                checkpoint.step, state, stateful=stateful, extra=content.extra
            )

        saved = group.everywhere(save, keep_own_error=is_alone)
        self._before = layout
        report.num_steps += 1
        report.read_bytes += checkpoint.num_bytes
        report.stored_bytes += saved.stored_bytes
        report.error = max(report.error, saved.error)


@dataclass(frozen=True)
class _Stated:
    """Something whose state is known."""

    state: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: the state is only saved."""


@dataclass(frozen=True)
class _Contents:
    """The tensors of a checkpoint, and the other names of tied ones."""

    step: int
    tensors: dict[str, TensorFacts]
    aliases: frozenset[str]

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> _Contents:
        trees = tuple(f"{MODEL}.{name}." for name in run_values(manifest).model_values)
        tensors = {
            name: TensorFacts(record.torch_dtype, tuple(record.shape))
            for name, record in manifest.tensors.items()
            if name.startswith((f"{MODEL}.", f"{OPTIMIZER}."))
            and not f"{name}.".startswith(trees)  # in what is no tensor itself
        }
        return cls(manifest.step, tensors, frozenset(manifest.aliases))

    @classmethod
    def of(cls, step: int, content: PlainContent) -> _Contents:
        tensors = {name: tensor.facts for name, tensor in content.tensors.items()}
        return cls(step, tensors, frozenset(f"{MODEL}.{name}" for name in content.tied))

    def check(self, before: _Contents, weights_only: bool, where: object) -> None:
        """Raise LayoutMismatchError where a tensor differs from that of the step ``before``. An
        optimizer may have more state than there was."""
        prefixes = (f"{MODEL}.",) if weights_only else (f"{MODEL}.", f"{OPTIMIZER}.")
        expected = {n: facts for n, facts in before.tensors.items() if n.startswith(prefixes)}
        problems = [
            f"{name}: {_shown(expected[name])} in step {before.step}, {_shown(facts)} here"
            for name, facts in sorted(self.tensors.items())
            if expected.get(name, facts) != facts
        ]
        lost = expected.keys() - self.tensors.keys() - self.aliases
        problems += [f"{name}: in step {before.step}, and not here" for name in sorted(lost)]
        new = self.tensors.keys() - expected.keys() - before.aliases
        added = sorted(name for name in new if name.startswith(f"{MODEL}."))
        problems += [f"{name}: not in step {before.step}" for name in added]
        if problems:
            remedy = "" if weights_only else ", or the weights alone (--weights-only)"
            raise LayoutMismatchError(
                f"{where}: does not go on where step {before.step} was: {listed(problems)}. Compress "
                f"another run's checkpoints into another folder{remedy}"
            )


def _shown(facts: TensorFacts) -> str:
    return f"{facts.shape} {str(facts.dtype).removeprefix('torch.')}"
