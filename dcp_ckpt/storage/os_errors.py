"""From operating system errors to the one error tree, by errno.

Owns the classification and the advice. Must not know what a checkpoint is. Called by the local storage
wherever it asks the operating system for something.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from dcp_ckpt.errors import (
    StorageError,
    StorageExists,
    StorageFull,
    StorageNotFound,
    StorageTransient,
    StorageUnsuitable,
)

__all__ = ["free_bytes", "full_error", "is_no_file", "reading", "storage_error", "translated"]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_TRANSIENT = frozenset(
    {
        errno.EAGAIN,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
_MISSING = frozenset({errno.ENOENT})
# A reader that meets a file where a directory should be finds no such object.
_MISSING_FOR_READERS = _MISSING | {errno.ENOTDIR}
_NO_FILE = frozenset({errno.EISDIR, errno.ELOOP})
_ADVICE = {
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EISDIR: "it is not a regular file",
    errno.EROFS: "the file system is mounted read-only",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
    errno.ELOOP: "symbolic links are not followed here",
    errno.EIO: "the device failed; check it before relying on this file system",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def storage_error(
    error: OSError,
    action: str,
    path: str,
    *,
    needed_bytes: int | None = None,
    missing: frozenset[int] = _MISSING,
) -> StorageError:
    """The error to raise for `error`.

    Args:
        error: what the operating system said.
        action: what was tried, as in "cannot <action>".
        path: the file or directory.
        needed_bytes: how much space was asked for, if any.
        missing: the errnos that mean that there is no such object.
    """
    code = error.errno
    if code in _FULL:
        return full_error(action, path, needed_bytes=needed_bytes, code=code)
    kind: type[StorageError] = StorageError
    if code in missing:
        kind = StorageNotFound
    elif code == errno.EEXIST:
        kind = StorageExists
    elif code in _TRANSIENT:
        kind = StorageTransient
    elif code in (errno.ENOLCK, errno.ENOSYS):
        kind = StorageUnsuitable
    advice = _ADVICE.get(code or 0)
    message = f"cannot {action}: {error.strerror or error}" + (f"; {advice}" if advice else "")
    return kind(message, path=path, errno=code)


def is_no_file(error: StorageError) -> bool:
    """Whether a directory, a link or a pipe stands where a file should: not ours, and not absent either."""
    return error.errno in _NO_FILE


def full_error(action: str, path: str, *, needed_bytes: int | None, code: int) -> StorageFull:
    """No space or no quota: say how much is needed and how much is free."""
    free = free_bytes(os.path.dirname(path))
    needed = "" if needed_bytes is None else f"{needed_bytes} bytes needed, "
    limit = "the quota is used up" if code == errno.EDQUOT else "no space left"
    available = "unknown free space" if free is None else f"{free} bytes free"
    return StorageFull(
        f"cannot {action}: {limit} ({needed}{available}); delete something or prune checkpoints",
        path=path,
        errno=code,
    )


def free_bytes(directory: str) -> int | None:
    """Bytes that this user may still write below `directory`, made or not; None where nobody says."""
    while True:
        try:
            usage = os.statvfs(directory)
            break
        except FileNotFoundError:
            parent = os.path.dirname(directory)
            if parent == directory:
                return None
            directory = parent
        except OSError:
            return None
    # User-space file systems may leave all of it at zero: no answer, not a full disk.
    return usage.f_bavail * usage.f_frsize if usage.f_blocks else None


@contextmanager
def translated(action: str, path: str, *, needed_bytes: int | None = None) -> Iterator[None]:
    """Raise every `OSError` of the body as a `StorageError`."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, action, path, needed_bytes=needed_bytes) from error


@contextmanager
def reading(path: str, *, root: str) -> Iterator[None]:
    """As `translated`, for a body that reads `path` and nothing else.

    Args:
        path: the object's file.
        root: the storage's root, to tell a missing object from a missing storage.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _MISSING_FOR_READERS and not os.path.isdir(root):
            message = (
                f"cannot read: there is no storage at {root}; check the path, and that it is mounted here"
            )
            raise StorageNotFound(message, path=path, errno=error.errno) from error
        raise storage_error(error, "read", path, missing=_MISSING_FOR_READERS) from error
