"""What stands in a local directory, as keys.

Other processes make and remove files meanwhile: what vanishes during a listing is not in it. Links are named,
so that nobody takes their names for free, and never followed. Called by the local storage; raises plain
`OSError`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from dcp_ckpt.storage.base import ObjectInfo
from dcp_ckpt.storage.keys import is_listed
from dcp_ckpt.storage.paths import is_inside

__all__ = ["list_objects", "list_parts"]


def list_objects(root: str, prefix: str) -> list[ObjectInfo]:
    """All regular files below `prefix`, recursively, sorted by key."""
    if not is_inside(root, prefix):
        return []
    return sorted(_walk(root, prefix), key=lambda info: info.key)


def list_parts(root: str, prefix: str) -> list[str]:
    """The names directly below `prefix`, sorted; directories, and links to them, end in `/`."""
    if not is_inside(root, prefix):
        return []
    names = []
    for entry in _entries(os.path.join(root, prefix)):
        if entry.is_dir():
            names.append(f"{entry.name}/")
        elif entry.is_file():
            names.append(entry.name)
    return sorted(names)


def _walk(root: str, prefix: str) -> Iterator[ObjectInfo]:
    pending = [prefix]
    while pending:
        prefix = pending.pop()
        for entry in _entries(os.path.join(root, prefix)):
            if entry.is_dir(follow_symlinks=False):
                pending.append(f"{prefix}{entry.name}/")
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                yield ObjectInfo(key=f"{prefix}{entry.name}", size_bytes=status.st_size)


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return [entry for entry in entries if is_listed(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
