"""Verifying a checkpoint folder: whether every byte is what was written, and decodes to values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from effx_dist.checkpoint.format.block_files import BlockReader
from effx_dist.checkpoint.format.manifest import BlockRecord, Manifest
from effx_dist.checkpoint.format.reader import ChainReader, StepReader, read_manifest
from effx_dist.checkpoint.format.whole_tensors import OnProgress, read_pieces
from effx_dist.checkpoint.state.training_state import run_values
from effx_dist.checkpoint.storage.places import Folder, Location
from effx_dist.checkpoint.storage.steps import (
    MANIFEST,
    MERGED,
    MOMENTS_REMOVED,
    committed_steps,
    is_moments_file,
    require_committed,
    step_folder,
)
from effx_dist.checkpoint.tools.inspect import existing_folder
from effx_dist.errors import CheckpointNotFoundError, EffxError
from effx_dist.shard import Group, SoloGroup

RUN_BYTES = 2**26
"""Neighbouring blocks of one file are checked by one thread up to this many bytes."""
T = TypeVar("T")


@dataclass
class VerifyReport:
    """What was read and what is wrong with it; no findings means that every committed byte is as
    written."""

    num_steps: int = 0
    num_blocks: int = 0
    num_bytes: int = 0
    findings: list[str] = field(default_factory=list)

    def find(self, finding: str) -> None:
        """Add a finding, once."""
        if finding not in self.findings:
            self.findings.append(finding)

    def add(self, other: VerifyReport) -> None:
        """Add what another thread or rank has found; the steps are counted by all."""
        self.num_blocks += other.num_blocks
        self.num_bytes += other.num_bytes
        for finding in other.findings:
            self.find(finding)


Job = Callable[[], VerifyReport]


def verify_folder(
    folder: Folder,
    step: int | None = None,
    *,
    jobs: int = 1,
    decode: bool = False,
    ranks: Group | None = None,
    on_progress: OnProgress | None = None,
) -> VerifyReport:
    """Check manifests, parents, files and the checksum of every block of all committed steps, or of
    one and its parents.

    Findings are collected, not raised, and name file, tensor and block. Three gathers and a broadcast of
    ``ranks``, which all return the same report.

    Args:
        folder: the folder of checkpoints.
        step: only this one, with what it builds upon.
        jobs: threads; reading, hashing and decoding go on beside each other.
        decode: also read every tensor as a load would, which finds what no checksum can.
        ranks: processes that call this together and share the work.
        on_progress: called in this thread, with this rank's share of the stored bytes.

    Raises:
        CheckpointNotFoundError: There is nothing to verify.
        RankFailedError: A rank could not look into the folder at all.
    """
    ranks = ranks or SoloGroup()

    def choose() -> list[int]:
        path = existing_folder(folder)
        found = committed_steps(path) if step is None else [require_committed(path, step)]
        if not found:
            raise CheckpointNotFoundError(f"{path}: holds no committed checkpoint")
        return found

    # the first rank's choice: a save may be committed while others are still looking
    is_alone = ranks.size == 1  # then what fails is raised as it is
    steps = ranks.from_first(choose, keep_own_error=is_alone)
    share = _Share(ranks, jobs, decode, on_progress)
    own = ranks.everywhere(
        lambda: _verify_share(existing_folder(folder), steps, share), keep_own_error=is_alone
    )
    reports = ranks.all_gather_object(own)
    total = VerifyReport(num_steps=reports[0].num_steps)
    for report in reports:
        total.add(report)
    return total


@dataclass
class _Share:
    """What one rank does of the work: every ``ranks.size``-th job."""

    ranks: Group
    num_threads: int
    decode: bool
    on_progress: OnProgress | None
    num_jobs: int = 0
    done_bytes: int = 0
    total_bytes: int = 0

    def mine(self, work: Iterator[T]) -> Iterator[T]:
        for item in work:
            if self.num_jobs % self.ranks.size == self.ranks.rank:
                yield item
            self.num_jobs += 1

    def advance(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes
        if self.on_progress is not None:
            self.on_progress(self.done_bytes, max(self.total_bytes, self.done_bytes))


def _verify_share(path: Location, steps: Sequence[int], share: _Share) -> VerifyReport:
    report = VerifyReport()
    places = [step_folder(path, step) for step in steps]
    share.total_bytes = sum(sum(p.files().values()) for p in places) // share.ranks.size
    seen: set[str] = set()
    with ThreadPoolExecutor(share.num_threads) as pool:
        while places:
            place = places.pop(0)
            if str(place) in seen:
                continue
            seen.add(str(place))
            report.num_steps += place.name != MERGED
            try:
                reader = StepReader(place)
            except EffxError as error:
                report.find(str(error))
                continue
            for found in _in_order(pool, _jobs(reader, share)):
                report.add(found)
                share.advance(found.num_bytes)
            places += _below(reader, report)
    return report


def _in_order(pool: ThreadPoolExecutor, jobs: Iterator[Job]) -> Iterator[VerifyReport]:
    """Results of the jobs in their order, whichever ends first, so that a report is the same each
    time."""
    futures = [pool.submit(job) for job in jobs]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _jobs(reader: StepReader, share: _Share) -> Iterator[Job]:
    removed = _removed_files(reader)

    def check(index: int, run: list[tuple[BlockRecord, str, int]]) -> Job:
        return lambda: _check_run(reader, index, run)

    def decode(names: list[str]) -> Job:
        return lambda: _decode(reader.folder, names)

    runs = (check(index, run) for index, run in _runs(reader.manifest) if index not in removed)
    yield from share.mine(runs)
    if share.decode:
        names = _readable_tensors(reader.manifest, removed)
        parts = share.ranks.size * share.num_threads
        yield from share.mine(decode(names[start::parts]) for start in range(parts))


def _removed_files(reader: StepReader) -> set[int]:
    """Files of moments that retention has let go of, as the step says."""
    if not reader.folder.has_file(MOMENTS_REMOVED):
        return set()
    return {i for i, file in enumerate(reader.manifest.files) if is_moments_file(file.name)}


def _runs(manifest: Manifest) -> Iterator[tuple[int, list[tuple[BlockRecord, str, int]]]]:
    """Each file's blocks in the order in which they lie in it, cut into runs; one run at least."""
    blocks: list[list[tuple[BlockRecord, str, int]]] = [[] for _ in manifest.files]
    for name, record in manifest.tensors.items():
        for chunk in record.chunks:
            for index, block in enumerate(chunk.blocks):
                blocks[chunk.file].append((block, name, index))
    for file, found in enumerate(blocks):
        found.sort(key=lambda item: item[0].offset)
        run: list[tuple[BlockRecord, str, int]] = []
        num_bytes = 0
        for item in found:
            run.append(item)
            num_bytes += item[0].length
            if num_bytes >= RUN_BYTES:
                yield file, run
                run, num_bytes = [], 0
        if run or not found:
            yield file, run


