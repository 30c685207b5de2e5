"""Leases as shared file locks, which the kernel releases when their holder ends, however it ends.

Owns the lock file's handling. Must not know what is leased. Called by the local storage; raises plain
`OSError`, and `StorageUnsuitable` where the file system does not lock.

The file stays when a lease is given up. To unlink a lock file is a race: one process may hold the lock of a
file that has lost its name while the next one locks a new file of the same name, and both would be alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time

from dcp_ckpt.closing import Closing
from dcp_ckpt.errors import StorageTransient, StorageUnsuitable

__all__ = ["FileLease", "file_lease_is_held"]

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP})
# Whoever asks holds the lock alone for some microseconds, which looks like a holder to others that ask.
_NUM_ASKS = 3
_BETWEEN_ASKS_SECONDS = 0.001
_LONGEST_ASK_SECONDS = 10.0


class FileLease(Closing):
    """Holds the lock file `path`, created if missing, together with any other holders.

    The lock belongs to the open file. A forked child shares it: `close` releases it for both, but a parent
    that dies without `close` leaves it to the child.

    Raises:
        StorageUnsuitable: no file locks here.
        StorageTransient: somebody held the lock alone for seconds, which only a stopped process does.
    """

    def __init__(self, path: str) -> None:
        self._lock = threading.Lock()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            deadline = time.monotonic() + _LONGEST_ASK_SECONDS
            while not _try_lock(self._fd, fcntl.LOCK_SH, path):
                if time.monotonic() > deadline:
                    message = (
                        f"another process has locked this file alone for {_LONGEST_ASK_SECONDS:g} s; end it"
                    )
                    raise StorageTransient(message, path=path, errno=errno.EAGAIN)
                time.sleep(_BETWEEN_ASKS_SECONDS)
        except BaseException:
            os.close(self._fd)
            raise

    def let_run_out(self) -> None:
        self.close()

    def close(self) -> None:
        """Give it up. Idempotent."""
        with self._lock:
            if self._fd < 0:
                return
            fd, self._fd = self._fd, -1
        try:
            fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            os.close(fd)


def file_lease_is_held(path: str) -> bool:
    """Whether anybody holds the lease of `path`; a missing file is held by nobody."""
    try:
        fd = _open_to_ask(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        for ask in range(_NUM_ASKS):
            if ask:
                time.sleep(_BETWEEN_ASKS_SECONDS)
            if _try_lock(fd, fcntl.LOCK_EX, path):
                return False
        return True
    finally:
        os.close(fd)


def _open_to_ask(path: str) -> int:
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        # NFS makes a lock of bytes out of this one, and grants an exclusive one to writers only.
        return os.open(path, os.O_RDWR | flags)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return os.open(path, os.O_RDONLY | flags)


def _try_lock(fd: int, operation: int, path: str) -> bool:
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise StorageUnsuitable(
            "this file system has no file locks, so nobody can tell whether another start is alive; mount it "
            "with them (Lustre: -o flock; NFS: version 4 or a lock daemon) or use another directory",
            path=path,
            errno=error.errno,
        ) from error
    return True
