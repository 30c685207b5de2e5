"""Whole files under their final names: a durable temporary file, then one atomic step.

Owns temporary files and the choice of the atomic step (docs/format.md, section 8). Must not know keys. Called
by the local storage, which syncs the directory afterwards; raises plain `OSError`, and `StorageUnsuitable`.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from dcp_ckpt.errors import StorageUnsuitable
from dcp_ckpt.storage.base import Buffer
from dcp_ckpt.storage.keys import temporary_name
from dcp_ckpt.storage.system_calls import SystemCalls

__all__ = ["LINK_REFUSED", "Publisher", "link_file", "temporary_file"]


LINK_REFUSED = frozenset(
    {
        errno.EACCES,
        errno.EINVAL,
        errno.EMLINK,
        errno.ENOSYS,
        errno.ENOTSUP,
        errno.EPERM,
        errno.EXDEV,
    }
)
"""Not "this name cannot be had", but "this file system does not do that", or not with this file."""


class Publisher:
    """Gives finished temporary files their final names, never replacing anything.

    Which way the file system offers is learned at the first use: hard link, else rename without replacing,
    else (a single writer only) a look and a rename.

    Args:
        calls: the system calls.
        single_writer: the user vouches that no other process creates files here.
    """

    def __init__(self, calls: SystemCalls, *, single_writer: bool) -> None:
        self._lock = threading.Lock()
        self._ways: list[Callable[[str, str], None]] = [
            lambda temporary, final: link_file(calls, temporary, final),
            calls.rename_without_replacing,
        ]
        self._num_atomic_ways = len(self._ways)
        if single_writer:
            self._ways.append(self._look_and_rename)
        self._chosen: int | None = None

    @property
    def atomic(self) -> bool | None:
        """Whether exclusive creation holds among processes; None until the first use."""
        return None if self._chosen is None else self._chosen < self._num_atomic_ways

    @property
    def links(self) -> bool:
        """Whether the file system has hard links; False until the first use."""
        return self._chosen == 0

    def publish(self, temporary: str, final: str) -> None:
        """Give `temporary` the name `final`; the temporary name may remain, for the caller to remove.

        Raises:
            FileExistsError: `final` exists.
            StorageUnsuitable: the file system has no atomic way, and nobody vouched for a single writer.
        """
        refusal: OSError | None = None
        for number in range(self._chosen or 0, len(self._ways)):
            try:
                self._ways[number](temporary, final)
            except FileExistsError:
                self._chosen = number
                raise
            except OSError as error:
                if error.errno not in LINK_REFUSED or self._chosen is not None:
                    raise
                refusal = error
            else:
                self._chosen = number
                return
        raise StorageUnsuitable(
            "this file system can neither hard-link nor rename without replacing, so two writers could "
            "overwrite each other's checkpoints; use another directory, or vouch for a single writer "
            "(LocalStorage(root, single_writer=True))",
            path=final,
            errno=refusal.errno if refusal else None,
        ) from refusal

    def _look_and_rename(self, temporary: str, final: str) -> None:
        with self._lock:
            if os.path.lexists(final):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), final)
            os.rename(temporary, final)


@contextmanager
def temporary_file(final: str, data: Buffer, calls: SystemCalls) -> Iterator[str]:
    """A durable file of `data` under a temporary name beside `final`; the name is gone afterwards.

    Yields:
        The temporary path, to be linked or renamed.
    """
    directory, name = os.path.split(final)
    path = os.path.join(directory, temporary_name(name, os.urandom(8).hex()))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o666)
    try:
        try:
            _write_whole(fd, memoryview(data).cast("B"), calls)
            os.fsync(fd)
        finally:
            os.close(fd)
        yield path
    finally:
        # Renamed away is the usual way to be missing. A name that cannot be removed is left for a sweep: the
        # outcome of the publish is what the caller must hear.
        with suppress(OSError):
            os.unlink(path)


def _write_whole(fd: int, data: memoryview, calls: SystemCalls) -> None:
    position = 0
    while position < len(data):
        written = calls.pwrite(fd, data[position:], position)
        if written == 0:
            raise OSError(errno.EIO, "the file system accepts no more bytes")
        position += written
    size = os.fstat(fd).st_size
    if size != len(data):
        raise OSError(errno.EIO, f"the file has {size} bytes where {len(data)} were written")


def link_file(calls: SystemCalls, path: str, new_path: str) -> None:
    """Give a file one more name, which is not durable yet.

    Raises:
        FileExistsError: another file has the name.
        OSError: with an errno of LINK_REFUSED where this cannot be done.
    """
    try:
        calls.link(path, new_path)
    except FileExistsError:
        # A network file system that repeats a request whose answer was lost reports its own success as a
        # collision.
        if not os.path.samestat(os.lstat(path), os.lstat(new_path)):
            raise
