"""What the ranks of one save hold beside their sharded tensors, merged into one state that all may load.

Keys that only some ranks have are kept, as torchtitan's ``dp_rank_0`` and ``dp_rank_1``. Values that
differ under one key have no answer: one rank's would silently become every rank's. They are refused by
name, or kept for each rank by :class:`PerRank`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import xxhash

from effx_dist.checkpoint.format.coding import to_bits
from effx_dist.checkpoint.state.fragment import Fragment
from effx_dist.checkpoint.state.matching import listed
from effx_dist.checkpoint.state.tree import PER_RANK, TAGS
from effx_dist.errors import LayoutMismatchError
from effx_dist.shard import Group, whole_box

logger = logging.getLogger(__name__)

AtOtherSize = Literal["refuse", "restart"]
_OF_RANK_0 = "extra"
"""The caller's own notes, of which rank 0's are kept; what differs is said in the log."""


class PerRank:
    """A stateful object whose state is another on every rank: a data loader that each rank iterates by
    itself, a generator, a buffer of samples.

    ``checkpoints.save(..., stateful={"loader": PerRank(loader)})`` keeps one state a rank, and
    ``load(..., stateful={"loader": PerRank(loader)})`` gives each rank its own back.

    Args:
        obj: offers ``state_dict()`` and ``load_state_dict(state)``.
        at_other_size: what a load on another number of ranks does, where no rank's state is this
            rank's: "refuse" raises LayoutMismatchError; "restart" leaves ``obj`` as it is, with a
            warning.

    No communication is performed.
    """

    def __init__(self, obj: Any, at_other_size: AtOtherSize = "refuse") -> None:
        if at_other_size not in ("refuse", "restart"):
            raise ValueError(f"{at_other_size=}: must be 'refuse' or 'restart'")
        self.obj = obj
        self.at_other_size: AtOtherSize = at_other_size

    def state_dict(self) -> dict[str, Any]:
        """This rank's state."""
        state: dict[str, Any] = self.obj.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take this rank's state back."""
        return self.obj.load_state_dict(state_dict)


def per_rank_path(path: str, rank: int) -> str:
    """Where the tensors of one rank's state are named."""
    return f"{path}.rank-{rank}"


def own_state(name: str, saved: Any, obj: object, rank: int, size: int) -> Any:
    """What this rank takes of one stateful object's saved tree; None for nothing.

    Raises LayoutMismatchError where what was saved for each rank meets an object for all of them, the
    other way round, or another number of ranks. No communication is performed.
    """
    is_per_rank = isinstance(saved, dict) and saved.keys() == {PER_RANK}
    if not isinstance(obj, PerRank):
        if is_per_rank:
            raise LayoutMismatchError(
                f"stateful {name!r}: was saved for each rank; hand it over as "
                "effx_dist.checkpoint.PerRank(...) to load as well"
            )
        return saved
    if not is_per_rank:
        raise LayoutMismatchError(
            f"stateful {name!r}: was saved once for all ranks; load it without PerRank"
        )
    states: dict[str, Any] = saved[PER_RANK]
    if len(states) == size and str(rank) in states:
        return states[str(rank)]
    problem = f"stateful {name!r}: was saved for each of {len(states)} ranks, and {size} load it"
    if obj.at_other_size == "refuse":
        raise LayoutMismatchError(
            f"{problem}: no state is this rank's. Load on {len(states)} ranks, or say "
            'PerRank(..., at_other_size="restart") to leave it as it is'
        )
    if rank == 0:
        logger.warning("%s; it is left as it is on every rank", problem)
    return None


@dataclass(frozen=True)
class RankValues:
    """One rank's JSON values, names of tied tensors, and digests of the whole tensors in its states."""

    values: Mapping[str, Any]
    aliases: Mapping[str, str]
    tensors: Mapping[str, str]

    def digest(self) -> str:
        """Equal where two ranks say the same."""
        told = [self.values, dict(self.aliases), dict(self.tensors)]
        return xxhash.xxh3_128_hexdigest(json.dumps(told, sort_keys=True).encode())


