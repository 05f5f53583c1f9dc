"""Which tensor of a checkpoint fills which live tensor: by name, or as a mapping of names says."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from effx_dist.checkpoint.format.manifest import Manifest
from effx_dist.checkpoint.state.fragment import Fragment
from effx_dist.checkpoint.state.tree import Leaf
from effx_dist.errors import LayoutMismatchError

logger = logging.getLogger(__name__)

MODEL = "model"
OPTIMIZER = "optimizer"
NUM_SHOWN = 8
"""Tensors that a message names before it counts the rest."""

NameMap = Mapping[str, str | None] | Callable[[str], str | None]
"""Maps a live parameter's or buffer's name to its name in the checkpoint, or to None: do not load it. A
Mapping leaves names that it does not hold as they are."""


@dataclass(frozen=True)
class LoadReport:
    """What the last load left alone, and what came with it. Names as in ``Checkpointer``'s manifests:
    ``model.<parameter>`` and ``optimizer.<parameter>.<key>``.

    Attributes:
        step: the checkpoint's.
        missing: live tensors that the checkpoint lacks; they kept their values.
        unexpected: the checkpoint's tensors of the model (and of the optimizer, if one was handed
            over) that nothing live asked for.
        extra: what the save was given as ``extra``.
    """

    step: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def warn_of_left_alone(report: LoadReport) -> None:
    """Log which tensors a load did not fill or did not use; nothing if it was all of them."""
    if report.missing:
        logger.warning(
            "step %d: %d live tensors are not in the checkpoint and keep their values: %s",
            report.step,
            len(report.missing),
            listed(report.missing),
        )
    if report.unexpected:
        logger.warning(
            "step %d: %d tensors of the checkpoint are not loaded: %s",
            report.step,
            len(report.unexpected),
            listed(report.unexpected),
        )


class SavedNames:
    """The names that live parameters and buffers have in one checkpoint.

    Args:
        mapping: from live to saved names; None: they are the same.
        live: names of the live model's parameters and buffers.
        manifest: the checkpoint's.
        strict: whether a mapping may name what is not there.

    Raises LayoutMismatchError for a mapping that leads nowhere, naming what it may have meant.
    """

    def __init__(
        self, mapping: NameMap | None, live: Iterable[str], manifest: Manifest, strict: bool
    ) -> None:
        names = sorted(set(live))
        known = self._known = {
            name.removeprefix(f"{MODEL}.")
            for name in (*manifest.tensors, *manifest.aliases)
            if name.startswith(f"{MODEL}.")
        }
        self._saved = {name: _apply(mapping, name) for name in names}
        if mapping is None:
            self._saved |= _former_names(names, known)
        self.left_out = frozenset(name for name, saved in self._saved.items() if saved is None)
        renamed = {n: saved for n, saved in self._saved.items() if saved not in (None, n)}
        lost = {n: saved for n, saved in renamed.items() if saved not in known}
        problems = []
        if isinstance(mapping, Mapping) and strict:
            unknown = mapping.keys() - self._saved.keys()
            problems += [f"{n}: not in the model{nearest(n, names)}" for n in unknown]
        # a rule is applied to every name, also to those that it was not meant for
        if isinstance(mapping, Mapping) or (not strict and lost == renamed):
            problems += [
                f"{name}: mapped to {saved}, which is not in the checkpoint{nearest(saved, known)}"
                for name, saved in lost.items()
                if saved is not None
            ]
        if problems:
            raise LayoutMismatchError(f"mapping: {listed(sorted(problems))}")

    def of(self, name: str) -> str | None:
        """The name in the checkpoint; None for what is not to be loaded."""
        return self._saved.get(name, name)

    def is_known(self, saved: str | None) -> bool:
        """Whether the checkpoint holds a parameter or buffer of that name."""
        return saved in self._known


def _former_names(live: Sequence[str], known: Set[str]) -> dict[str, str]:
    """Saved names of live tensors that releases up to format 2 saved without any ``module`` in them,
    also where that was the user's own child (under DeepSpeed, and in the names of tied tensors)."""
    free = known - set(live)
    former = {
        name: ".".join(part for part in name.split(".") if part != "module")
        for name in live
        if name not in known
    }
    return {name: old for name, old in former.items() if old in free}


