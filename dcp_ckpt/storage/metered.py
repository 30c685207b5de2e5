"""Counts what is asked of a storage: requests and bytes by kind.

Owns the counting; changes nothing on the way. Wraps any storage; used by benchmarks and tests that hold a
bound on requests or bytes.
"""

from __future__ import annotations

import builtins
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dcp_ckpt.storage.base import Buffer, ByteRange, Lease, ObjectInfo, ObjectWriter, Storage
from dcp_ckpt.storage.forwarding import ForwardingStorage

__all__ = ["MeteredStorage", "RequestCount"]


@dataclass(frozen=True, kw_only=True)
class RequestCount:
    """How often something was asked for, and how many payload bytes went over."""

    num_requests: int = 0
    num_bytes: int = 0


class MeteredStorage(ForwardingStorage):
    """A storage that counts, and otherwise does what `inner` does.

    Kinds are the names of the methods, also those of writers (`write_segment`, `finish`, `abort`). Each range
    of `read_ranges` and each key of `delete` counts as one request. A request that fails counts, without
    bytes.
    """

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._num_requests: Counter[str] = Counter()
        self._num_bytes: Counter[str] = Counter()

    def counts(self) -> Mapping[str, RequestCount]:
        """What was asked for so far, by kind, as of now; kinds never asked for are missing."""
        with self._lock:
            return {
                kind: RequestCount(num_requests=count, num_bytes=self._num_bytes[kind])
                for kind, count in self._num_requests.items()
            }

    def count(self, kind: str) -> RequestCount:
        """What was asked for of one kind so far."""
        return self.counts().get(kind, RequestCount())

    def read(self, key: str) -> bytes:
        self._add_request("read")
        data = self._inner.read(key)
        self._add_bytes("read", len(data))
        return data

    def read_ranges(
        self,
        ranges: Sequence[ByteRange],
        consume: Callable[[int, memoryview], None],
        *,
        concurrency: int,
    ) -> None:
        self._add_request("read_ranges", len(ranges))

        def count_and_consume(number: int, data: memoryview) -> None:
            self._add_bytes("read_ranges", ranges[number].num_bytes)
            consume(number, data)

        self._inner.read_ranges(ranges, count_and_consume, concurrency=concurrency)

    def size(self, key: str) -> int:
        self._add_request("size")
        return self._inner.size(key)

    def create_exclusive(self, key: str, data: Buffer) -> None:
        self._add_request("create_exclusive")
        self._inner.create_exclusive(key, data)
        self._add_bytes("create_exclusive", memoryview(data).nbytes)

    def require_exclusive_create(self) -> None:
        self._add_request("require_exclusive_create")
        self._inner.require_exclusive_create()

    def put(self, key: str, data: Buffer) -> None:
        self._add_request("put")
        self._inner.put(key, data)
        self._add_bytes("put", memoryview(data).nbytes)

    def open_writer(self, key: str, *, size_bytes: int, direct: bool) -> ObjectWriter:
        self._add_request("open_writer")
        writer = self._inner.open_writer(key, size_bytes=size_bytes, direct=direct)
        return _MeteredWriter(writer, self._add_request, self._add_bytes)

    def link(self, names: Sequence[tuple[str, str]]) -> None:
        self._add_request("link", len(names))
        self._inner.link(names)

    def list(self, prefix: str) -> list[ObjectInfo]:
        self._add_request("list")
        return self._inner.list(prefix)

    def list_names(self, prefix: str) -> builtins.list[str]:
        self._add_request("list_names")
        return self._inner.list_names(prefix)

    def make_directory(self, key: str) -> None:
        self._add_request("make_directory")
        self._inner.make_directory(key)

    def delete(self, keys: Iterable[str]) -> None:
        keys = tuple(keys)
        self._add_request("delete", len(keys))
        self._inner.delete(keys)

    def remove_directory(self, key: str) -> None:
        self._add_request("remove_directory")
        self._inner.remove_directory(key)

    def rename_directory(self, key: str, new_key: str) -> None:
        self._add_request("rename_directory")
        self._inner.rename_directory(key, new_key)

    def abort_uploads(self, prefix: str, is_abandoned: Callable[[str], bool]) -> builtins.list[str]:
        self._add_request("abort_uploads")
        return self._inner.abort_uploads(prefix, is_abandoned)

    def free_bytes(self) -> int | None:
        self._add_request("free_bytes")
        return self._inner.free_bytes()

    def hold_lease(self, key: str) -> Lease:
        self._add_request("hold_lease")
        return self._inner.hold_lease(key)

    def lease_is_held(self, key: str) -> bool:
        self._add_request("lease_is_held")
        return self._inner.lease_is_held(key)

    def _add_request(self, kind: str, num_requests: int = 1) -> None:
        with self._lock:
            self._num_requests[kind] += num_requests

    def _add_bytes(self, kind: str, num_bytes: int) -> None:
        with self._lock:
            self._num_bytes[kind] += num_bytes


class _MeteredWriter:
    def __init__(
        self,
        inner: ObjectWriter,
        add_request: Callable[[str], None],
        add_bytes: Callable[[str, int], None],
    ) -> None:
        self._inner = inner
        self._add_request = add_request
        self._add_bytes = add_bytes

    @property
    def segment_bytes(self) -> int:
        return self._inner.segment_bytes

    def write_segment(self, offset: int, data: memoryview) -> None:
        self._add_request("write_segment")
        self._inner.write_segment(offset, data)
        self._add_bytes("write_segment", data.nbytes)

    def finish(self) -> None:
        self._add_request("finish")
        self._inner.finish()

    def abort(self) -> None:
        self._add_request("abort")
        self._inner.abort()
