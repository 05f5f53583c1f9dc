"""A sampler's state as JSON values and rows of whole tensors, and the way back at any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from effx_dist.data.scores import ScoreBook
from effx_dist.data.slots import Ranks, Span
from effx_dist.errors import ConfigError, LayoutMismatchError
from effx_dist.shard import LocalRows

VERSION = 1
_ROWS = ("scores", "fresh_losses")
_SPAN = ("num_kept", "num_slots", "end_slot", "global_batch_size")


@dataclass
class Counters:
    """What a sampler counts over the whole run, equal on all ranks."""

    samples_saved: int = 0
    num_nonfinite: int = 0
    finished_epochs: int = 0


_COUNTS = ("epoch", "position", *(field.name for field in fields(Counters)), "num_samples")


@dataclass(frozen=True, eq=False)
class SamplerState:
    """Where a run stands: everything that the plans of this and all later epochs follow from."""

    config: dict[str, Any]
    counters: Counters
    epoch: int
    position: int
    """Slots of the epoch that all ranks together have consumed."""
    pruned: bool
    span: Span | None
    """The slots that the epoch was planned over; None where no epoch was planned yet."""
    book: ScoreBook

    def to_dict(self, ranks: Ranks) -> dict[str, Any]:
        """JSON values, and this rank's scores as rows of the whole. Copies; no communication is performed."""
        span = self.span
        of_span = (span.num_kept, span.num_slots, span.end, span.global_batch) if span else [0] * 4
        return {
            "version": VERSION,
            "num_samples": ranks.owners.num_samples,
            "config": dict(self.config),
            "epoch": self.epoch,
            "position": self.position,
            "pruned": self.pruned,
            **dict(zip(_SPAN, of_span, strict=True)),
            **asdict(self.counters),
            "scores": _rows(self.book.scores, ranks),
            "fresh_losses": _rows(self.book.fresh, ranks),
        }

    @classmethod
    def from_dicts(
        cls, states: Sequence[Mapping[str, Any]], ranks: Ranks, config: dict[str, Any]
    ) -> SamplerState:
        """The way back, from the dict of every old rank, or one whose rows cover all that this rank owns.

        Raises:
            ConfigError: The state is of another version or run (another seed, prune_ratio, ...), or is malformed.
            LayoutMismatchError: It is of another number of samples, or rows that this rank owns are missing.
        """
        if not states:
            raise ConfigError("states=[]: must hold the state of every rank that saved")
        state = states[0]
        _check(states, ranks.owners.num_samples, config)
        book = ScoreBook(_owned(states, "scores", ranks))
        book.fresh = _owned(states, "fresh_losses", ranks)
        counters = Counters(*(int(state[field.name]) for field in fields(Counters)))
        kept, slots, end, global_batch = (int(state[name]) for name in _SPAN)
        span = Span(kept, slots, 0, end, global_batch) if global_batch else None
        epoch, position = int(state["epoch"]), int(state["position"])
        return cls(config, counters, epoch, position, bool(state["pruned"]), span, book)


def _rows(values: npt.NDArray[np.float32], ranks: Ranks) -> LocalRows:
    return LocalRows(torch.from_numpy(values.copy()), ranks.owned_start, ranks.owners.num_samples)


def _owned(states: Sequence[Mapping[str, Any]], name: str, ranks: Ranks) -> npt.NDArray[np.float32]:
    """This rank's rows, from whichever states hold them."""
    start, stop = ranks.owned_start, ranks.owned_start + ranks.num_owned
    values = np.full(ranks.num_owned, np.nan, dtype=np.float32)
    is_filled = np.zeros(ranks.num_owned, dtype=np.bool_)
    for state in states:
        rows: LocalRows = state[name]
        low, high = max(start, rows.start), min(stop, rows.start + len(rows.local))
        if low < high:
            found = rows.local[low - rows.start : high - rows.start]
            values[low - start : high - start] = found.detach().cpu().numpy()
            is_filled[low - start : high - start] = True
    if not is_filled.all():
        missing = start + int(np.argmin(is_filled))
        raise LayoutMismatchError(
            f'"{name}": no row for sample {missing}; rank {ranks.group.rank} of {ranks.group.size} owns samples '
            f"[{start}, {stop}). Pass the list of every old rank's state, or rows resharded to this layout"
        )
    return values


def _check(states: Sequence[Mapping[str, Any]], num_samples: int, config: dict[str, Any]) -> None:
    for state in states:
        _check_form(state)
        _check_rows(state, num_samples)
        for name in ("version", "config", "pruned", *_COUNTS, *_SPAN):
            if state[name] != states[0][name]:
                raise LayoutMismatchError(
                    f'"{name}" is {state[name]!r} in one state and {states[0][name]!r} in another: they must be of '
                    "all ranks at one moment"
                )
    _check_config(states[0]["config"], config)


def _check_form(state: Mapping[str, Any]) -> None:
    if state.get("version") != VERSION:
        raise ConfigError(
            f"version={state.get('version')!r} of the sampler's state: this version of effx_dist reads {VERSION}"
        )
    for name in (*_COUNTS, *_SPAN):
        value = state.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(
                f'"{name}" is {value!r} in the sampler\'s state: must be an integer, at least 0'
            )
    if not isinstance(state.get("pruned"), bool) or not isinstance(state.get("config"), Mapping):
        raise ConfigError(
            '"pruned" and "config" of the sampler\'s state: must be true or false, and a table'
        )
    if state["position"] > state["end_slot"]:
        raise ConfigError(
            f'"position" is {state["position"]} in the sampler\'s state: must be at most '
            f"end_slot={state['end_slot']}"
        )


def _check_rows(state: Mapping[str, Any], num_samples: int) -> None:
    if state["num_samples"] != num_samples:
        raise LayoutMismatchError(
            f"num_samples={state['num_samples']} in the sampler's state, {num_samples} here: it is of another data set"
        )
    for name in _ROWS:
        rows = state.get(name)
        if not isinstance(rows, LocalRows) or rows.local.dtype != torch.float32:
            raise ConfigError(f'"{name}" of the sampler\'s state: must be LocalRows of float32')
        if rows.global_shape != (num_samples,):
            raise LayoutMismatchError(
                f'"{name}" has shape {rows.global_shape} in the sampler\'s state: must be ({num_samples},), one number '
                "a sample"
            )


def _check_config(saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    differing = [
        f"{name}={saved.get(name)!r} in the state, {value!r} here"
        for name, value in config.items()
        if saved.get(name) != value
    ]
    if differing:
        raise ConfigError(
            f"{'; '.join(differing)}: a run must be resumed with the settings that its plans were made with"
        )
