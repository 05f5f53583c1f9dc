"""Megatron's own calls, ``dist_checkpointing.save`` and ``load``, on this library's checkpoints."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    extract_matching_values,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import (
    AsyncSaveShardedStrategy,
    LoadShardedStrategy,
    StrategyAction,
    register_default_strategy,
)
from megatron.core.dist_checkpointing.strategies.common import (
    TorchCommonLoadStrategy,
    TorchCommonSaveStrategy,
)

from effx_dist.checkpoint import PendingSave
from effx_dist.checkpoint.format.reader import open_checkpoint
from effx_dist.checkpoint.state.matching import MODEL
from effx_dist.checkpoint.state.training_state import run_values
from effx_dist.checkpoint.tools.convert.megatron_llama import MEGATRON
from effx_dist.engines.megatron.checkpoint import JobCheckpoints
from effx_dist.engines.megatron.local_tensors import LocalTensor
from effx_dist.errors import ConfigError, EffxError

BACKEND, VERSION = "effx", 1
"""What Megatron writes into ``metadata.json`` of a checkpoint that the strategies made."""
CHAIN = "effx"
"""The folder beside Megatron's own that holds the compressed checkpoints of all iterations."""
_SHARDED = (ShardedTensor, ShardedObject, ShardedTensorFactory)
KEYS = "sharded_keys"
"""Where a checkpoint keeps the keys that Megatron gave the tensors, of all ranks."""
_OPTIMIZER_KEY = re.compile(r"(chained_[0-9]+\.)?optimizer\.")
_NUMBER = re.compile(r"[0-9]+")
_POLL_S = 0.2
_OBJECTS = TorchCommonLoadStrategy()


