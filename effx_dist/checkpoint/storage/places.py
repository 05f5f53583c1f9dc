"""Where checkpoints lie: a local folder, or one behind an fsspec URL such as ``s3://bucket/run``.

Credentials, endpoints, retries and timeouts of a store are its library's own matter: for S3 what
botocore reads (``AWS_*`` variables, ``~/.aws``), and for all of them fsspec's configuration
(``~/.config/fsspec/*.json``, ``FSSPEC_S3_*`` variables).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from effx_dist.checkpoint.storage.local_folder import LocalFolder
from effx_dist.checkpoint.storage.location import REMEDY, WRITING, Location, NewFile
from effx_dist.checkpoint.storage.remote_folder import RemoteFolder
from effx_dist.errors import ConfigError

Folder = str | os.PathLike[str]
"""How callers name a folder: a local path, an fsspec URL, or a :class:`Location`."""

_FOLDED_URL = re.compile(r"[a-z][a-z0-9+.-]+:/[^/].*")


def location(folder: Folder) -> Location:
    """The folder at a local path or an fsspec URL. Raises ConfigError for a URL that no installed
    file system takes."""
    if isinstance(folder, Location):
        return folder
    text = os.fspath(folder)
    if _FOLDED_URL.fullmatch(text):
        raise ConfigError(
            f"checkpoint folder {text!r}: is neither a path nor a URL; pathlib.Path makes one slash of "
            "two, so hand URLs over as strings"
        )
    if "://" not in text:
        return LocalFolder(Path(text))
    if "::" in text:
        raise ConfigError(
            f"checkpoint folder {text!r}: a chain of file systems is refused, because a cache in front of "
            "a store shows what was there before; give the store's own URL"
        )
    try:
        filesystem, path = url_to_fs(text, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"checkpoint folder {text!r}: {error}; install the file system's package "
            "(effx-dist[s3] for s3://), or give a local path"
        ) from error
    if isinstance(filesystem, LocalFileSystem):
        return LocalFolder(Path(path))
    return RemoteFolder(text)


def folder_key(folder: str | os.PathLike[str]) -> str:
    """A text that is equal for equal folders: a URL as it is, a local path made absolute."""
    text = os.fspath(folder)
    return text if "://" in text else str(Path(text).absolute())
