"""Durable directories: made, and known to survive a power loss.

A new name is durable only when the directory that holds it has been fsynced. Called by the local storage;
raises plain `OSError`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["locked_directory", "make_directories", "sync_directory"]

# Some network and user-space file systems have no such thing as syncing a directory: nothing to wait for.
_NO_DIRECTORY_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})
# Or none of directories: a network file system may ask for a file that is open for writing.
_NO_DIRECTORY_LOCK = frozenset({errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP})
_LONGEST_LOCK_SECONDS = 60.0
_BETWEEN_TRIES_SECONDS = 0.01


def sync_directory(directory: str) -> None:
    """Make the names in `directory` durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(fd)


@contextmanager
def locked_directory(directory: str) -> Iterator[None]:
    """Keep out whoever else locks the directory, where the file system can; waits for them.

    Raises:
        BlockingIOError: somebody had it for a minute, which only a stopped process does.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(fd)
        yield
    finally:
        os.close(fd)


def _lock(fd: int) -> None:
    deadline = time.monotonic() + _LONGEST_LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_BETWEEN_TRIES_SECONDS)
            continue
        except OSError as error:
            if error.errno not in _NO_DIRECTORY_LOCK:
                raise
        return


def make_directories(directory: str, *, root: str, made: list[str] | None = None) -> None:
    """Make `directory` and its missing ancestors, durably. Idempotent; safe among processes.

    Names from `root` down are synced even when they exist: whoever made them may not have come that far yet,
    and what is written below them now must not depend on it.

    Args:
        directory: an absolute path, `root` or below it.
        root: the storage's root; its own missing ancestors are made too.
        made: gets those that were made, the topmost first, also when this fails halfway.
    """
    made = [] if made is None else made
    levels = [directory]
    while levels[-1] != root:
        levels.append(os.path.dirname(levels[-1]))
    while not os.path.isdir(parent := os.path.dirname(levels[-1])):
        levels.append(parent)
    for path in reversed(levels):
        if _make_one(path):
            made.append(path)
    for path in levels:
        try:
            sync_directory(os.path.dirname(path))
        except PermissionError:
            # A parent that may be entered but not read; the name is older than this storage.
            if path in made:
                raise


def _make_one(path: str) -> bool:
    """Make one directory; False if it is there already."""
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
        return False
    return True
