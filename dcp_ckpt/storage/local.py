"""Checkpoints in a directory: a POSIX file system, on this machine or shared by many.

Owns keys as paths and the durability of names: whatever a method made or removed survives a power loss once
it has returned. Must not know what a checkpoint is. Made by `open_storage`, used by lifecycle, writer and
load.
"""

from __future__ import annotations

import builtins
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import groupby
from typing import TypeVar
from urllib.parse import quote

from dcp_ckpt.errors import StorageExists, StorageNotFound, StorageTransient, StorageUnsuitable
from dcp_ckpt.storage.base import Buffer, ByteRange, Lease, ObjectInfo, ObjectWriter, StorageCapabilities
from dcp_ckpt.storage.directories import locked_directory, make_directories, sync_directory
from dcp_ckpt.storage.keys import check_key, check_prefix
from dcp_ckpt.storage.local_abilities import try_out, usual_capabilities
from dcp_ckpt.storage.local_lease import FileLease, file_lease_is_held
from dcp_ckpt.storage.local_listing import list_objects, list_parts
from dcp_ckpt.storage.local_reader import read_file, read_file_ranges
from dcp_ckpt.storage.local_writer import LocalObjectWriter
from dcp_ckpt.storage.os_errors import free_bytes, reading, translated
from dcp_ckpt.storage.paths import path_below
from dcp_ckpt.storage.publishing import LINK_REFUSED, Publisher, link_file, temporary_file
from dcp_ckpt.storage.ranges import check_ranges
from dcp_ckpt.storage.system_calls import SystemCalls

__all__ = ["SINGLE_WRITER_SCHEME", "LocalStorage"]

SINGLE_WRITER_SCHEME = "file+single-writer"
T = TypeVar("T")


