"""A sampler's state as JSON values and rows of whole tensors, and the way back at any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from effx_dist.config import InfoBatchConfig
from effx_dist.data import kinds
from effx_dist.data.epoch_run import EpochRun
from effx_dist.data.plan import Rest, Unfinished
from effx_dist.data.scores import ScoreBook
from effx_dist.data.slots import Batches, Owners, Ranks, Span
from effx_dist.errors import ConfigError, LayoutMismatchError
from effx_dist.shard import EvenShare, LocalRows

VERSION = 2
_ROWS = ("scores", "fresh_losses")
_PROGRESS = "progress"
"""Two rows a rank: places weighed without a gap from the first on, and micro-batches weighed."""
_SPAN = ("num_kept", "num_slots", "end_slot", "global_batch_size")
_REST = ("rest_bound", "rest_kept", "rest_slots", "rest_end")
_LAYOUT = ("batch_size", "group_size", "num_local")


@dataclass
class Counters:
    """What a sampler counts over the whole run, equal on all ranks."""

    samples_saved: int = 0
    num_nonfinite: int = 0
    finished_epochs: int = 0
    first_epoch: int = 0
    """The epoch to begin with, where none is planned."""


_COUNTERS = tuple(field.name for field in fields(Counters))
_COUNTS = ("epoch", "position", *_COUNTERS[:3], "num_samples")
_SINCE_2 = ("first_epoch", *_REST, *_LAYOUT)


@dataclass(frozen=True, eq=False)
class SamplerState:
    """Where a run stands: everything that the plans of this and all later epochs follow from."""

    config: dict[str, Any]
    counters: Counters
    unfinished: Unfinished | None
    """The epoch that was planned; None where none was yet."""
    has_ended: bool
    """Whether the caller had declared that the epoch ends there."""
    book: ScoreBook
    """Scores as the epoch was planned from them, and the losses known when its plan was made."""
    version: int = VERSION
    layout: Batches = field(default_factory=lambda: Batches(1, 1, 0, 1))
    """How the slots of the plan fell to the ranks that saved."""
    num_local: int = 0
    """Places of the plan on each of them."""
    recorded: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    """This rank's even share of the losses by place, the ranks' one behind another."""
    prefixes: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Places that ranks had weighed without a gap from the first on; those in this rank's share, NaN where unknown."""
    num_weighs: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Micro-batches that ranks had weighed, likewise."""

    @classmethod
    def from_dicts(
        cls,
        states: Sequence[Mapping[str, Any]],
        ranks: Ranks,
        config: dict[str, Any],
        is_reporter: bool = True,
        by_id: bool = False,
    ) -> SamplerState:
        """The way back, from the dict of every old rank, or one whose rows cover all that this rank asks for. Of a
        sequence of as many as saved, only those are looked at that overlap it, so it may read them from files.

        Args:
            states: What `state_of` gave; at least one.
            ranks: Who owns what now.
            config: The settings of now.
            is_reporter: Whether this rank's losses count (see `Peers`); else rows of them may be missing.
            by_id: Whether the state may be of another data set; its scores are then this rank's share of all.

        Raises:
            ConfigError: The state is of another version or run (another seed, prune_ratio, ...), or is malformed.
            LayoutMismatchError: It is of another number of samples, or rows that this rank owns are missing.
        """
        rows = _SavedStates(states, ranks)
        state = rows.first(ranks.owned_start if not by_id else 0)
        check_form(state)
        _check_rows(state, state["num_samples"] if by_id else ranks.owners.num_samples)
        total = ranks.owners.num_samples if not by_id else state["num_samples"]
        scores = rows.read("scores", *_share(total, ranks))
        fresh = rows.read("fresh_losses", *_share(total, ranks))
        num_local, num_savers = state.get("num_local", 0), state.get("group_size", 0)
        recorded = rows.read("recorded", *_share(num_local * num_savers, ranks), is_reporter)
        first, stop = _share(2 * num_savers, ranks)
        progress = rows.read(_PROGRESS, first, stop, is_reporter)
        check_states(rows.touched, total, config)
        book = ScoreBook(scores)
        book.fresh = fresh
        return cls(
            config=config,
            counters=Counters(*(int(state.get(name, 0)) for name in _COUNTERS)),
            unfinished=_unfinished(state),
            has_ended=bool(state.get("has_ended", False)),
            book=book,
            version=state["version"],
            layout=Batches(state.get("batch_size", 1), 1, 0, num_savers),
            num_local=num_local,
            recorded=recorded,
            prefixes=progress[first % 2 :: 2],
            num_weighs=progress[1 - first % 2 :: 2],
        )


def state_of(
    config: dict[str, Any],
    dataset: str | None,
    counters: Counters,
    run: EpochRun | None,
    book: ScoreBook,
    ranks: Ranks,
    is_reporter: bool,
) -> dict[str, Any]:
    """JSON values, equal on all ranks, and this rank's rows. Copies; no communication is performed."""
    plan = run.plan if run else None
    span = plan.span if plan else None
    rest = plan.rest if plan else None
    num_local = len(plan.local_ids) if plan else 0
    size, rank = ranks.group.size, ranks.group.rank
    of_span = (span.num_kept, span.num_slots, span.end, span.global_batch) if span else [0] * 4
    of_rest = (
        (rest.bound, rest.span.num_kept, rest.span.num_slots, rest.span.end) if rest else [0] * 4
    )
    progress = torch.tensor([run.prefix(), run.num_weighs] if run else [0, 0], dtype=torch.float64)
    recorded = torch.from_numpy(run.recorder.recorded() if run else np.empty(0, np.float32))
    num_told = 1 if is_reporter else 0
    return {
        "kind": kinds.SAMPLER,
        "version": VERSION,
        "num_samples": ranks.owners.num_samples,
        "dataset": dataset,
        "config": dict(config),
        "epoch": plan.epoch if plan else 0,
        "position": span.first if span else 0,
        "pruned": plan.pruned if plan else False,
        "has_ended": run.has_ended if run else False,
        **dict(zip(_SPAN, of_span, strict=True)),
        **dict(zip(_REST, of_rest, strict=True)),
        **dict(zip(_LAYOUT, (ranks.batches.batch_size, size, num_local), strict=True)),
        **asdict(counters),
        "scores": _owned(book.scores, ranks),
        "fresh_losses": _owned(book.fresh, ranks),
        "recorded": EvenShare(
            recorded[: num_local * num_told], rank * num_local, size * num_local, rank, size
        ),
        _PROGRESS: EvenShare(progress[: 2 * num_told], 2 * rank, 2 * size, rank, size),
    }


