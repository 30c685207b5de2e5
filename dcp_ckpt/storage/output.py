"""New files that are there all together or not at all, beside whatever else their directory holds.

Owns temporary names and the order in which the final ones appear: on a file system all files are written and
synced first, then renamed, the one that was opened last being renamed last. On an object store a file appears
when it is whole, in the order of writing. Must not know what the files hold. Called by `ops.export`.
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from dcp_ckpt.closing import Closing
from dcp_ckpt.errors import ConfigError, StorageError
from dcp_ckpt.storage.base import ObjectWriter, Storage
from dcp_ckpt.storage.keys import temporary_name
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.storage.os_errors import translated

__all__ = ["Output", "open_output"]


def open_output(storage: Storage, *, replace: bool) -> Output:
    """New files at the root of `storage`, which is closed with them, or at once if this fails.

    Args:
        replace: files of the same names may be replaced.

    Raises:
        ConfigError: `replace` on a store where the new files could not be written before the old ones go.
    """
    if isinstance(storage, LocalStorage):
        return _LocalOutput(storage, replace=replace)
    if replace:
        storage.close()
        raise ConfigError(
            f"{storage.url} is an object store, where new files cannot be made ready beside old ones: delete "
            "the old ones first, or choose another place"
        )
    return _ObjectOutput(storage)


class Output(Closing):
    """A set of files in the making; leaving its `with` block by an error removes them.

    Args:
        storage: closed with this object.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._finished: list[str] = []

    @contextmanager
    def writing(self, name: str, *, size_bytes: int) -> Iterator[ObjectWriter]:
        """Write the file `name`: finished when the block ends, gone when it fails.

        Raises:
            StorageExists: the name is taken, where that is found here.
            StorageFull: there is no room for it.
        """
        # Through the page cache: lengths and addresses are those of tensors, seldom those of pages.
        writer = self.storage.open_writer(self._key(name), size_bytes=size_bytes, direct=False)
        try:
            yield writer
            writer.finish()
        except BaseException:
            writer.abort()
            raise
        self._finished.append(name)

    @abstractmethod
    def publish(self, find_outdated: Callable[[], Iterable[str]]) -> None:
        """Give all files their final names; whoever sees the last one sees all of them.

        Two that publish in one place at a time do so one after the other, where the file system has locks.

        Args:
            find_outdated: says which files must not stand beside the new ones, or raises; they are deleted
                first.

        Raises:
            StorageExists: a name was taken meanwhile, and nothing may be replaced.
        """

    def discard(self) -> None:
        """Remove what was written, as far as storage lets itself be cleaned up."""
        with suppress(StorageError):
            self.storage.delete(map(self._key, reversed(self._finished)))

    def close(self) -> None:
        """Release the storage. Idempotent."""
        self.storage.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.discard()
        self.close()

    @abstractmethod
    def _key(self, name: str) -> str:
        """Where the file `name` is while it is written."""


class _LocalOutput(Output):
    def __init__(self, storage: LocalStorage, *, replace: bool) -> None:
        super().__init__(storage)
        self._local = storage
        self._replace = replace
        self._token = secrets.token_hex(8)
        self._published: list[str] = []

    def publish(self, find_outdated: Callable[[], Iterable[str]]) -> None:
        with translated("lock the directory", self._local.url), self._local.locked():
            # Of several files the last one names the others: an old one must never name new files.
            last = self._finished[-1:] if self._replace and len(self._finished) > 1 else []
            self._local.delete([*last, *find_outdated()])
            names = [(self._key(name), name) for name in self._finished]
            self._local.rename_files(names, replace=self._replace, renamed=self._published)

    def discard(self) -> None:
        is_all_there = self._published == self._finished
        # What has replaced another is not taken away once it is whole: nothing would be left.
        if not (self._replace and is_all_there):
            with suppress(StorageError):
                self._local.delete(reversed(self._published))
        super().discard()
        with suppress(StorageError):
            self._local.remove_own_root()

    def _key(self, name: str) -> str:
        return temporary_name(name, self._token)


class _ObjectOutput(Output):
    def publish(self, find_outdated: Callable[[], Iterable[str]]) -> None:
        """Nothing: what is whole is there already, the last file since a moment ago."""

    def _key(self, name: str) -> str:
        return name
