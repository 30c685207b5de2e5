"""A storage that hands every call on: what wrappers are made of.

Owns the forwarding, so that a wrapper holds only what it changes. Called by the wrappers.
"""

from __future__ import annotations

import builtins
import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from dcp_ckpt.storage.base import (
    Buffer,
    ByteRange,
    Lease,
    ObjectInfo,
    ObjectWriter,
    Storage,
    StorageCapabilities,
)

__all__ = ["ForwardingStorage"]


class ForwardingStorage:
    """Does what `inner` does; see `Storage` for the methods."""

    def __init__(self, inner: Storage) -> None:
        self._inner = inner

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def capabilities(self) -> StorageCapabilities:
        return self._inner.capabilities

    def read(self, key: str) -> bytes:
        return self._inner.read(key)

    def read_ranges(
        self,
        ranges: Sequence[ByteRange],
        consume: Callable[[int, memoryview], None],
        *,
        concurrency: int,
    ) -> None:
        self._inner.read_ranges(ranges, consume, concurrency=concurrency)

    def size(self, key: str) -> int:
        return self._inner.size(key)

    def create_exclusive(self, key: str, data: Buffer) -> None:
        self._inner.create_exclusive(key, data)

    def require_exclusive_create(self) -> None:
        self._inner.require_exclusive_create()

    def put(self, key: str, data: Buffer) -> None:
        self._inner.put(key, data)

    def open_writer(self, key: str, *, size_bytes: int, direct: bool) -> ObjectWriter:
        return self._inner.open_writer(key, size_bytes=size_bytes, direct=direct)

    def link(self, names: Sequence[tuple[str, str]]) -> None:
        self._inner.link(names)

    def list(self, prefix: str) -> list[ObjectInfo]:
        return self._inner.list(prefix)

    def list_names(self, prefix: str) -> builtins.list[str]:
        return self._inner.list_names(prefix)

    def make_directory(self, key: str) -> None:
        self._inner.make_directory(key)

    def delete(self, keys: Iterable[str]) -> None:
        self._inner.delete(keys)

    def remove_directory(self, key: str) -> None:
        self._inner.remove_directory(key)

    def rename_directory(self, key: str, new_key: str) -> None:
        self._inner.rename_directory(key, new_key)

    def abort_uploads(self, prefix: str, is_abandoned: Callable[[str], bool]) -> builtins.list[str]:
        return self._inner.abort_uploads(prefix, is_abandoned)

    def remove_own_root(self) -> None:
        self._inner.remove_own_root()

    def until(self, deadline: float) -> Self:
        view = copy.copy(self)
        view._inner = self._inner.until(deadline)
        return view

    def free_bytes(self) -> int | None:
        return self._inner.free_bytes()

    def hold_lease(self, key: str) -> Lease:
        return self._inner.hold_lease(key)

    def lease_is_held(self, key: str) -> bool:
        return self._inner.lease_is_held(key)

    def close(self) -> None:
        self._inner.close()
