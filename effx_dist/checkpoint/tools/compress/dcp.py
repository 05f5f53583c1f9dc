"""Folders of torch.distributed.checkpoint. Nothing in them is unpickled but the classes that describe the
tensors, and plain values."""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import (
    BytesStorageMetadata,
    DefaultLoadPlanner,
    FileSystemReader,
    LoadPlan,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from effx_dist.checkpoint.format.manifest import short
from effx_dist.checkpoint.saving.drive import drive_load
from effx_dist.checkpoint.state.fragment import Fragment
from effx_dist.checkpoint.state.joints import TensorFacts
from effx_dist.checkpoint.tools.compress.content import (
    PlainContent,
    ReadOptions,
    SourceTensor,
    is_same,
    logger,
)
from effx_dist.checkpoint.tools.compress.tree import MODEL_KEYS, OPTIMIZER_KEYS, content_of_tree
from effx_dist.errors import ConfigError, CorruptCheckpointError
from effx_dist.shard import Box

METADATA = ".metadata"
_DESCRIPTIONS = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}
_PASSED_OVER = {
    "torch.distributed.checkpoint.planner": {
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
    }
}
"""What torch's plan caching and Megatron keep in the metadata beside the description (``all_local_plans``)."""
_OF_OPTIMIZER = re.compile(r"(chained_[0-9]+\.)?(optimizer|optim)\.")
"""Keys of Megatron's optimizers, which are in the folder beside the model's."""


def open_dcp(path: Path, options: ReadOptions) -> PlainContent:
    """What ``dcp.save`` was given: a model's state dict, or one below ``model`` and an optimizer's below
    ``optim``, as get_model_state_dict and get_optimizer_state_dict have them. Of any other tree the
    tensors keep their names. Raises ConfigError, CorruptCheckpointError, OSError.
    """
    reader = _Reader(path)
    metadata = reader.read_metadata()
    paths = dict(metadata.planner_data or {})
    tree: dict[Any, Any] = {}
    for fqn, entry in metadata.state_dict_metadata.items():
        place = paths.get(fqn) or _place_of(fqn)
        is_optimizers = any(key in place[:2] for key in OPTIMIZER_KEYS) or _OF_OPTIMIZER.match(fqn)
        if options.weights_only and is_optimizers:
            continue
        if isinstance(entry, TensorStorageMetadata):
            set_element(tree, place, _tensor(reader, fqn, entry))
        elif isinstance(entry, BytesStorageMetadata):
            found = reader.plain_value(fqn)
            if found is not _UNREAD:
                set_element(tree, place, found)
    if not _has_model(tree):
        tree = dict(_flat(tree))
    return _with_tied(content_of_tree(tree, {}, path, options))


def _with_tied(content: PlainContent) -> PlainContent:
    """A tied tensor is stored once for each of its names, of which the optimizer knows one. One that it
    does not know, and that has exactly the values of one that it knows, is another name of that one."""
    if content.optimizer is None:
        return content
    trained = {name for group in content.optimizer.group_parameters for name in group}
    first = {name: tensor for name, tensor in content.model.items() if name in trained}
    tied = {}
    for name, tensor in content.model.items():
        if name not in trained and len(tensor.facts.shape) > 1:
            same = (n for n, other in first.items() if is_same(tensor, other))
            if (other_name := next(same, None)) is not None:
                tied[name] = other_name
    model = {name: tensor for name, tensor in content.model.items() if name not in tied}
    return replace(content, model=model, tied=tied)


def _tensor(reader: _Reader, fqn: str, entry: TensorStorageMetadata) -> SourceTensor:
    facts = TensorFacts(entry.properties.dtype, tuple(entry.size))

    def read(box: Box) -> torch.Tensor:
        values = torch.empty(box.sizes, dtype=facts.dtype)
        if values.numel():
            reader.fill(fqn, Fragment(facts.shape, facts.dtype, [(box, values)]))
        return values

    return SourceTensor(facts, read)


_UNREAD = object()