def _check_run(
    reader: StepReader, index: int, run: Sequence[tuple[BlockRecord, str, int]]
) -> VerifyReport:
    report = VerifyReport()
    file = BlockReader(reader.folder, reader.manifest.files[index])  # of this thread alone
    try:
        file.open()
        for block, name, number in run:
            report.num_blocks += 1
            report.num_bytes += block.length
            try:
                file.read(block, name, number)
            except EffxError as error:
                report.find(str(error))
    except EffxError as error:
        report.find(str(error))
    except OSError as error:
        report.find(f"{file.path}: cannot be read: {error}")
    finally:
        file.close()
    return report


def _readable_tensors(manifest: Manifest, removed: set[int]) -> list[str]:
    """Names by falling size, so that the work is dealt out evenly."""
    names = [
        name
        for name, record in manifest.tensors.items()
        if not any(chunk.file in removed and chunk.blocks for chunk in record.chunks)
    ]
    return sorted(names, key=lambda name: (-manifest.tensors[name].numel, name))


def _decode(folder: Location, names: Sequence[str]) -> VerifyReport:
    report = VerifyReport()
    try:
        with ChainReader(folder) as chain:
            run_values(chain.top.manifest)
            for name in names:
                try:
                    for _ in read_pieces(chain, name):
                        pass
                except EffxError as error:
                    report.find(str(error))
    except (EffxError, OSError) as error:
        report.find(str(error))
    return report


def _below(reader: StepReader, report: VerifyReport) -> list[Location]:
    """What a step is made against, to be verified too: its parent, and the base merged from what
    was once below it."""
    place, parent = reader.folder, reader.manifest.parent
    found = []
    try:
        if reader.merged is not None:
            found = [reader.merged.folder]
    except EffxError as error:
        report.find(str(error))
    if parent is None or (found and not (place.parent / parent.name).has_file(MANIFEST)):
        return found
    try:
        _, checksum = read_manifest(place.parent / parent.name)
    except EffxError as error:
        report.find(f"{place}: its parent cannot be read: {error}")
        return found
    if checksum != parent.xxh3:
        report.find(
            f"{place}: its parent {parent.name} is not the checkpoint it was made against; it was replaced"
        )
    return [*found, place.parent / parent.name]
