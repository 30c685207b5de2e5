"""A storage whose listings were taken once: a run on an object store is looked at with one LIST.

Owns the listing and keeps it true to what is changed through it. What others change meanwhile it does not
see, so it lives for one start or one look, never for a training. Called by the lifecycle.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable

from dcp_ckpt.errors import StorageExists
from dcp_ckpt.storage.base import Buffer, Lease, ObjectInfo, ObjectWriter, Storage
from dcp_ckpt.storage.forwarding import ForwardingStorage
from dcp_ckpt.storage.keys import check_prefix, names_below

__all__ = ["ListedStorage", "list_again", "listed_once"]


def listed_once(storage: Storage) -> Storage:
    """`storage` with one listing behind it where a listing is a paid request; itself on a file system."""
    if storage.capabilities.directories or isinstance(storage, ListedStorage):
        return storage
    return ListedStorage(storage)


def list_again(storage: Storage) -> None:
    """See what others did since; nothing to do where every listing is a new one."""
    if isinstance(storage, ListedStorage):
        storage.list_again()


class ListedStorage(ForwardingStorage):
    """`inner` as it is listed now; see `Storage` for the methods."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self._sizes: dict[str, dict[str, int]] = {}
        self.list_again()

    def list_again(self) -> None:
        """Take the listing anew: what others did meanwhile counts from here."""
        self._sizes = {}
        for info in self._inner.list(""):
            self._note(info.key, info.size_bytes)

    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        check_prefix(prefix)
        # By first part, so that looking at each of ten thousand step directories stays cheap.
        top = prefix.partition("/")[0]
        groups = [self._sizes.get(top, {})] if prefix else self._sizes.values()
        return [
            ObjectInfo(key=key, size_bytes=size)
            for key, size in sorted(item for group in groups for item in group.items())
            if key.startswith(prefix)
        ]

    def list_names(self, prefix: str) -> builtins.list[str]:
        return names_below((info.key for info in self.list(prefix)), prefix)

    def create_exclusive(self, key: str, data: Buffer) -> None:
        try:
            super().create_exclusive(key, data)
        except StorageExists:
            self._note(key, 0)
            raise
        self._note(key, memoryview(data).nbytes)

    def put(self, key: str, data: Buffer) -> None:
        super().put(key, data)
        self._note(key, memoryview(data).nbytes)

    def open_writer(self, key: str, *, size_bytes: int, direct: bool) -> ObjectWriter:
        return _ListedWriter(
            super().open_writer(key, size_bytes=size_bytes, direct=direct),
            lambda: self._note(key, size_bytes),
        )

    def delete(self, keys: Iterable[str]) -> None:
        keys = tuple(keys)
        super().delete(keys)
        for key in keys:
            self._sizes.get(key.partition("/")[0], {}).pop(key, None)

    def hold_lease(self, key: str) -> Lease:
        lease = super().hold_lease(key)
        self._note(key, 0)
        return lease

    def _note(self, key: str, size_bytes: int) -> None:
        self._sizes.setdefault(key.partition("/")[0], {})[key] = size_bytes


class _ListedWriter:
    def __init__(self, inner: ObjectWriter, finished: Callable[[], None]) -> None:
        self._inner = inner
        self._finished = finished

    @property
    def segment_bytes(self) -> int:
        return self._inner.segment_bytes

    def write_segment(self, offset: int, data: memoryview) -> None:
        self._inner.write_segment(offset, data)

    def finish(self) -> None:
        self._inner.finish()
        self._finished()

    def abort(self) -> None:
        self._inner.abort()
