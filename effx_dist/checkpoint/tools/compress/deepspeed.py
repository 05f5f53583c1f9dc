"""Folders that DeepSpeed's own save_checkpoint wrote, with ZeRO 1 to 3 or without; DeepSpeed itself is not
needed.

The master weights and moments of a ZeRO run lie in flat vectors, a partition of them in each rank's file.
Under ZeRO 1 and 2 a group's partitions, one after another, are its parameters in the order of
``param_shapes``; under ZeRO 3 every rank's flat vectors hold its part of each parameter in that order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch

from effx_dist.checkpoint.state.joints import TensorFacts
from effx_dist.checkpoint.state.names import plain_name
from effx_dist.checkpoint.state.torch_state import group_options
from effx_dist.checkpoint.tools.compress.content import (
    PlainContent,
    PlainOptimizer,
    ReadOptions,
    SourceTensor,
    keepable,
)
from effx_dist.checkpoint.tools.compress.torch_file import StandIn, as_sources, load_torch
from effx_dist.checkpoint.tools.compress.tree import names_of_groups, optimizer_of
from effx_dist.checkpoint.tools.convert.universal import ENGINE
from effx_dist.errors import ConfigError, CorruptCheckpointError
from effx_dist.shard import Box

MODEL_STATES = "_model_states.pt"
_OPTIM_STATES = "_optim_states.pt"
_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "dp_world_size", "mp_world_size")
_OWN_KEYS = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes"),
    *("shared_params", "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd"),
    *("sparse_tensor_module_names", "checkpoint_parallel_dimensions", "ds_config", "ds_version"),
    *_COUNTERS,
}
SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
Flats = Sequence[torch.Tensor]
"""Vectors that are one vector, one after another."""


class _Record:
    """Stands in for a class of DeepSpeed's: takes the attributes that were saved."""


STAND_INS: tuple[StandIn, ...] = (
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Record, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Record, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Record, "deepspeed.utils.tensor_fragment.fragment_address"),
)
"""The classes that DeepSpeed 0.19.8 pickles beside tensors and plain values."""


def open_deepspeed(path: Path, options: ReadOptions) -> PlainContent:
    """Master weights, moments, buffers, frozen parameters and counters. Raises ConfigError for
    checkpoints of pipelines, tensor and expert parallelism; CorruptCheckpointError, OSError."""
    models = [load_torch(file, options.trust, STAND_INS) for file in _files(path, MODEL_STATES)]
    files = _files(path, _OPTIM_STATES)
    first = models[0]
    if not isinstance(first, dict) or not {"module", "global_steps"} <= first.keys():
        raise CorruptCheckpointError(f"{path}: its {MODEL_STATES[1:]} are not DeepSpeed's")
    extra = {key: value for key, value in first.items() if key not in _OWN_KEYS}
    counters = {key: first[key] for key in (*_COUNTERS, "ds_version") if key in first}
    extra = {**keepable(extra, path), ENGINE: counters}
    scheduler = first.get("lr_scheduler")
    stateful = keepable({"lr_scheduler": scheduler} if scheduler else {}, path)
    if not files:
        return _without_zero(path, first, options, stateful, extra)
    ranks = [load_torch(file, options.trust, STAND_INS)["optimizer_state_dict"] for file in files]
    zero = _Zero(path, models, ranks)
    optimizer = None
    if not options.weights_only:
        optimizer = zero.optimizer()
        stateful |= _loss_scaler(vars(ranks[0].get("loss_scaler", _Record())))
    tied = {plain_name(other): plain_name(name) for other, name in first["shared_params"].items()}
    model = {plain_name(name): tensor for name, tensor in zero.model()}
    return PlainContent(model, tied, {}, optimizer, stateful, extra)


def _files(path: Path, ending: str) -> list[Path]:
    """The ranks' files with this ending, in the order of the ranks."""
    found = sorted(path.glob(f"*{ending}"), key=lambda file: list(map(int, _numbers(file.name))))
    for file in found:
        other_rank = re.search(r"mp_rank_0*[1-9]", file.name)
        if other_rank or "expert" in file.name or not re.search(r"mp_rank_", file.name):
            raise ConfigError(
                f"{file}: is of a pipeline, tensor-parallel or expert-parallel run, which is not covered; "
                "convert it with DeepSpeed's own tools, and compress what comes out"
            )
    if any(path.glob("layer_*")):
        raise ConfigError(f"{path}: is of a pipeline run, which is not covered")
    return found


def _numbers(name: str) -> list[str]:
    return re.findall(r"\d+", name.removeprefix("bf16").removeprefix("fp16"))


