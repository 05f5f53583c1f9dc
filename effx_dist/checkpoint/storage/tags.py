"""Tags: names that a run gives to steps, such as ``best``, and moves to others.

A tag is a folder of its name with one small file that names the step. It appears, or moves, after the
step is committed; a step that has one is kept by the retention.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re

from effx_dist.checkpoint.storage.places import WRITING, Folder, Location, location
from effx_dist.checkpoint.storage.steps import (
    LATEST,
    REMOVING,
    SUPERSEDED,
    TAG,
    committed_folders,
    step_folder,
    step_of,
    tagged_step,
)
from effx_dist.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError

logger = logging.getLogger(__name__)

_TAG_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_NOT_TAGS = (WRITING, REMOVING, SUPERSEDED, "initialisation-")


def is_tag_name(name: str) -> bool:
    """Whether a tag, or a step's folder, may have the name."""
    is_plain = _TAG_NAME.fullmatch(name) is not None
    return is_plain and not name.startswith(_NOT_TAGS) and name != LATEST


def checked_tag(tag: str) -> str:
    """``tag`` itself, if a folder of checkpoints can have one of that name; raises ConfigError."""
    if not is_tag_name(tag):
        raise ConfigError(
            f"tag={tag!r}: must be a name of at most 128 letters, digits, '.', '_' and '-' that does not "
            f"begin with '.' or '-', other than {LATEST!r} and {', '.join(map(repr, _NOT_TAGS))}..."
        )
    if step_of(tag) is not None:
        raise ConfigError(f"tag={tag!r}: is the name of a step; leave it out, or take another name")
    return tag


def tags_of(folder: Folder) -> dict[str, int]:
    """All tags of a folder, with their steps, which may be gone. Unreadable ones are logged and left
    out. No communication is performed."""
    place = location(folder)
    found = {}
    for name in sorted(place.folders()):
        if is_tag_name(name) and step_of(name) is None:
            try:
                step = tagged_step(place, name)
            except CorruptCheckpointError as error:
                logger.warning("%s", error)
                continue
            if step is not None:
                found[name] = step
    return found


def point_to(step: Location, tag: str | None, moves_latest: bool) -> None:
    """Let ``tag``, if there is one, stand for a committed step, and ``latest`` name the tag, or else
    the step. Raises OSError."""
    place = step.parent
    if tag is not None:
        own = place / tag
        with contextlib.suppress(FileExistsError):
            own.make()
        own.replace_file(TAG, f"{json.dumps({'step': step_of(step.name)})}\n".encode())
    if moves_latest:
        place.replace_file(LATEST, f"{tag or step.name}\n".encode())


def folder_of_tag(folder: Folder, tag: str) -> Location:
    """The committed step that a tag, or a step's own name, stands for. Raises
    CheckpointNotFoundError naming the tags and steps there are."""
    step = step_of(tag)
    if step is None and is_tag_name(tag):
        step = tagged_step(folder, tag)
    if step is not None:
        with contextlib.suppress(CheckpointNotFoundError):
            return step_folder(folder, step)
    known = [*tags_of(folder), *(own.name for own in committed_folders(folder).values())]
    gone = f" (it stands for step {step}, which is gone)" if step is not None else ""
    raise CheckpointNotFoundError(
        f"{folder}: holds no checkpoint with the tag {tag!r}{gone}; there are {known or 'none'}"
    )
