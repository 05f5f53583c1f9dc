"""Reading checkpoints back: the chain from a checkpoint down to its base."""

from __future__ import annotations

import itertools
import threading
from functools import cached_property

import torch

from effx_dist.checkpoint.format.block_files import BlockReader, OpenFiles
from effx_dist.checkpoint.format.chunks import ChunkDecoder, blocks_in_box
from effx_dist.checkpoint.format.manifest import (
    MAX_MANIFEST_BYTES,
    Delta,
    JointWeight,
    Manifest,
    Seeded,
    TensorRecord,
    manifest_checksum,
    manifest_from_bytes,
    sha256_line,
)
from effx_dist.checkpoint.format.manifest_checks import check_manifest
from effx_dist.checkpoint.storage.places import REMEDY, Folder, Location, location
from effx_dist.checkpoint.storage.steps import (
    MANIFEST,
    MANIFEST_SHA256,
    MERGED,
    newest_step,
    step_folder,
)
from effx_dist.core.excp import JointQuantiser
from effx_dist.errors import CheckpointNotFoundError, CorruptCheckpointError
from effx_dist.shard import Box


def read_manifest(folder: Folder) -> tuple[Manifest, str]:
    """A committed checkpoint's manifest, checked, and its checksum.

    Raises CheckpointNotFoundError where there is none, CorruptCheckpointError where it is damaged.
    """
    place = location(folder)
    path = place / MANIFEST
    if not place.has_file(MANIFEST):
        raise CheckpointNotFoundError(
            f"{folder}: holds no {MANIFEST}; it is not a committed checkpoint"
        )
    content = place.read_file(MANIFEST, MAX_MANIFEST_BYTES)
    if place.has_file(MANIFEST_SHA256):
        _check_sha256(place, content)
    manifest = manifest_from_bytes(content, path)
    check_manifest(manifest, path)
    return manifest, manifest_checksum(content, path)


def _check_sha256(place: Location, content: bytes) -> None:
    if place.read_file(MANIFEST_SHA256, 256) != sha256_line(content):
        raise CorruptCheckpointError(
            f"{place / MANIFEST}: does not have the SHA-256 that {MANIFEST_SHA256} states; one of the "
            "two was damaged or replaced. Restore it from a copy, or load an older step"
        )


class StepReader:
    """One checkpoint without its parents.

    Raises CorruptCheckpointError where it is damaged, or is not the one with the
    ``expected_checksum``.
    """

    def __init__(
        self,
        folder: Folder,
        expected_checksum: str | None = None,
        open_files: OpenFiles | None = None,
    ) -> None:
        self._open_files = open_files or OpenFiles()
        self.folder = location(folder)
        self.manifest, self.checksum = read_manifest(self.folder)
        if expected_checksum is not None and self.checksum != expected_checksum:
            raise CorruptCheckpointError(
                f"{folder}: is not the checkpoint that a later one was made against (manifest "
                f"{self.checksum}, needed {expected_checksum}); it was replaced. Load an older step"
            )
        self.files = [
            BlockReader(self.folder, record, self._open_files) for record in self.manifest.files
        ]
        self._decoder = ChunkDecoder(self.files, self.manifest.tensors, self._quantisers())

    @cached_property
    def declared_bytes(self) -> int:
        """Bytes of all its tensors when they are decoded, as the manifest says."""
        return sum(record.raw_bytes for record in self.manifest.tensors.values())

    @cached_property
    def merged(self) -> StepReader | None:
        """This step's weights as a base of their own, where `compact` has made one."""
        folder = self.folder / MERGED
        if not folder.has_file(MANIFEST):
            return None
        found = StepReader(folder, open_files=self._open_files)
        if found.manifest.merges != self.checksum:
            raise CorruptCheckpointError(
                f"{folder}: was made from another checkpoint than the one it lies in. Remove it"
            )
        return found

    def close(self) -> None:
        """Close all files; they open again when they are needed."""
        for file in self.files:
            file.close()
        if "merged" in vars(self) and self.merged is not None:  # it has been read, and so is open
            self.merged.close()

    def _quantisers(self) -> dict[str, JointQuantiser]:
        found = {}
        for name, record in self.manifest.tensors.items():
            if isinstance(record.coding, JointWeight):
                try:
                    found[name] = JointQuantiser.from_json(record.coding.quantiser)
                except ValueError as error:
                    raise CorruptCheckpointError(
                        f"{self.folder / MANIFEST}: quantiser of {name}: {error}"
                    ) from error
        return found

    def block(self, name: str, chunk: int, index: int, old: torch.Tensor) -> torch.Tensor:
        """The flat values of one block, given the parent's (which may be overwritten) where the
        tensor is stored as a difference."""
        return self._decoder.block(name, chunk, index, old)

    def boxes(self, name: str) -> list[Box]:
        """How a tensor is cut into chunks here."""
        return [chunk.box for chunk in self.manifest.tensors[name].chunks]


