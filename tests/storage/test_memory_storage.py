"""The reference storage passes the suite."""

from __future__ import annotations

import pytest

from dcp_ckpt.errors import StorageNotFound
from dcp_ckpt.storage import Storage
from dcp_ckpt.storage.base import ByteRange
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.storage.metered import MeteredStorage, RequestCount
from dcp_ckpt.testing.storage_suite import StorageSuite


class TestMemoryStorage(StorageSuite):
    @pytest.fixture
    def storage(self) -> Storage:
        return MemoryStorage()


class TestMeteredMemoryStorage(StorageSuite):
    """Counting changes nothing."""

    @pytest.fixture
    def storage(self) -> Storage:
        return MeteredStorage(MemoryStorage())


def test_an_unfinished_object_is_not_there() -> None:
    storage = MemoryStorage()
    writer = storage.open_writer("a", size_bytes=1, direct=False)
    writer.write_segment(0, memoryview(b"x"))
    with pytest.raises(StorageNotFound):
        storage.read("a")
    writer.finish()
    assert storage.read("a") == b"x"


def test_a_memory_storage_belongs_to_one_object() -> None:
    MemoryStorage("x").put("a", b"x")
    assert MemoryStorage("x").list("") == []


def test_requests_and_bytes_are_counted_by_kind() -> None:
    storage = MeteredStorage(MemoryStorage())
    storage.put("a", b"12345")
    with pytest.raises(StorageNotFound):
        storage.read("missing")
    assert storage.read("a") == b"12345"
    storage.read_ranges(
        [ByteRange(key="a", offset=i, num_bytes=2) for i in range(3)],
        lambda number, data: None,
        concurrency=2,
    )
    writer = storage.open_writer("b", size_bytes=3, direct=False)
    writer.write_segment(0, memoryview(b"123"))
    writer.finish()
    storage.delete(["a", "b"])
    assert storage.counts() == {
        "put": RequestCount(num_requests=1, num_bytes=5),
        "read": RequestCount(num_requests=2, num_bytes=5),
        "read_ranges": RequestCount(num_requests=3, num_bytes=6),
        "open_writer": RequestCount(num_requests=1),
        "write_segment": RequestCount(num_requests=1, num_bytes=3),
        "finish": RequestCount(num_requests=1),
        "delete": RequestCount(num_requests=2),
    }
    assert storage.count("abort") == RequestCount()