class LocalStorage:
    """Files below `root`; see `Storage` for the methods.

    `root` is made, with its parents, when something is first written below it. `put`, `open_writer` and
    `hold_lease` make missing directories; `create_exclusive` never does. Symbolic links
    below the root are named by `list_names` and never followed.

    Args:
        root: a path; relative ones are made absolute now.
        single_writer: accept a file system that cannot create exclusively, because no other process writes
            here.
        calls: the system calls that file systems may refuse.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        single_writer: bool = False,
        calls: SystemCalls | None = None,
    ) -> None:
        self._root = os.path.abspath(root)
        self._single_writer = single_writer
        self._calls = calls or SystemCalls()
        self._publisher = Publisher(self._calls, single_writer=single_writer)
        self._lock = threading.Lock()
        self._capabilities: StorageCapabilities | None = None
        self._made_roots: builtins.list[str] = []

    @property
    def url(self) -> str:
        """The absolute path; with `single_writer` an URL that says so."""
        return f"{SINGLE_WRITER_SCHEME}://{quote(self._root)}" if self._single_writer else self._root

    @property
    def capabilities(self) -> StorageCapabilities:
        """Learned by trial in `root` at the first use, leaving nothing behind.

        Where `root` is missing or cannot be written there is nothing to try: the usual abilities are
        reported, and the first write says if they are not there.
        """
        with self._lock:
            if self._capabilities is not None:
                return self._capabilities
            try:
                self._capabilities = try_out(self._root, self._publisher, self._calls)
            except OSError:
                return usual_capabilities()
            return self._capabilities

    def read(self, key: str) -> bytes:
        return read_file(self._path(key), root=self._root)

    def read_ranges(
        self,
        ranges: Sequence[ByteRange],
        consume: Callable[[int, memoryview], None],
        *,
        concurrency: int,
    ) -> None:
        """Each thread has one buffer as long as the longest range: keep ranges to a few MiB."""
        check_ranges(ranges, concurrency=concurrency)
        read_file_ranges(ranges, consume, concurrency=concurrency, root=self._root)

    def size(self, key: str) -> int:
        path = self._path(key)
        with reading(path, root=self._root):
            return _require_file(path).st_size

    def create_exclusive(self, key: str, data: Buffer) -> None:
        path = self._path(key)
        with translated("create the file", path, needed_bytes=memoryview(data).nbytes):
            self._create(path, data)

    def require_exclusive_create(self) -> None:
        """Nothing to do: the first creation finds out by itself, and leaves nothing where it cannot hold."""

    def put(self, key: str, data: Buffer) -> None:
        path = self._path(key)
        with translated("write the file", path, needed_bytes=memoryview(data).nbytes):
            self._in_directory(path, lambda: self._put(path, data))

    def open_writer(self, key: str, *, size_bytes: int, direct: bool) -> ObjectWriter:
        path = self._path(key)
        with translated("create the file", path, needed_bytes=size_bytes):
            return self._in_directory(
                path,
                lambda: LocalObjectWriter(path, size_bytes=size_bytes, direct=direct, calls=self._calls),
            )

    def link(self, names: Sequence[tuple[str, str]]) -> None:
        paths = [(self._path(key), self._path(new_key)) for key, new_key in names]
        made: builtins.list[str] = []
        try:
            for path, new_path in paths:
                with translated("link the file", new_path):
                    self._link(path, new_path)
                made.append(new_path)
            # All names first: one journal then has them all, and most syncs find nothing left to do.
            for new_path in made:
                with translated("sync the file", new_path):
                    _sync_file(new_path)
            for directory in dict.fromkeys(map(os.path.dirname, made)):
                with translated("sync the directory", directory):
                    sync_directory(directory)
        except BaseException:
            for new_path in made:
                with suppress(OSError):
                    os.unlink(new_path)
            raise

    def list(self, prefix: str) -> list[ObjectInfo]:
        check_prefix(prefix)
        with translated("list the directory", os.path.join(self._root, prefix)):
            return list_objects(self._root, prefix)

    def list_names(self, prefix: str) -> builtins.list[str]:
        check_prefix(prefix)
        with translated("list the directory", os.path.join(self._root, prefix)):
            return list_parts(self._root, prefix)

    def make_directory(self, key: str) -> None:
        path = self._path(key)
        with translated("make the directory", path):
            self._make_directories(path)

    def delete(self, keys: Iterable[str]) -> None:
        paths = [self._path(key) for key in keys]
        # One sync per run of equal parents: the order holds across directories, too.
        for directory, siblings in groupby(paths, key=os.path.dirname):
            for path in siblings:
                with translated("delete the file", path), suppress(FileNotFoundError, NotADirectoryError):
                    os.unlink(path)
            with (
                translated("sync the directory", directory),
                suppress(FileNotFoundError, NotADirectoryError),
            ):
                sync_directory(directory)

    def remove_directory(self, key: str) -> None:
        path = self._path(key)
        with translated("remove the directory", path):
            _remove_if_empty(path)

    def rename_directory(self, key: str, new_key: str) -> None:
        """A directory that stands under the new name is an error, unless it is empty."""
        path, new_path = self._path(key), self._path(new_key)
        with translated("rename the directory", path):
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            try:
                self._in_directory(new_path, lambda: os.rename(path, new_path))
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                message = f"cannot rename the directory {path}: the new name is taken"
                raise StorageExists(message, path=new_path, errno=error.errno) from error
            # The new name first: should the power fail in between, two names are better than none.
            sync_directory(os.path.dirname(new_path))
            sync_directory(os.path.dirname(path))

    def locked(self) -> AbstractContextManager[None]:
        """`locked_directory` of the root; raises plain `OSError`. Beyond `Storage`, for `rename_files`."""
        return locked_directory(self._root)

    def rename_files(
        self, names: Iterable[tuple[str, str]], *, replace: bool, renamed: builtins.list[str]
    ) -> None:
        """Move files within their directories, one after the other, each atomically and durably.

        Beyond `Storage`, since no object store can.

        Args:
            names: old and new keys.
            replace: whatever has a new name; without it, that is an error.
            renamed: gets the new keys that were given, also when this fails halfway.

        Raises:
            StorageExists: a new name is taken.
        """
        for key, new_key in names:
            path, new_path = self._path(key), self._path(new_key)
            with translated("rename the file", new_path):
                if replace:
                    os.replace(path, new_path)
                else:
                    self._publisher.publish(path, new_path)
                renamed.append(new_key)
                with suppress(FileNotFoundError):
                    os.unlink(path)
                sync_directory(os.path.dirname(new_path))

    def abort_uploads(self, prefix: str, is_abandoned: Callable[[str], bool]) -> builtins.list[str]:
        """None: an unfinished file has a name of its own, and is listed."""
        check_prefix(prefix)
        return []

    def remove_own_root(self) -> None:
        """Others may use what was made here by now: then it is not empty."""
        while self._made_roots:
            path = self._made_roots.pop()
            with translated("remove the directory", path):
                if not _remove_if_empty(path):
                    self._made_roots.clear()

    def until(self, deadline: float) -> LocalStorage:
        return self

    def free_bytes(self) -> int | None:
        """What the file system tells this user (`statvfs`) of `root`, or of the parent that it is made in.

        Believed as it is, but for file systems that say nothing. One that compresses may hold more; a quota
        that the file system does not report, or a thinly provisioned volume, less.
        """
        return free_bytes(self._root)

    def hold_lease(self, key: str) -> Lease:
        path = self._path(key)
        with translated("hold the lease", path):
            return self._in_directory(path, lambda: FileLease(path))

    def lease_is_held(self, key: str) -> bool:
        path = self._path(key)
        with translated("look at the lease", path):
            return file_lease_is_held(path)

    def close(self) -> None:
        """Nothing is held between calls."""

    def _path(self, key: str) -> str:
        return path_below(self._root, check_key(key))

    def _in_directory(self, path: str, write: Callable[[], T]) -> T:
        """Call `write`, which makes `path`; make the directory first if it turns out to be missing."""
        try:
            return write()
        except FileNotFoundError:
            self._make_directories(os.path.dirname(path))
            return write()

    def _make_directories(self, directory: str) -> None:
        made: builtins.list[str] = []
        try:
            make_directories(directory, root=self._root, made=made)
        finally:
            self._made_roots += [path for path in made if len(path) <= len(self._root)]

    def _create(self, path: str, data: Buffer) -> None:
        directory = os.path.dirname(path)
        try:
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            with temporary_file(path, data, self._calls) as temporary:
                self._publish(temporary, path)
        except FileExistsError:
            # The caller may find its own bytes there and call them durable: its creator may not have come so
            # far.
            sync_directory(directory)
            raise
        except FileNotFoundError as error:
            if os.path.lexists(path):
                # Somebody else created it, and swept our temporary file as that of one who came too late.
                taken = f"cannot create the file {path}: the name is taken"
                raise StorageExists(taken, path=path, errno=errno.EEXIST) from error
            # Not made here: it may have been moved away so that nothing more is published in it.
            message = "cannot create the file: its directory was never made, or is gone"
            raise StorageNotFound(message, path=path, errno=error.errno) from error
        try:
            sync_directory(directory)
        except OSError as error:
            raise _outcome_unknown(error, path) from error

    def _link(self, path: str, new_path: str) -> None:
        try:
            _require_file(path)
            link_file(self._calls, path, new_path)
        except OSError as error:
            if error.errno not in LINK_REFUSED:
                raise
            message = f"cannot give {path} another name: {error.strerror}"
            raise StorageUnsuitable(message, path=new_path, errno=error.errno) from error

    def _publish(self, temporary: str, path: str) -> None:
        try:
            self._publisher.publish(temporary, path)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise _outcome_unknown(error, path) from error

    def _put(self, path: str, data: Buffer) -> None:
        with temporary_file(path, data, self._calls) as temporary:
            os.replace(temporary, path)
        sync_directory(os.path.dirname(path))


def _require_file(path: str) -> os.stat_result:
    """The status of a regular file; anything else under that name is an error."""
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
    if not stat.S_ISREG(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    return status


def _sync_file(path: str) -> None:
    """Make a file durable that somebody else wrote: whoever copied it here may not have."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_if_empty(path: str) -> bool:
    """Remove a directory durably; False when there is something in it. One that is gone is fine."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    sync_directory(os.path.dirname(path))
    return True


def _outcome_unknown(error: OSError, path: str) -> StorageTransient:
    message = (
        f"the file may or may not have been created durably ({error.strerror}); create it again to learn"
    )
    return StorageTransient(message, path=path, errno=error.errno)
