"""Blocks: one place that cannot be read hides nothing else."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dcp_ckpt.errors import StorageError
from dcp_ckpt.format.digests import BLOCK_BYTES, digest
from dcp_ckpt.format.fragment import FileEntry
from dcp_ckpt.ops.blocks import check_file, read_verified
from dcp_ckpt.storage.base import ByteRange
from dcp_ckpt.storage.local import LocalStorage

SIZE = 4 * BLOCK_BYTES + 100
DATA = bytes(i % 251 for i in range(1000)) * (SIZE // 1000 + 1)


class BadSector(LocalStorage):
    """A disk that cannot read block 1, as its driver reports it."""

    def read_ranges(
        self,
        ranges: Sequence[ByteRange],
        consume: Callable[[int, memoryview], None],
        *,
        concurrency: int,
    ) -> None:
        for index, one in enumerate(ranges):
            if one.offset <= BLOCK_BYTES < one.offset + one.num_bytes:
                raise StorageError("cannot read: Input/output error", path=one.key, errno=errno.EIO)
            super().read_ranges([one], lambda _, data, i=index: consume(i, data), concurrency=1)  # type: ignore[misc]


@pytest.fixture
def entry(tmp_path: Path) -> FileEntry:
    data = DATA[:SIZE]
    (tmp_path / "file").write_bytes(data)
    digests = [digest(data[start : start + BLOCK_BYTES]) for start in range(0, SIZE, BLOCK_BYTES)]
    return FileEntry(size_bytes=SIZE, block_digests="".join(digests))


def test_an_unreadable_block_does_not_hide_a_damaged_one_behind_it(tmp_path: Path, entry: FileEntry) -> None:
    with open(tmp_path / "file", "r+b") as file:
        file.seek(3 * BLOCK_BYTES)
        file.write(b"\xff")
    check = check_file(BadSector(tmp_path), "file", SIZE, entry.block_digests)
    assert [(bad.block, bad.error and bad.error.message) for bad in check.bad_blocks] == [
        (1, "cannot read: Input/output error"),
        (3, None),
    ]


def test_an_unreadable_block_is_not_called_corrupt(tmp_path: Path, entry: FileEntry) -> None:
    with pytest.raises(StorageError, match="Input/output"):
        read_verified(BadSector(tmp_path), "file", entry, offset=BLOCK_BYTES, num_bytes=1)


@pytest.mark.parametrize(
    ("offset", "num_bytes"),
    [(0, 0), (0, 1), (5, SIZE - 5), (BLOCK_BYTES - 1, 2), (SIZE - 1, 1), (BLOCK_BYTES, BLOCK_BYTES)],
)
def test_any_range_comes_back_exactly(tmp_path: Path, entry: FileEntry, offset: int, num_bytes: int) -> None:
    found = read_verified(LocalStorage(tmp_path), "file", entry, offset=offset, num_bytes=num_bytes)
    assert found == DATA[offset : offset + num_bytes]