def _apply(mapping: NameMap | None, name: str) -> str | None:
    if mapping is None:
        return name
    return mapping.get(name, name) if isinstance(mapping, Mapping) else mapping(name)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names that look like ``name``, as the end of a message; empty if none do."""
    found = difflib.get_close_matches(name, list(known), n=3)
    return f" (nearest: {', '.join(found)})" if found else ""


def listed(problems: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(problems) - NUM_SHOWN
    return "; ".join(problems[:NUM_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def match(
    leaves: Mapping[str, Leaf],
    saved_names: Mapping[str, str],
    left_out: Iterable[str],
    manifest: Manifest,
    with_optimizer: bool,
    strict: bool,
) -> tuple[dict[str, str], LoadReport]:
    """The saved name of every live tensor that the checkpoint fills, and what is left alone.

    Args:
        leaves: live tensors by name.
        saved_names: for each, its name in the checkpoint, whether it is there or not.
        left_out: live parameters and buffers that are not to be loaded, nor missed.
        with_optimizer: whether the optimizer's saved tensors count as unexpected.

    Raises LayoutMismatchError naming tensors of another shape or dtype, two live tensors with one
    saved name and, if ``strict``, tensors that only one side has.
    """
    known = manifest.tensors.keys() | manifest.aliases.keys()
    found = {live: saved for live, saved in saved_names.items() if saved in known}
    missing = sorted(saved_names.keys() - found.keys())
    used = {manifest.aliases.get(saved, saved) for saved in found.values()}
    used |= {f"{MODEL}.{name}" for name in left_out}
    prefixes = (f"{MODEL}.", f"{OPTIMIZER}.") if with_optimizer else (f"{MODEL}.",)
    skipped = tuple(f"{OPTIMIZER}.{name}." for name in left_out)
    unexpected = sorted(
        name
        for name in manifest.tensors.keys() - used
        if name.startswith(prefixes) and not name.startswith(skipped)
    )
    problems = []
    if strict:
        problems += [f"{n}: {_absent(n, saved_names[n], unexpected)}" for n in missing[:NUM_SHOWN]]
        problems += missing[NUM_SHOWN:]
        problems += [f"{name}: only in the checkpoint" for name in unexpected]
    problems += _differing(leaves, found, manifest) + _claimed_twice(found)
    if problems:
        remedy = "Build the model and optimizer that were saved"
        if strict and (missing or unexpected):
            remedy += ", give a mapping of names, or load with strict=False what both sides have"
        raise LayoutMismatchError(f"the checkpoint does not fit: {listed(problems)}. {remedy}")
    return found, LoadReport(manifest.step, tuple(missing), tuple(unexpected))


def _absent(name: str, saved: str, unexpected: Sequence[str]) -> str:
    mapped = "" if saved == name else f", where it would be {saved}"
    return f"not in the checkpoint{mapped}{nearest(saved, unexpected)}"


def _differing(
    leaves: Mapping[str, Leaf], found: Mapping[str, str], manifest: Manifest
) -> list[str]:
    problems = []
    for name, saved in sorted(found.items()):
        record = manifest.tensors[manifest.aliases.get(saved, saved)]
        live = Fragment.of(name, leaves[name]).facts
        if (live.shape, live.dtype) != (tuple(record.shape), record.torch_dtype):
            there = f"{tuple(record.shape)} {record.dtype} in the checkpoint"
            here = f"{live.shape} {str(live.dtype).removeprefix('torch.')} here"
            cast = (
                ""
                if live.shape != tuple(record.shape)
                else (f" (nothing is cast unasked: load into {record.dtype}, then convert)")
            )
            problems.append(f"{name}: {there}, {here}{cast}")
    return problems


def _claimed_twice(found: Mapping[str, str]) -> list[str]:
    first: dict[str, str] = {}
    return [
        f"{name} and {first[saved]}: both mapped to {saved}; load twice, leaving one out each time"
        for name, saved in sorted(found.items())
        if first.setdefault(saved, name) != name
    ]