def _owned(values: npt.NDArray[np.float32], ranks: Ranks) -> EvenShare:
    copy, group = torch.from_numpy(values.copy()), ranks.group
    return EvenShare(copy, ranks.owned_start, ranks.owners.num_samples, group.rank, group.size)


def _share(total: int, ranks: Ranks) -> tuple[int, int]:
    owners, rank = Owners(total, ranks.group.size), ranks.group.rank
    return (owners.start(rank), owners.start(rank + 1)) if total else (0, 0)


def _unfinished(state: Mapping[str, Any]) -> Unfinished | None:
    kept, slots, end, global_batch = (int(state[name]) for name in _SPAN)
    if not global_batch:
        return None
    position = int(state["position"])
    first = position if state["version"] > 1 else 0
    rest = None
    if state.get("rest_bound"):
        bound, rest_kept, rest_slots, rest_end = (int(state[name]) for name in _REST)
        rest = Rest(bound, Span(rest_kept, rest_slots, 0, rest_end, global_batch))
    span = Span(kept, slots, first, end, global_batch)
    return Unfinished(int(state["epoch"]), state["pruned"], span, position, rest)


class _SavedStates:
    """Rows of the ranks that saved, of which only those states are touched that hold what is asked for."""

    def __init__(self, states: Sequence[Mapping[str, Any]], ranks: Ranks) -> None:
        self._states = states
        self._ranks = ranks
        self._known: dict[int, Mapping[str, Any]] = {}

    @property
    def touched(self) -> list[Mapping[str, Any]]:
        return list(self._known.values())

    def first(self, start: int) -> Mapping[str, Any]:
        """The state that is likely to hold sample ``start``."""
        owners = Owners(self._ranks.owners.num_samples, len(self._states))
        return self._state(min(start // owners.rows_per_rank, len(self._states) - 1))

    def _state(self, index: int) -> Mapping[str, Any]:
        if index not in self._known:
            self._known[index] = self._states[index]
        return self._known[index]

    def read(
        self, name: str, start: int, stop: int, must_be_there: bool = True
    ) -> npt.NDArray[Any]:
        """Rows ``[start, stop)`` of one tensor; NaN for what is missing, where it may be."""
        dtype = np.float64 if name == _PROGRESS else np.float32
        values = np.full(stop - start, np.nan, dtype=dtype)
        is_filled = np.zeros(stop - start, dtype=np.bool_)
        for index in self._likely(name, start, stop):
            if is_filled.all():
                break
            rows = _rows_in(self._state(index), name)
            low, high = max(start, rows.start), min(stop, rows.start + len(rows.local))
            if low < high:
                found = rows.local[low - rows.start : high - rows.start]
                values[low - start : high - start] = found.detach().cpu().numpy()
                is_filled[low - start : high - start] = True
        if must_be_there and not is_filled.all():
            missing, group = start + int(np.argmin(is_filled)), self._ranks.group
            raise LayoutMismatchError(
                f'"{name}": no row for sample {missing}; rank {group.rank} of {group.size} owns samples '
                f"[{start}, {stop}). Pass the list of every old rank's state, or rows resharded to this layout"
            )
        return values

    def _likely(self, name: str, start: int, stop: int) -> Iterator[int]:
        """Numbers of the states, those first that hold the rows if each holds its even share."""
        num = len(self._states)
        some = next(iter(self._known.values()), None)
        rows = some.get(name) if some is not None else None
        total = rows.global_rows if isinstance(rows, LocalRows) else 0
        owners = Owners(max(total, 1), num)
        low, high = start // owners.rows_per_rank, max(stop - 1, 0) // owners.rows_per_rank + 1
        likely = range(min(low, num - 1), min(high, num))
        yield from likely
        yield from (index for index in range(num) if index not in likely)


def _rows_in(state: Mapping[str, Any], name: str) -> LocalRows:
    rows = state.get(name)
    dtype = torch.float64 if name == _PROGRESS else torch.float32
    if not isinstance(rows, LocalRows) or rows.local.dtype != dtype or rows.local.dim() != 1:
        raise ConfigError(
            f'"{name}" of the sampler\'s state: must be LocalRows of {dtype}, one number a row'
        )
    return rows


def check_states(
    states: Sequence[Mapping[str, Any]], num_samples: int, config: dict[str, Any]
) -> None:
    """Refuse states that are malformed, differ from each other, or are of another run."""
    first = states[0]
    for state in states:
        check_form(state)
        _check_rows(state, num_samples)
        names = ("version", "config", "pruned", *_COUNTS, *_SPAN)
        for name in (*names, *(_SINCE_2 if first["version"] > 1 else ())):
            if state[name] != first[name]:
                raise LayoutMismatchError(
                    f'"{name}" is {state[name]!r} in one state and {first[name]!r} in another: they must be of '
                    "all ranks at one moment"
                )
    _check_config(first["config"], config)


def check_form(state: Mapping[str, Any]) -> None:
    """Refuse what is no sampler's state, or a malformed one."""
    kind = state.get("kind", kinds.SAMPLER if state.get("version") == 1 else None)
    if kind != kinds.SAMPLER:
        what = "what an iterator of the sampler handed out, for a loader's load_state_dict"
        raise ConfigError(
            f"kind={kind!r}: is {what if kind == kinds.HANDED_OUT else 'no state of a sampler'}; load what "
            "sampler.state_dict() gave"
        )
    version = state.get("version")
    if version not in (1, VERSION):
        raise ConfigError(
            f"version={version!r} of the sampler's state: this version of effx_dist reads 1 and {VERSION}"
        )
    for name in (*_COUNTS, *_SPAN, *(_SINCE_2 if version > 1 else ())):
        value = state.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(
                f'"{name}" is {value!r} in the sampler\'s state: must be an integer, at least 0'
            )
    if version > 1 and not isinstance(state.get("dataset", 0), str | None):
        raise ConfigError('"dataset" of the sampler\'s state: must be a name or null')
    flags = ("pruned", "has_ended") if version > 1 else ("pruned",)
    if not all(isinstance(state.get(name), bool) for name in flags) or not isinstance(
        state.get("config"), Mapping
    ):
        raise ConfigError(
            '"pruned", "has_ended" and "config" of the sampler\'s state: must be true or false, and a table'
        )
    if state["position"] > state["end_slot"] or state.get("rest_bound", 0) > state["num_slots"]:
        raise ConfigError(
            f'"position" is {state["position"]} and "rest_bound" {state.get("rest_bound", 0)} in the sampler\'s state: '
            f"must be at most end_slot={state['end_slot']} and num_slots={state['num_slots']}"
        )
    if version > 1 and not state["batch_size"] > 0:
        raise ConfigError('"batch_size" is 0 in the sampler\'s state: must be at least 1')


def _check_rows(state: Mapping[str, Any], num_samples: int) -> None:
    if state["num_samples"] != num_samples:
        raise LayoutMismatchError(
            f"num_samples={state['num_samples']} in the sampler's state, {num_samples} here: it is of another data "
            "set; sampler.keep_scores_by_id() before the load takes its scores over all the same"
        )
    for name in _ROWS:
        rows = _rows_in(state, name)
        if rows.global_shape != (num_samples,):
            raise LayoutMismatchError(
                f'"{name}" has shape {rows.global_shape} in the sampler\'s state: must be ({num_samples},), one number '
                "a sample"
            )


def _check_config(saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Settings that an earlier release did not have were as they are by default."""
    default = InfoBatchConfig(num_epochs=1).model_dump()
    differing = [
        f"{name}={found!r} in the state, {value!r} here"
        for name, value in config.items()
        if (found := saved.get(name, default.get(name))) != value
    ]
    if differing:
        raise ConfigError(
            f"{'; '.join(differing)}: a run must be resumed with the settings that its plans were made with"
        )