def agreed(
    values: Mapping[str, Any],
    aliases: Mapping[str, str] | None,
    state: Mapping[str, Fragment],
    group: Group,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values and aliases that a checkpoint of all ranks holds.

    Args:
        values: what :func:`effx_dist.checkpoint.state.training_state.collect` gave on this rank.
        aliases: names of tied tensors.
        state: this rank's staged fragments.

    One small gather; one more, of the values themselves, where the ranks differ. Raises
    LayoutMismatchError on all ranks for values that differ under one key.
    """
    own = RankValues(values, aliases or {}, _digests(state))
    if group.size == 1 or len(set(group.all_gather_object(own.digest()))) == 1:
        return dict(own.values), dict(own.aliases)
    told = group.all_gather_object(own)
    merge = _Merge()
    tensors: dict[str, str] = {}
    for rank, of_rank in enumerate(told):
        for name, digest in of_rank.tensors.items():
            if tensors.setdefault(name, digest) != digest:
                merge.differs(name, {0: "one tensor", rank: "another"})
    found = merge.tree("", [(rank, _without_groups(one.values)) for rank, one in enumerate(told)])
    found |= merge.groups([one.values for one in told])
    known = {alias: name for of_rank in reversed(told) for alias, name in of_rank.aliases.items()}
    if merge.problems:
        raise LayoutMismatchError(
            f"the ranks' states differ, and one rank's would become every rank's: {listed(merge.problems)}. "
            "Hand the object over as effx_dist.checkpoint.PerRank(obj), which keeps one state a rank, or "
            "give each rank keys of its own"
        )
    if merge.left and group.rank == 0:
        logger.warning(
            "rank 0's of the values in `extra` that differ are kept: %s", listed(merge.left)
        )
    return found, known


_GROUPS, _NAMES = "param_groups", "group_parameters"


def _without_groups(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in (_GROUPS, _NAMES)}


def _digests(state: Mapping[str, Fragment]) -> dict[str, str]:
    """Digests, by name, of those tensors in states of which this rank holds the whole."""
    found = {}
    for name, fragment in state.items():
        pieces = fragment.own_pieces
        if not name.startswith(("stateful.", "extra.")) or len(pieces) != 1:
            continue
        box, values = pieces[0]
        if box == whole_box(fragment.shape):
            found[name] = xxhash.xxh3_128_hexdigest(to_bits(values.contiguous()).data)
    return found


@dataclass
class _Merge:
    """Puts the ranks' trees into one; collects what differs."""

    problems: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def differs(self, path: str, by_rank: Mapping[int, Any]) -> None:
        found = ", ".join(f"{_shown(value)} on rank {rank}" for rank, value in by_rank.items())
        is_note = path.split(".")[0] == _OF_RANK_0
        (self.left if is_note else self.problems).append(f"{path}: {found}")

    def tree(self, path: str, trees: Sequence[tuple[int, Any]]) -> Any:
        """One tree of the trees that some ranks have at ``path``."""
        first_rank, first = trees[0]
        other = next(((r, t) for r, t in trees if _text(t) != _text(first)), None)
        if other is None:
            return first
        if all(_is_open(tree) for _, tree in trees):
            return self._mapping(path, trees)
        if all(isinstance(t, list) and len(t) == len(first) for _, t in trees):
            columns = ([(rank, tree[index]) for rank, tree in trees] for index in range(len(first)))
            return [self.tree(f"{path}.{i}", column) for i, column in enumerate(columns)]
        self.differs(path, {first_rank: first, other[0]: other[1]})
        return first

    def groups(self, by_rank: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The optimizer's groups. Ranks may hold other parameters of a group (pipeline stages), or lack
        the last ones; the options of those that they have are one."""
        found: dict[str, Any] = {}
        told = [(r, v[_GROUPS]) for r, v in enumerate(by_rank) if v.get(_GROUPS) is not None]
        if told:
            longest = max((groups for _, groups in told), key=len)
            found[_GROUPS] = [
                self.tree(f"{_GROUPS}.{i}", [(r, g[i]) for r, g in told if len(g) > i])
                for i in range(len(longest))
            ]
        names = [v[_NAMES] for v in by_rank if v.get(_NAMES) is not None]
        if names:
            found[_NAMES] = [
                list(
                    dict.fromkeys(name for groups in names if len(groups) > i for name in groups[i])
                )
                for i in range(max(map(len, names)))
            ]
        return found

    def _mapping(self, path: str, trees: Sequence[tuple[int, Any]]) -> Any:
        columns: dict[str, list[tuple[int, Any]]] = {}
        keys: dict[str, Any] = {}
        for rank, tree in trees:
            for key, text, value in _entries(tree):
                columns.setdefault(text, []).append((rank, value))
                keys.setdefault(text, key)
        below = f"{path}." if path else ""
        merged = {text: self.tree(f"{below}{text}", column) for text, column in columns.items()}
        if all("$items" not in tree for _, tree in trees):
            return merged
        return {"$items": [[keys[text], value] for text, value in merged.items()]}


def _is_open(tree: Any) -> bool:
    """Whether a node is a mapping, to which keys can be added."""
    if not isinstance(tree, dict):
        return False
    return not (len(tree) == 1 and next(iter(tree)) in TAGS - {"$items", PER_RANK})


def _entries(tree: dict[str, Any]) -> Iterator[tuple[Any, str, Any]]:
    """Key as JSON, its text, and value of each entry."""
    if tree.keys() == {"$items"}:
        for key, value in tree["$items"]:
            yield key, key if isinstance(key, str) else _text(key), value
    else:
        for key, value in tree.items():
            yield key, key, value


def _text(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else _text(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