class ChainReader:
    """A checkpoint and the parents that its differences refer to, down to the base; opened as they
    are needed."""

    def __init__(self, folder: Folder) -> None:
        self._open_files = OpenFiles()
        self.steps = [StepReader(folder, open_files=self._open_files)]
        self.holds_seed = False
        """Whether the tensors that are read into hold the seeded initialisation, if there is one."""
        self._lock = threading.Lock()  # tensors may be read by several threads

    @property
    def top(self) -> StepReader:
        """The checkpoint itself."""
        return self.steps[0]

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The values of one box of one whole tensor, as its writer's references held them. Verifies
        what it reads."""
        record = self.top.manifest.tensors[self.resolve(name)]
        values = torch.empty(box.sizes, dtype=record.torch_dtype)
        self.read_into(name, box, values)
        return values

    def read_into(self, name: str, box: Box, values: torch.Tensor) -> None:
        """As :meth:`read`, into a host tensor of the box's sizes and the stored dtype.

        One streaming pass: each block is decoded from the base up before the next one, in
        ``values`` itself where it is a contiguous stretch there, so no second copy of the box is
        made. Where the base is a seeded initialisation, ``values`` must hold it.
        """
        name = self.resolve(name)
        needed = self._down_to_base(name)
        if isinstance(needed[-1].manifest.tensors[name].coding, Seeded):
            self._require_seed(name)
            needed.pop()
        for steps in _equally_cut(name, needed):
            for index, chunk in enumerate(steps[0].boxes(name)):
                common = box.intersect(chunk)
                if common is None:
                    continue
                inside = values[common.relative_to(box).slices]
                for block in blocks_in_box(chunk, common):
                    flat = block.load(inside)
                    for step in steps:
                        flat = step.block(name, index, block.index, flat)
                    block.store(flat, inside)

    def _require_seed(self, name: str) -> None:
        if not self.holds_seed:
            raise CorruptCheckpointError(
                f"{self.top.folder}: {name} is stored as differences to a seeded initialisation, "
                "which is not stored. Load it into a model initialised in the same way"
            )

    def seed_of(self, name: str) -> Seeded | None:
        """The seeded initialisation that a tensor builds upon, if it does."""
        name = self.resolve(name)
        if name not in self.top.manifest.tensors:
            return None
        coding = self._down_to_base(name)[-1].manifest.tensors[name].coding
        return coding if isinstance(coding, Seeded) else None

    def resolve(self, name: str) -> str:
        """The stored name of an alias (a tied weight), or the name itself."""
        return self.top.manifest.aliases.get(name, name)

    def record(self, name: str) -> TensorRecord | None:
        """The manifest's record of a tensor or alias, or None."""
        return self.top.manifest.tensors.get(self.resolve(name))

    def _down_to_base(self, name: str) -> list[StepReader]:
        """The steps that hold a tensor's differences, and below them the one that holds its
        values."""
        needed = []
        for depth in itertools.count():
            step = self._step(depth)
            record = step.manifest.tensors.get(name)
            wanted = self.top.manifest.tensors[name]
            if record is None or (record.shape, record.dtype) != (wanted.shape, wanted.dtype):
                raise CorruptCheckpointError(
                    f"{step.folder}: does not hold {name} as a later checkpoint refers to it"
                )
            is_difference = isinstance(record.coding, Delta | JointWeight)
            merged = step.merged if is_difference else None
            needed.append(merged or step)
            if merged is not None or not is_difference:
                break
        return needed

    def _step(self, depth: int) -> StepReader:
        with self._lock:
            step = self._opened(depth)
            _ = step.merged  # looked for here, because the lock is held here
            return step

    def _opened(self, depth: int) -> StepReader:
        while depth >= len(self.steps):
            below = self.steps[-1]
            parent = below.manifest.parent
            if parent is None:
                raise CorruptCheckpointError(
                    f"{below.folder}: refers to a parent that it does not name"
                )
            self.steps.append(self._open_parent(self._sibling(parent.name), parent.xxh3))
        return self.steps[depth]

    def _sibling(self, name: str) -> Location:
        folder = self.top.folder.parent / name
        if any(step.folder == folder for step in self.steps):
            raise CorruptCheckpointError(f"{folder}: its chain of parents is a circle")
        if folder.is_link() or not folder.has_file(MANIFEST):
            raise CorruptCheckpointError(
                f"{folder}: is missing (or a link), and {self.top.folder.name} is stored as differences to it. "
                "Restore it from a copy, or load an older step"
            )
        return folder

    def _open_parent(self, folder: Location, checksum: str) -> StepReader:
        try:
            return StepReader(folder, checksum, self._open_files)
        except CheckpointNotFoundError as error:
            raise CorruptCheckpointError(
                f"{folder}: has no manifest, and {self.top.folder.name} is stored as differences to "
                f"it. {REMEDY}"
            ) from error

    def close(self) -> None:
        """Close all files."""
        for step in self.steps:
            step.close()

    def __enter__(self) -> ChainReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _equally_cut(name: str, top_to_base: list[StepReader]) -> list[list[StepReader]]:
    """The steps from the base up, in runs that cut a tensor into the same chunks."""
    runs: list[list[StepReader]] = []
    for step in reversed(top_to_base):
        if runs and runs[-1][0].boxes(name) == step.boxes(name):
            runs[-1].append(step)
        else:
            runs.append([step])
    return runs


def checkpoint_folder(path: Folder, step: int | None = None) -> Location:
    """The folder of the checkpoint at ``path`` (``.../step-N``), or of that of ``step`` (default: the
    newest) in a folder of them. Raises CheckpointNotFoundError."""
    folder = location(path)
    if step is not None:
        return step_folder(folder, step)
    if folder.has_file(MANIFEST):
        return folder
    return step_folder(folder, newest_step(folder))


def open_checkpoint(path: Folder, step: int | None = None) -> ChainReader:
    """The checkpoint in :func:`checkpoint_folder`. Raises as :class:`StepReader` does, and
    CheckpointNotFoundError."""
    return ChainReader(checkpoint_folder(path, step))