def _loss_scaler(scaler: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A dynamic loss scale under the name that a DeepSpeed run's checkpoints have here."""
    is_dynamic = scaler.get("dynamic", scaler.get("dynamic_loss_scale", False))
    found = {key: scaler[key] for key in SCALER_KEYS if key in scaler}
    return {"loss_scaler": found} if is_dynamic else {}


def _without_zero(
    path: Path,
    first: Mapping[str, Any],
    options: ReadOptions,
    stateful: dict[str, Any],
    extra: dict[str, Any],
) -> PlainContent:
    """The engine without ZeRO: a torch optimizer, in 16 bits with master weights beside the model."""
    tied: dict[str, str] = {}
    module = as_sources(first["module"], path, tied)
    tensors = {plain_name(n): t for n, t in module.items() if isinstance(t, SourceTensor)}
    tied = {plain_name(other): plain_name(name) for other, name in tied.items()}
    model = {name: tensor for name, tensor in tensors.items() if name not in tied}
    content = PlainContent(model, tied, {}, None, stateful, extra)
    saved = first.get("optimizer")
    if saved is None or options.weights_only:
        return content
    inner = saved.get("optimizer_state_dict", saved)
    groups = inner["param_groups"]
    masters: dict[str, SourceTensor] = {}
    names = options.param_names
    if "fp32_groups" in saved:
        flat = [tensor for group in saved["fp32_groups"] for tensor in group]
        state = {
            number: {"master": SourceTensor.of(tensor), **inner["state"].get(number, {})}
            for number, tensor in enumerate(flat)
        }
        names = names_of_groups(groups, state, model, names, path)
        masters = {
            plain_name(name): SourceTensor.of(tensor)
            for name, tensor in zip(chain.from_iterable(names), flat, strict=True)
        }
    optimizer = optimizer_of(as_sources(inner, path, {}), content, names, path)
    stateful |= _loss_scaler(saved)
    return PlainContent(model | masters, tied, {}, optimizer, stateful, extra)


class _Zero:
    """The files of all ranks of a ZeRO run."""

    def __init__(
        self, path: Path, models: Sequence[dict[str, Any]], ranks: Sequence[dict[str, Any]]
    ) -> None:
        self._path = path
        self._models = models
        self._ranks = ranks
        try:
            self._is_stage3 = int(ranks[0]["zero_stage"]) == 3
            count = ranks[0]["partition_count"]
            self._shapes: list[Mapping[str, torch.Size]] = list(models[0]["param_shapes"])
        except (LookupError, TypeError, ValueError) as error:
            raise CorruptCheckpointError(f"{path}: its optimizer states are not ZeRO's") from error
        num_ranks = max(count) if isinstance(count, list) else count
        if num_ranks != len(ranks) or (self._is_stage3 and num_ranks != len(models)):
            raise CorruptCheckpointError(
                f"{path}: was saved by {num_ranks} ranks; it has {len(ranks)} files *{_OPTIM_STATES} and "
                f"{len(models)} *{MODEL_STATES}"
            )
        inner = "optimizer_state_dict" if self._is_stage3 else "base_optimizer_state"
        self._base: list[Any] = [rank[inner] for rank in ranks]
        weights = "fp32_flat_groups" if self._is_stage3 else "single_partition_of_fp32_groups"
        self._masters = dict(self._sources([list(rank[weights]) for rank in ranks]))

    def model(self) -> Iterator[tuple[str, SourceTensor]]:
        """Master weights, then frozen parameters, then buffers and, but for ZeRO 3, whatever else the
        module holds: ZeRO 1 keeps its frozen parameters there alone."""
        yield from self._masters.items()
        first = self._models[0]
        for name, shape in (first.get("frozen_param_shapes") or {}).items():
            parts = [model["frozen_param_fragments"][name] for model in self._models]
            flats = [part.reshape(-1) for part in (parts if self._is_stage3 else parts[:1])]
            yield name, _source(flats, shape)
        known = {*self._masters, *(first.get("frozen_param_shapes") or ()), *first["shared_params"]}
        module = first["module"]
        for name in first["buffer_names"] if self._is_stage3 else module:
            if name not in known and isinstance(module[name], torch.Tensor):
                yield name, SourceTensor.of(module[name])

    def optimizer(self) -> PlainOptimizer:
        """The optimizer's state by the names of the parameters, as the adapter's own checkpoints have it. What a flat
        vector has only one of, such as its number of steps, is given to each of its parameters."""
        states = [self._states_of(base) for base in self._base]
        by_name: dict[str, dict[str, Any]] = {plain_name(name): {} for name in self._masters}
        for key in [*{key: None for state in states[0] for key in state}]:
            values: list[list[Any]] = [[state.get(key) for state in of_rank] for of_rank in states]
            if all(isinstance(v, torch.Tensor) and v.dim() == 1 for row in values for v in row):
                for name, source in self._sources(values):
                    by_name[plain_name(name)][key] = source
            else:
                self._share(key, values[0], by_name)
        base = self._base[0]
        groups = base["param_groups"] if isinstance(base, Mapping) else []
        vectors = [number for group in groups for number in group["params"]]
        if vectors != list(range(len(self._shapes))):
            raise ConfigError(
                f"{self._path}: its optimizer states do not say which parameter group a flat vector is of, "
                "as elastic checkpoints do not; compress the weights alone (--weights-only)"
            )
        by_group = [
            [plain_name(name) for number in group["params"] for name in self._shapes[number]]
            for group in groups
        ]
        return PlainOptimizer(by_name, by_group, group_options(groups))

    def _states_of(self, base: Any) -> list[dict[str, Any]]:
        """The states of a rank's flat vectors, in their order."""
        if isinstance(base, Mapping):
            state = base["state"]
            return [state[number] for number in sorted(state)]
        return list(base)

    def _share(self, key: str, values: Sequence[Any], by_name: dict[str, dict[str, Any]]) -> None:
        """Give every parameter an entry that its flat vector has only one of."""
        for value, group in zip(values, self._shapes, strict=True):
            for name in group:
                entry: Any = value
                if isinstance(value, torch.Tensor | int | float) and not isinstance(value, bool):
                    entry = SourceTensor.of(torch.tensor(float(value), dtype=torch.float32))
                by_name[plain_name(name)][key] = entry

    def _sources(self, by_rank: Sequence[Flats]) -> Iterator[tuple[str, SourceTensor]]:
        """The values of every parameter, cut out of the ranks' flat vectors."""
        if self._is_stage3:
            yield from self._of_stage3(by_rank)
            return
        if any(len(flats) != len(self._shapes) for flats in by_rank):
            raise self._damaged("its flat vectors are not those of its parameter groups")
        paddings = self._ranks[0].get("param_alignment_paddings")
        for index, group in enumerate(self._shapes):
            flats = [flats[index] for flats in by_rank]
            start = 0
            for place, (name, shape) in enumerate(group.items()):
                numel = math.prod(shape)
                self._check_place(name, index, start, [flat.numel() for flat in flats])
                yield name, _source(self._cut(flats, start, start + numel), shape)
                start += numel + (paddings[index][place] if paddings is not None else 0)

    def _of_stage3(self, by_rank: Sequence[Flats]) -> Iterator[tuple[str, SourceTensor]]:
        start = 0
        for name, shape in (item for group in self._shapes for item in group.items()):
            part = math.ceil(math.prod(shape) / len(by_rank))
            cut = [self._cut(flats, start, start + part) for flats in by_rank]
            yield name, _source([piece for pieces in cut for piece in pieces], shape)
            start += part

    def _cut(self, flats: Flats, start: int, stop: int) -> list[torch.Tensor]:
        found = _cut(flats, start, stop)
        if sum(piece.numel() for piece in found) != stop - start:
            raise self._damaged(f"its flat vectors end before element {stop}")
        return found

    def _check_place(self, name: str, group: int, start: int, lengths: Sequence[int]) -> None:
        """Where a parameter's first element lies must be where the files themselves say it does."""
        ends = list(accumulate(lengths))
        rank = next((rank for rank, end in enumerate(ends) if start < end), None)
        mappings = self._ranks[rank].get("param_slice_mappings") if rank is not None else None
        if rank is None or not mappings or name not in mappings[group]:
            return
        expected = start - (ends[rank] - lengths[rank])
        if mappings[group][name].start != expected:
            raise self._damaged(f"{name} lies at {mappings[group][name].start}, not at {expected}")

    def _damaged(self, reason: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{self._path}: {reason}")


def _cut(flats: Flats, start: int, stop: int) -> list[torch.Tensor]:
    """The elements ``[start, stop)`` of vectors one after another, as views."""
    found, begin = [], 0
    for flat in flats:
        first, last = max(start - begin, 0), min(stop - begin, flat.numel())
        if first < last:
            found.append(flat[first:last])
        begin += flat.numel()
    return found


def _source(flats: Flats, shape: Sequence[int]) -> SourceTensor:
    """A tensor whose elements, in row-major order, are the first of these vectors."""
    dtype = flats[0].dtype if flats else torch.float32

    def read(box: Box) -> torch.Tensor:
        rows = (box.offsets[0], box.sizes[0]) if shape else (0, 1)
        row = math.prod(shape[1:])
        pieces = _cut(flats, rows[0] * row, (rows[0] + rows[1]) * row)
        values = (
            pieces[0] if len(pieces) == 1 else torch.cat(pieces or [torch.empty(0, dtype=dtype)])
        )
        whole = values.view(rows[1], *shape[1:]) if shape else values.view(())
        inside = (slice(None), *box.slices[1:]) if shape else ()
        return whole[inside]

    return SourceTensor(TensorFacts(dtype, tuple(shape)), read)