class ExcpSaveStrategy(AsyncSaveShardedStrategy):  # type: ignore[misc]  # Megatron has no annotations
    """For ``dist_checkpointing.save(sharded_state_dict, root/iter_0000100, sharded_strategy=...)``.

    Tensors of the model and the optimizer are written as :meth:`Handle.save_checkpoint` writes them, into
    the chain ``root/effx``; everything else (common state, sharded objects such as random states) by
    Megatron, into ``root/iter_0000100``. What of the optimizer is in the state dict is not looked at, so
    that the format that costs nothing to make is the best at every layout:
    ``metadata={"distrib_optim_sharding_type": "dp_reshardable"}``.

    ``save`` returns once all is committed; with ``async_sharded_save=True`` it returns after the copy of
    the state, and Megatron's AsyncCallsQueue finalizes once it is committed.
    """

    def __init__(self, checkpoints: JobCheckpoints) -> None:
        super().__init__(BACKEND, VERSION)
        self._checkpoints = checkpoints

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> AsyncRequest:
        pending = self._begin(sharded_state_dict, checkpoint_dir)
        marker = _marker_until(pending)
        return AsyncRequest(_wait_for, (marker,), [pending.wait])

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        self._begin(sharded_state_dict, checkpoint_dir).wait()

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def _begin(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> PendingSave:
        layout = self._checkpoints.layout
        others, _ = extract_matching_values(
            sharded_state_dict, lambda v: isinstance(v, ShardedObject) and not _of_optimizer(v)
        )

        def prepare() -> tuple[Path, int]:
            _refuse_strangers(sharded_state_dict, layout.local_tensors)
            place = chain_of(checkpoint_dir)
            TorchCommonSaveStrategy(BACKEND, VERSION).save_sharded_objects(
                others, str(checkpoint_dir)
            )
            return place

        chain, iteration = layout.group.everywhere(prepare)
        own = sorted(
            value.key
            for value in nested_values(sharded_state_dict)
            if isinstance(value, ShardedTensor)
            or (isinstance(value, ShardedObject) and _of_optimizer(value))
        )
        keys = sorted({key for row in layout.group.all_gather_object(own) for key in row})
        return self._checkpoints.save_checkpoint(chain, iteration, described={KEYS: keys})


class ExcpLoadStrategy(LoadShardedStrategy):  # type: ignore[misc]
    """For ``dist_checkpointing.load(sharded_state_dict, root/iter_0000100, sharded_strategy=...)``.

    Model and, where the state dict asks for the optimizer, optimizer are filled in place, at any layout;
    ``load_state_dict`` of both may then be called as usual: it changes nothing, as all has been loaded.
    """

    def __init__(self, checkpoints: JobCheckpoints) -> None:
        self._checkpoints = checkpoints
        self._is_lenient = False

    def check_backend_compatibility(self, loaded_backend: str) -> None:
        if loaded_backend != BACKEND:
            raise ConfigError(
                f"metadata.json: backend {loaded_backend!r} is not {BACKEND!r}; load this checkpoint "
                "without a sharded_strategy, as Megatron wrote it"
            )

    def check_version_compatibility(self, loaded_version: int) -> None:
        if loaded_version > VERSION:
            raise ConfigError(
                f"metadata.json: version {loaded_version} is newer than {VERSION}; update effx-dist"
            )

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def load(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        chain, iteration = chain_of(checkpoint_dir)
        layout = self._checkpoints.layout
        # Ranks that hold no part of the optimizer's have nothing of it to ask for.
        asked = any(
            isinstance(value, ShardedTensor | ShardedObject) and _of_optimizer(value)
            for value in nested_values(sharded_state_dict)
        )
        wants_optimizer = any(layout.group.all_gather_object(asked))
        is_lenient, self._is_lenient = self._is_lenient, False
        self._checkpoints.load_checkpoint(
            chain,
            iteration=iteration,
            load_optimizer=wants_optimizer,
            strict=not is_lenient and self._holds_no_more(chain, iteration),
        )
        if wants_optimizer:
            tensors = _tensors(sharded_state_dict)
            returned = [sharded.data for sharded in tensors if _of_optimizer(sharded)]
            for optimizer in layout.optimizers:
                _ignore_what_is_there(optimizer, returned)

        def value_of(value: Any) -> Any:
            if isinstance(value, ShardedObject) and not _of_optimizer(value):
                return _OBJECTS.load_sharded_objects({"it": value}, str(checkpoint_dir))["it"]
            return value.data if isinstance(value, ShardedTensor | ShardedObject) else value

        return layout.group.everywhere(lambda: dict_list_map_inplace(value_of, sharded_state_dict))

    def load_sharded_metadata(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        """What Megatron compares with the state dict for every ``strict`` but "assume_ok_unexpected". What
        it then finds to differ it raises, logs or returns itself, and the load that follows leaves alone
        what only one side has."""
        self._is_lenient = True
        objects: dict[str, Any] = _OBJECTS.load_sharded_metadata(checkpoint_dir)
        return objects | self.load_tensors_metadata(checkpoint_dir)

    def load_tensors_metadata(self, checkpoint_dir: str | Path) -> dict[str, ShardedTensor]:
        """Outlines of the tensors with Megatron's own keys, by these and by the names here.

        The optimizer's keys depend on the format and the layout that are asked for, and any can be filled:
        they are those that the optimizer was last asked for, where the checkpoint holds an optimizer.
        """
        chain, iteration = chain_of(checkpoint_dir)
        with open_checkpoint(chain, iteration) as opened:
            manifest = opened.top.manifest
        told = run_values(manifest).extra.get(MEGATRON, {})
        saved = told.get(KEYS)
        if saved is None:
            raise ConfigError(
                f"{checkpoint_dir}: does not say by which keys Megatron knew its tensors, as no release before "
                'kept them; load it with strict="assume_ok_unexpected"'
            )
        keys = [key for key in saved if not _OPTIMIZER_KEY.match(key)]
        if len(keys) < len(saved):
            keys += _asked.get(self._checkpoints) or [key for key in saved if key not in keys]
        found = {key: _outline(key, (), torch.float32) for key in keys}
        for name, record in manifest.tensors.items():
            key = name.removeprefix(f"{MODEL}.")
            if key in found:  # not stacked with those of other layers
                found[name] = _outline(key, tuple(record.shape), record.torch_dtype)
        return found

    def _holds_no_more(self, chain: Path, iteration: int) -> bool:
        """Whether the job has every tensor of the model that the checkpoint holds: Megatron ignores those that
        are not asked for."""
        own = {f"{MODEL}.{tensor.name}" for tensor in self._checkpoints.layout.known_tensors}

        def look() -> bool:
            with open_checkpoint(chain, iteration) as opened:
                names = opened.top.manifest.tensors
            return all(name in own for name in names if name.startswith(f"{MODEL}."))

        return all(self._checkpoints.layout.group.all_gather_object(_or_true(look)))


_asked: WeakKeyDictionary[JobCheckpoints, list[str]] = WeakKeyDictionary()
"""Keys of the optimizer's tensors in the state dict that it gave last, of this rank."""


def register(checkpoints: JobCheckpoints, optimizer: Any) -> None:
    """Let ``dist_checkpointing.load`` find the strategy by what ``metadata.json`` says, and note for which
    tensors the optimizer asks. No communication is performed."""
    register_default_strategy(
        StrategyAction.LOAD_SHARDED, BACKEND, VERSION, ExcpLoadStrategy(checkpoints)
    )
    if optimizer is None:
        return
    of_optimizer = optimizer.sharded_state_dict

    def sharded_state_dict(*args: Any, **kwargs: Any) -> Any:
        found = of_optimizer(*args, **kwargs)
        keys = {
            value.key
            for value in nested_values(found)
            if isinstance(value, _SHARDED) and _of_optimizer(value)
        }
        _asked[checkpoints] = sorted(keys)
        return found

    optimizer.sharded_state_dict = sharded_state_dict


def _or_true(look: Callable[[], bool]) -> bool:
    """The answer of ``look``; True where it fails, because the load that follows raises what is wrong."""
    try:
        return look()
    except EffxError:
        return True


def chain_of(checkpoint_dir: str | Path) -> tuple[Path, int]:
    """Where the strategies keep a checkpoint of Megatron's: the chain's folder, and the iteration, which
    is the last number in the folder's name. Raises ConfigError where there is none."""
    path = Path(checkpoint_dir)
    numbers = _NUMBER.findall(path.name)
    if not numbers:
        raise ConfigError(
            f"checkpoint_dir={str(path)!r}: its name must hold the iteration, as iter_0000100 does"
        )
    return path.parent / CHAIN, int(numbers[-1])


def _tensors(sharded_state_dict: Any) -> list[ShardedTensor]:
    return [
        value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)
    ]


def _of_optimizer(sharded: ShardedTensor | ShardedObject | ShardedTensorFactory) -> bool:
    return _OPTIMIZER_KEY.match(sharded.key) is not None


def _refuse_strangers(sharded_state_dict: Any, local_tensors: Sequence[LocalTensor]) -> None:
    """What is neither the model's nor the optimizer's would be lost."""
    ranges = [_memory(local.tensor) for local in local_tensors]
    for sharded in _tensors(sharded_state_dict):
        if not _of_optimizer(sharded) and sharded.data is not None:
            first, last = _memory(sharded.data)
            if not any(start <= first and last <= stop for start, stop in ranges):
                raise ConfigError(
                    f"{sharded.key}: is no tensor of the model chunks that effx_dist.megatron.attach was "
                    "given; save it as a ShardedObject, or attach the model that holds it"
                )


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def _outline(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> ShardedTensor:
    zeros = (0,) * len(shape)
    ones = (1,) * len(shape)
    return ShardedTensor(name, None, dtype, shape, shape, zeros, ones)


def _ignore_what_is_there(optimizer: Any, returned: Sequence[torch.Tensor]) -> None:
    """Megatron's next ``load_state_dict`` of a state dict with a tensor that a load here has ``returned``
    changes nothing: all of it was loaded, and its own way back would set the number of steps to that of an
    optimizer just made. One of another state dict is Megatron's own again."""
    own = {id(tensor): tensor for tensor in returned}  # kept alive: no other has its id meanwhile

    def load_state_dict(state_dict: Mapping[str, Any]) -> None:
        del optimizer.load_state_dict  # the class's is back
        tensors = [value for value in nested_values(state_dict) if isinstance(value, torch.Tensor)]
        if tensors and not any(id(tensor) in own for tensor in tensors):
            optimizer.load_state_dict(state_dict)

    optimizer.load_state_dict = load_state_dict


def _marker_until(pending: PendingSave) -> str:
    """Path of an empty file that is there until a save has ended, for processes that cannot see it."""
    descriptor, path = tempfile.mkstemp(prefix="effx-save-")
    os.close(descriptor)
    pending.on_end(lambda: Path(path).unlink(missing_ok=True))
    return path


def _wait_for(marker: str) -> None:
    """Wait, in the child process that Megatron starts for an asynchronous save, until the save has ended."""
    parent = os.getppid()
    while os.path.exists(marker) and os.getppid() == parent:
        time.sleep(_POLL_S)
