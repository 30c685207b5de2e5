"""From keys to paths, without leaving the root: symbolic links below it are not followed.

A link in a run may lead anywhere, also to another run, whose files must neither be read as ours nor deleted.
Links in the root itself are the user's. Called by the local storage; raises `StorageError`.
"""

from __future__ import annotations

import errno
import os
import stat

from dcp_ckpt.storage.os_errors import reading, storage_error

__all__ = ["is_inside", "named_by_user", "open_regular", "path_below"]


def path_below(root: str, key: str) -> str:
    """The path of a checked key; its last part may be a link, which the caller must not follow.

    Raises:
        StorageError: a directory on the way is a link (ELOOP).
    """
    path = os.path.join(root, key)
    if not is_inside(root, os.path.dirname(key)):
        raise storage_error(OSError(errno.ELOOP, os.strerror(errno.ELOOP)), "use what is behind a link", path)
    return path


def is_inside(root: str, directory: str) -> bool:
    """Whether the way from `root` to the relative `directory` goes through no link."""
    path = root
    for part in directory.split("/"):
        path = os.path.join(path, part)
        if part and os.path.islink(path):
            return False
    return True


def named_by_user(path: str) -> str:
    """What a link stands for that somebody named (`latest -> step-00000100`); any other path as it is."""
    return os.path.realpath(path) if "://" not in path and os.path.islink(path) else path


def open_regular(path: str, *, root: str) -> int:
    """Open a regular file to read it; never waits, as opening a pipe would.

    Raises:
        StorageNotFound: there is nothing of that name.
        StorageError: it is something else than a regular file (EISDIR), or a link (ELOOP).
    """
    with reading(path, root=root):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
