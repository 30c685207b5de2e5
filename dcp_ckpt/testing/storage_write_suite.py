"""What every storage must do when objects are made: the first half of the storage suite.

Owns the tests of whole objects, exclusive creation and large objects, and what both halves need. Must not
know any one storage. Used through `dcp_ckpt.testing.storage_suite.StorageSuite`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest

from dcp_ckpt.errors import ConfigError, StorageError, StorageExists, StorageNotFound, StorageUnsuitable
from dcp_ckpt.storage.base import ByteRange, Storage

__all__ = [
    "NUM_RACERS",
    "PAGE_BYTES",
    "StorageWriteSuite",
    "race",
    "read_all_ranges",
    "try_to_create",
    "write_object",
]

PAGE_BYTES = 4096
NUM_RACERS = 16
BAD_KEYS = ["", "/", "/absolute", "a//b", "a/", "./a", "a/.", "..", "a/../b", "a\0b"]


class StorageWriteSuite:
    """Tests of everything that makes objects; see `StorageSuite`."""

    def reopen(self, storage: Storage) -> Storage:
        """The same place as another process would open it; the same object where that cannot be."""
        return storage

    # Whole objects.

    def test_what_is_put_is_read(self, storage: Storage) -> None:
        storage.put("a/b.json", b"one")
        assert self.reopen(storage).read("a/b.json") == b"one"
        assert self.reopen(storage).size("a/b.json") == 3

    def test_put_replaces(self, storage: Storage) -> None:
        storage.put("a", b"a longer first")
        storage.put("a", memoryview(bytearray(b"second")))
        assert storage.read("a") == b"second"

    def test_an_empty_object_is_an_object(self, storage: Storage) -> None:
        storage.put("a", b"")
        assert storage.read("a") == b""
        assert storage.size("a") == 0

    def test_reading_what_is_not_there(self, storage: Storage) -> None:
        storage.put("a/b", b"x")
        for key in ("missing", "a/b/c", "missing/b"):
            with pytest.raises(StorageNotFound) as caught:
                storage.read(key)
            assert key in str(caught.value)
            with pytest.raises(StorageNotFound):
                storage.size(key)
            with pytest.raises(StorageNotFound):
                read_all_ranges(storage, [ByteRange(key=key, offset=0, num_bytes=1)])

    def test_what_holds_objects_is_none_itself(self, storage: Storage) -> None:
        storage.put("a/b", b"x")
        # Where there are directories it is not absent either: nobody may take the name.
        expected = StorageError if storage.capabilities.directories else StorageNotFound
        for read in (
            lambda: storage.read("a"),
            lambda: storage.size("a"),
            lambda: read_all_ranges(storage, [ByteRange(key="a", offset=0, num_bytes=1)]),
        ):
            with pytest.raises(expected) as caught:
                read()
            assert type(caught.value) is expected

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_bad_keys_are_refused_by_every_method(self, storage: Storage, key: str) -> None:
        calls: list[Callable[[], object]] = [
            lambda: storage.read(key),
            lambda: storage.size(key),
            lambda: storage.put(key, b""),
            lambda: storage.create_exclusive(key, b""),
            lambda: storage.open_writer(key, size_bytes=0, direct=False),
            lambda: read_all_ranges(storage, [ByteRange(key=key, offset=0, num_bytes=0)]),
            lambda: storage.make_directory(key),
            lambda: storage.remove_directory(key),
            lambda: storage.rename_directory("d", key),
            lambda: storage.rename_directory(key, "d"),
            lambda: storage.link([(key, "d")]),
            lambda: storage.link([("d", key)]),
            lambda: storage.delete([key]),
            lambda: storage.hold_lease(key),
            lambda: storage.lease_is_held(key),
        ]
        for call in calls:
            with pytest.raises(ConfigError):
                call()
        assert storage.list("") == []

    # Names.

    def test_an_object_lives_under_another_name(self, storage: Storage) -> None:
        write_object(storage, "a/one", b"bytes")
        storage.make_directory("b")
        if not storage.capabilities.links:
            with pytest.raises(StorageUnsuitable):
                storage.link([("a/one", "b/two")])
            assert [info.key for info in storage.list("")] == ["a/one"]
            return
        storage.link([("a/one", "b/two")])
        storage.delete(["a/one"])
        assert self.reopen(storage).read("b/two") == b"bytes"
        storage.link([("b/two", "b/three"), ("b/two", "b/four")])
        assert [info.key for info in storage.list("b/")] == ["b/four", "b/three", "b/two"]
        assert {info.size_bytes for info in storage.list("")} == {5}

    def test_a_link_takes_no_name_and_makes_no_directory(self, storage: Storage) -> None:
        storage.put("a/one", b"1")
        if not storage.capabilities.links:
            pytest.skip("no links here")
        storage.put("a/two", b"2")
        with pytest.raises(StorageExists):
            storage.link([("a/one", "a/three"), ("a/one", "a/two")])
        for key, new_key in (("a/missing", "a/three"), ("a/one", "missing/three")):
            with pytest.raises(StorageNotFound):
                storage.link([(key, new_key)])
        with pytest.raises(StorageError):
            storage.link([("a", "a/three")])
        assert [info.key for info in storage.list("")] == ["a/one", "a/two"]
        assert storage.read("a/two") == b"2"

    # Exclusive creation.

    def test_create_exclusive_creates_once(self, storage: Storage) -> None:
        storage.make_directory("a")
        storage.create_exclusive("a/b", b"first")
        with pytest.raises(StorageExists):
            self.reopen(storage).create_exclusive("a/b", b"second")
        assert storage.read("a/b") == b"first"
        assert storage.list_names("a/") == ["b"]

    def test_create_exclusive_respects_what_put_and_writers_made(self, storage: Storage) -> None:
        storage.put("a/put", b"x")
        write_object(storage, "a/written", b"x")
        for key in ("a/put", "a/written"):
            with pytest.raises(StorageExists):
                storage.create_exclusive(key, b"y")

    def test_a_deleted_name_is_free_again(self, storage: Storage) -> None:
        storage.make_directory("a")
        storage.create_exclusive("a/b", b"first")
        storage.delete(["a/b"])
        storage.create_exclusive("a/b", b"second")
        assert storage.read("a/b") == b"second"

    def test_create_exclusive_makes_no_directory(self, storage: Storage) -> None:
        if not storage.capabilities.directories:
            pytest.skip("no directories here")
        for key in ("top", "a/b"):
            with pytest.raises(StorageNotFound):
                storage.create_exclusive(key, b"x")
        assert storage.list("") == []

    def test_one_of_many_threads_creates(self, storage: Storage) -> None:
        storage.make_directory("a")
        for number in range(4):
            key = f"a/{number}"
            winners = race(partial(try_to_create, self.reopen(storage), key))
            assert len(winners) == 1
            assert storage.read(key) == bytes([winners[0]])
        assert storage.list_names("a/") == ["0", "1", "2", "3"]

    def test_a_replaced_object_is_never_seen_in_part(self, storage: Storage) -> None:
        contents = [bytes([value]) * 300_000 for value in (1, 2)]
        storage.put("a", contents[0])
        torn: list[int] = []
        done = threading.Event()

        def look() -> None:
            while not done.is_set():
                data = storage.read("a")
                if data not in contents:
                    torn.append(len(data))

        reader = threading.Thread(target=look)
        reader.start()
        try:
            for number in range(20):
                storage.put("a", contents[number % 2])
        finally:
            done.set()
            reader.join()
        assert torn == []

    # Large objects.

    @pytest.mark.parametrize("direct", [False, True])
    @pytest.mark.parametrize(
        "segments",
        [
            [(0, PAGE_BYTES)],
            [(0, PAGE_BYTES), (PAGE_BYTES, 3 * PAGE_BYTES)],
            [(0, 1), (1, PAGE_BYTES), (PAGE_BYTES + 1, 2 * PAGE_BYTES)],
            [(0, 100), (PAGE_BYTES, 2 * PAGE_BYTES + 7)],
            [(0, 2 * PAGE_BYTES), (5 * PAGE_BYTES, PAGE_BYTES), (7 * PAGE_BYTES - 3, 3)],
            [(3 * PAGE_BYTES + 5, 2 * PAGE_BYTES)],
        ],
        ids=["page", "pages", "unaligned", "tail", "gaps", "late"],
    )
    def test_segments_come_back(
        self, storage: Storage, direct: bool, segments: list[tuple[int, int]]
    ) -> None:
        size_bytes = sum(segments[-1])
        expected = bytearray(size_bytes)
        writer = storage.open_writer("a/data", size_bytes=size_bytes, direct=direct)
        for number, (offset, num_bytes) in enumerate(segments, start=1):
            data = bytes((number * 37 + i) % 251 for i in range(num_bytes))
            expected[offset : offset + num_bytes] = data
            writer.write_segment(offset, memoryview(data))
        writer.finish()
        writer.finish()
        assert self.reopen(storage).read("a/data") == expected
        assert storage.size("a/data") == size_bytes

    def test_an_empty_large_object(self, storage: Storage) -> None:
        storage.open_writer("a", size_bytes=0, direct=True).finish()
        assert storage.read("a") == b""

    def test_a_writer_respects_a_taken_name(self, storage: Storage) -> None:
        storage.put("a", b"first")
        with pytest.raises(StorageExists):
            write_object(storage, "a", b"second")
        assert storage.read("a") == b"first"

    def test_an_incomplete_object_cannot_be_finished(self, storage: Storage) -> None:
        writer = storage.open_writer("a", size_bytes=2 * PAGE_BYTES, direct=False)
        writer.write_segment(0, memoryview(bytes(PAGE_BYTES)))
        for _ in range(2):
            with pytest.raises(StorageError):
                writer.finish()
        writer.abort()
        assert storage.list("") == []

    def test_segments_must_ascend_and_fit(self, storage: Storage) -> None:
        writer = storage.open_writer("a", size_bytes=2 * PAGE_BYTES, direct=False)
        writer.write_segment(0, memoryview(bytes(PAGE_BYTES)))
        for offset, num_bytes in ((PAGE_BYTES - 1, 1), (PAGE_BYTES, PAGE_BYTES + 1)):
            with pytest.raises(ConfigError):
                writer.write_segment(offset, memoryview(bytes(num_bytes)))
        writer.abort()

    def test_abort_removes_and_frees_the_name(self, storage: Storage) -> None:
        writer = storage.open_writer("a/data", size_bytes=PAGE_BYTES, direct=False)
        writer.write_segment(0, memoryview(bytes(100)))
        writer.abort()
        writer.abort()
        assert storage.list("") == []
        with pytest.raises(StorageError):
            writer.write_segment(100, memoryview(b"x"))
        with pytest.raises(StorageError):
            writer.finish()
        write_object(storage, "a/data", b"again")
        assert storage.read("a/data") == b"again"

    def test_abort_after_finish_changes_nothing(self, storage: Storage) -> None:
        writer = storage.open_writer("a", size_bytes=1, direct=False)
        writer.write_segment(0, memoryview(b"x"))
        writer.finish()
        writer.abort()
        assert storage.read("a") == b"x"


def write_object(storage: Storage, key: str, data: bytes) -> None:
    writer = storage.open_writer(key, size_bytes=len(data), direct=False)
    try:
        writer.write_segment(0, memoryview(data))
        writer.finish()
    except BaseException:
        writer.abort()
        raise


def read_all_ranges(storage: Storage, ranges: list[ByteRange], *, concurrency: int = 1) -> list[bytes]:
    """Contents in the order of `ranges`; a range consumed twice fails."""
    got: dict[int, bytes] = {}
    lock = threading.Lock()

    def consume(number: int, data: memoryview) -> None:
        with lock:
            assert number not in got
            got[number] = bytes(data)

    storage.read_ranges(ranges, consume, concurrency=concurrency)
    return [got[number] for number in range(len(ranges))]


def try_to_create(storage: Storage, key: str, racer: int) -> bool:
    try:
        storage.create_exclusive(key, bytes([racer]))
    except StorageExists:
        return False
    return True


def race(attempt: Callable[[int], bool]) -> list[int]:
    """Run `attempt` in many threads at the same moment; the numbers of those for which it is true."""
    barrier = threading.Barrier(NUM_RACERS)
    winners: list[int] = []
    errors: list[BaseException] = []

    def run(racer: int) -> None:
        barrier.wait()
        try:
            if attempt(racer):
                winners.append(racer)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(racer,)) for racer in range(NUM_RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return winners
