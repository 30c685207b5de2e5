"""Where checkpoints are kept: the protocol, and the way from a path or URL to a storage.

Importing this package loads no client of any object store. Called by every layer above.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from dcp_ckpt.errors import ConfigError
from dcp_ckpt.storage.base import (
    ByteRange,
    Lease,
    ObjectInfo,
    ObjectWriter,
    Storage,
    StorageCapabilities,
)
from dcp_ckpt.storage.local import SINGLE_WRITER_SCHEME, LocalStorage

__all__ = [
    "ByteRange",
    "Lease",
    "ObjectInfo",
    "ObjectWriter",
    "Storage",
    "StorageCapabilities",
    "open_storage",
]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def open_storage(url: str | os.PathLike[str]) -> Storage:
    """Open the place that `url` names; nothing is read or written yet.

    Args:
        url: a path (relative to the working directory now), `file:///path`, `s3://BUCKET/PREFIX`, the URL of
            another fsspec file system, or what `Storage.url` gave. `file+single-writer://` and
            `s3+single-writer://` vouch that one process alone writes there.

    Raises:
        ConfigError: the URL names no storage that can be opened here.
        MissingDependencyError: the package that speaks to it is not installed.
    """
    text = os.fspath(url)
    if not text:
        raise ConfigError("an empty path names no storage; use `.` for the working directory")
    match = _URL.fullmatch(text)
    if match is None:
        return LocalStorage(text)
    scheme, rest = match[1].lower(), match[2]
    if scheme in ("file", SINGLE_WRITER_SCHEME):
        return LocalStorage(_path_of(text, rest), single_writer=scheme == SINGLE_WRITER_SCHEME)
    # Imported here: its client libraries take longer to load than most commands take to run.
    from dcp_ckpt.storage.objects.opening import open_object_storage

    return open_object_storage(text)


def _path_of(url: str, rest: str) -> str:
    path = unquote(rest.removeprefix("localhost"))
    if not path.startswith("/"):
        raise ConfigError(
            f"{url} names another host or a relative path; write file:///absolute/path, or a path"
        )
    return path