class _Reader(FileSystemReader):
    """The stock reader, but for its way with pickles."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._folder = path
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = self._checked(_load_metadata(self._folder / METADATA))
            self.set_up_storage_reader(self._metadata, is_coordinator=True)
        return self._metadata

    def _checked(self, metadata: Any) -> Metadata:
        """Raises CorruptCheckpointError for what describes no tensors, or files outside the folder."""
        data = getattr(metadata, "storage_data", None)
        entries = getattr(metadata, "state_dict_metadata", None)
        if not isinstance(data, dict) or not isinstance(entries, dict) or not entries:
            raise CorruptCheckpointError(f"{self._folder / METADATA}: describes no tensors")
        for entry in data.values():
            name = PurePath(str(entry.relative_path))
            if name.is_absolute() or ".." in name.parts:
                raise CorruptCheckpointError(
                    f"{self._folder / METADATA}: {short(str(name))} lies outside the folder"
                )
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        found: Metadata = metadata
        return found

    def fill(self, fqn: str, fragment: Fragment) -> None:
        """Read a tensor's boxes in place."""
        try:
            drive_load({fqn: fragment}, self)
        except OSError:
            raise
        except (RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
            raise self._damaged(fqn, error) from error

    def plain_value(self, fqn: str) -> Any:
        """An entry that is no tensor, or _UNREAD for one that is more than a plain value."""
        nothing = torch.Size((0,))
        index = MetadataIndex(fqn)
        item = ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)
        planner = _ValuePlanner()
        try:
            self.read_data(LoadPlan([item]), planner)
        except pickle.UnpicklingError as error:
            logger.warning("%s: left out: %s: %s", self._folder, fqn, short(str(error)))
            return _UNREAD
        except OSError:
            raise
        except (RuntimeError, EOFError, ValueError, LookupError) as error:
            raise self._damaged(fqn, error) from error
        return planner.value

    def _damaged(self, fqn: str, error: Exception) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self._folder}: {fqn} cannot be read: {type(error).__name__}: {short(str(error))}"
        )


class _ValuePlanner(DefaultLoadPlanner):
    """Takes one value, without running anything."""

    value: Any = _UNREAD

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.value = torch.load(value, map_location="cpu", weights_only=True)


class _PassedOver:
    """Stands for an object that is not needed: takes whatever state a pickle gives it, and keeps none."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _RefusedError(Exception):
    """A pickle names what it need not."""


class _Descriptions(pickle.Unpickler):
    """Unpickles what describes a checkpoint, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _DESCRIPTIONS.get(module, ()):
            return super().find_class(module, name)
        if name in _PASSED_OVER.get(module, ()):
            return _PassedOver
        found = getattr(torch, name, None) if module == "torch" else None
        if found is torch.Size or isinstance(found, torch.dtype):
            return found
        raise _RefusedError(f"{module}.{name}")


def _load_metadata(path: Path) -> Any:
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            return _Descriptions(file).load()
    except _RefusedError as error:
        raise ConfigError(
            f"{path}: names {short(str(error))}, which describes no tensor; nothing of it was run. A folder "
            "of torch.distributed.checkpoint does not need it"
        ) from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CorruptCheckpointError(f"{path}: cannot be read: {short(str(error))}") from error


def _place_of(fqn: str) -> tuple[str, ...]:
    """The path of an entry of a checkpoint that does not say it: as dcp.save names a model's and an
    optimizer's entries."""
    top, _, rest = fqn.partition(".")
    if top in MODEL_KEYS and rest:
        return top, rest
    if top in OPTIMIZER_KEYS and rest.startswith("state."):
        name, _, key = rest.removeprefix("state.").rpartition(".")
        return top, "state", name, key
    return (fqn,)


def _has_model(tree: Mapping[Any, Any]) -> bool:
    tops = [tree, *(tree.values() if len(tree) == 1 else ())]
    return any(
        isinstance(top, Mapping) and isinstance(top.get(k), Mapping)
        for top in tops
        for k in MODEL_KEYS
    )


def _flat(tree: Any, path: str = "") -> Any:
    """The tensors of a tree by their dotted paths."""
    if isinstance(tree, SourceTensor):
        yield path, tree
    elif isinstance(tree, Mapping | list):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, inner in items:
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
