"""What every storage must do, as tests.

Owns the executable form of `dcp_ckpt.storage.base.Storage`. Must not know any one storage. A storage's tests
subclass `StorageSuite` and give it a fixture:

    class TestMyStorage(StorageSuite):
        @pytest.fixture
        def storage(self) -> Iterator[Storage]:
            ...

Assertions explain themselves if conftest.py, before the import, calls
`pytest.register_assert_rewrite("dcp_ckpt.testing")`.
"""

from __future__ import annotations

import pytest

from dcp_ckpt.errors import (
    ConfigError,
    StorageError,
    StorageExists,
    StorageNotFound,
    StorageTransient,
    StorageUnsuitable,
)
from dcp_ckpt.storage.base import ByteRange, Storage
from dcp_ckpt.storage.keys import temporary_name
from dcp_ckpt.testing.storage_write_suite import NUM_RACERS, StorageWriteSuite, race, read_all_ranges

__all__ = ["StorageSuite"]


class StorageSuite(StorageWriteSuite):
    """Base class of a storage's tests; `storage` is empty and not yet used.

    A storage that can be opened twice overrides `reopen`.
    """

    # Ranges.

    @pytest.mark.parametrize("concurrency", [1, 2, 8])
    def test_each_range_is_consumed_once(self, storage: Storage, concurrency: int) -> None:
        data = {key: bytes((i * step) % 251 for i in range(20_000)) for key, step in (("a/x", 1), ("b", 7))}
        for key, content in data.items():
            storage.put(key, content)
        ranges = [
            ByteRange(key=key, offset=offset, num_bytes=num_bytes)
            for offset, num_bytes in ((0, 20_000), (4096, 4096), (19_999, 1), (17, 5000), (20_000, 0))
            for key in ("b", "a/x")
        ]
        got = read_all_ranges(storage, ranges * 10, concurrency=concurrency)
        expected = [data[item.key][item.offset : item.offset + item.num_bytes] for item in ranges * 10]
        assert got == expected

    @pytest.mark.parametrize("concurrency", [1, 8])
    def test_memory_that_is_offered_is_filled_or_left_alone(self, storage: Storage, concurrency: int) -> None:
        content = bytes(i % 251 for i in range(50_000))
        storage.put("a", content)
        memory = [bytearray(7_000) for _ in range(7)]

        def offer(number: int) -> ByteRange:
            whole = memoryview(memory[number])
            # More parts than one system call takes, and empty ones.
            parts = [whole[:0], *(whole[i : i + 1] for i in range(2_000)), whole[2_000:6_500], whole[6_500:]]
            return ByteRange(key="a", offset=number * 7_000, num_bytes=7_000, into=lambda: parts)

        handed = read_all_ranges(storage, [offer(number) for number in range(7)], concurrency=concurrency)
        for number, data in enumerate(handed):
            expected = content[number * 7_000 : (number + 1) * 7_000]
            assert (data, bytes(memory[number])) in ((b"", expected), (expected, bytes(7_000)))

    def test_no_ranges(self, storage: Storage) -> None:
        assert read_all_ranges(storage, [], concurrency=4) == []

    @pytest.mark.parametrize("concurrency", [1, 4])
    def test_an_object_that_ends_early_is_named(self, storage: Storage, concurrency: int) -> None:
        storage.put("a/short", bytes(100))
        ranges = [ByteRange(key="a/short", offset=offset, num_bytes=10) for offset in (0, 50, 95)]
        into = [ByteRange(key="a/short", offset=95, num_bytes=10, into=lambda: [memoryview(bytearray(10))])]
        for asked in (ranges, into):
            with pytest.raises(StorageError, match="a/short") as caught:
                read_all_ranges(storage, asked, concurrency=concurrency)
            assert not isinstance(caught.value, StorageNotFound | StorageTransient)
            assert "95" in str(caught.value)

    @pytest.mark.parametrize("concurrency", [1, 4])
    def test_the_first_failure_of_consume_ends_the_read(self, storage: Storage, concurrency: int) -> None:
        storage.put("a", bytes(1000))
        seen: list[int] = []

        def consume(number: int, data: memoryview) -> None:
            seen.append(number)
            raise LookupError(number)

        ranges = [ByteRange(key="a", offset=i, num_bytes=1) for i in range(500)]
        with pytest.raises(LookupError):
            storage.read_ranges(ranges, consume, concurrency=concurrency)
        assert len(seen) <= concurrency

    def test_concurrency_must_be_positive(self, storage: Storage) -> None:
        with pytest.raises(ConfigError):
            read_all_ranges(storage, [], concurrency=0)

    # Listing and deleting.

    def test_listings_are_sorted_and_complete(self, storage: Storage) -> None:
        for key in ("b", "a/2", "a/10", "a/c/d/e", "ab/x"):
            storage.put(key, key.encode())
        assert [info.key for info in storage.list("")] == ["a/10", "a/2", "a/c/d/e", "ab/x", "b"]
        assert [(info.key, info.size_bytes) for info in storage.list("a/")] == [
            ("a/10", 4),
            ("a/2", 3),
            ("a/c/d/e", 7),
        ]
        assert storage.list_names("") == ["a/", "ab/", "b"]
        assert storage.list_names("a/") == ["10", "2", "c/"]

    def test_what_is_missing_lists_as_empty(self, storage: Storage) -> None:
        assert storage.list("") == []
        assert storage.list_names("") == []
        storage.put("a", b"x")
        assert storage.list("missing/") == []
        assert storage.list_names("missing/deep/") == []

    @pytest.mark.parametrize("prefix", ["a", "/", "/a/", "a//", "../", "a/../"])
    def test_bad_prefixes_are_refused(self, storage: Storage, prefix: str) -> None:
        with pytest.raises(ConfigError):
            storage.list(prefix)
        with pytest.raises(ConfigError):
            storage.list_names(prefix)

    def test_hidden_names_are_not_listed_but_metadata_and_temporary_files_are(self, storage: Storage) -> None:
        temporary = temporary_name("manifest.json", "0123456789abcdef")
        for name in (".metadata", temporary, ".nfs0001", f"{temporary}x", ".hidden/file", "plain"):
            storage.put(f"a/{name}", b"x")
        expected = sorted([".metadata", temporary, "plain"])
        assert storage.list_names("a/") == expected
        assert [info.key for info in storage.list("a/")] == [f"a/{name}" for name in expected]

    def test_delete_removes_and_ignores_what_is_missing(self, storage: Storage) -> None:
        for key in ("a/1", "a/2", "b/1"):
            storage.put(key, b"x")
        storage.delete(iter(["a/1", "b/1", "missing", "missing/deep", "a/2/below", "a/1"]))
        assert [info.key for info in self.reopen(storage).list("")] == ["a/2"]
        storage.delete([])

    # Directories.

    def test_directories(self, storage: Storage) -> None:
        storage.make_directory("a/b")
        storage.make_directory("a/b")
        directories = storage.capabilities.directories
        assert storage.list_names("a/") == (["b/"] if directories else [])
        assert storage.list("") == []
        storage.put("a/b/c", b"x")
        storage.remove_directory("a/b")
        assert storage.read("a/b/c") == b"x"
        storage.delete(["a/b/c"])
        storage.remove_directory("a/b")
        storage.remove_directory("a/b")
        assert storage.list("a/") == []
        # An object store may show the names of emptied prefixes for a while.
        assert not directories or storage.list_names("a/") == []

    def test_renaming_a_directory(self, storage: Storage) -> None:
        storage.put("a/b/c", b"x")
        if not storage.capabilities.directories:
            with pytest.raises(StorageUnsuitable):
                storage.rename_directory("a/b", "new/place")
            return
        storage.rename_directory("a/b", "new/place")
        assert [info.key for info in self.reopen(storage).list("")] == ["new/place/c"]
        with pytest.raises(StorageNotFound):
            storage.rename_directory("a/b", "other")
        storage.put("a/b/d", b"y")
        with pytest.raises(StorageExists):
            storage.rename_directory("new/place", "a/b")
        assert [info.key for info in storage.list("")] == ["a/b/d", "new/place/c"]

    # Leases.

    def test_a_lease_is_held_until_its_last_holder_gives_it_up(self, storage: Storage) -> None:
        other = self.reopen(storage)
        assert not storage.lease_is_held("epochs/1.lease")
        with storage.hold_lease("epochs/1.lease") as first:
            assert other.lease_is_held("epochs/1.lease")
            assert not other.lease_is_held("epochs/2.lease")
            second = other.hold_lease("epochs/1.lease")
            first.close()
            first.close()
            assert storage.lease_is_held("epochs/1.lease")
            second.close()
            assert not other.lease_is_held("epochs/1.lease")
        assert not storage.lease_is_held("epochs/1.lease")

    def test_looking_at_a_lease_leaves_nothing(self, storage: Storage) -> None:
        assert not storage.lease_is_held("epochs/1.lease")
        assert storage.list("") == []

    def test_many_may_look_at_a_held_lease(self, storage: Storage) -> None:
        with storage.hold_lease("lease"):
            assert len(race(lambda racer: storage.lease_is_held("lease"))) == NUM_RACERS

    # The rest.

    def test_asking_for_free_space_leaves_nothing(self, storage: Storage) -> None:
        before = storage.free_bytes()
        assert before is None or before > 0
        assert storage.list("") == []
        assert storage.list_names("") == []
        storage.put("a/b", b"x")
        after = self.reopen(storage).free_bytes()
        assert (after is None) == (before is None)

    def test_close_is_idempotent(self, storage: Storage) -> None:
        storage.close()
        storage.close()

    def test_the_url_says_where(self, storage: Storage) -> None:
        assert storage.url
