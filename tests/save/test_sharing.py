"""The writer's part of sharing a file: a link, or a checked copy where links are refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dcp_ckpt.errors import StorageError, StorageExists, StorageNotFound
from dcp_ckpt.format.digests import BLOCK_BYTES, digest
from dcp_ckpt.format.fragment import FileEntry, FileOrigin
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.storage.system_calls import SystemCalls
from dcp_ckpt.writer.sharing import SharedFile, share_files

ORIGIN = FileOrigin(directory="step-00000001", attempt="e0001-s000001", file=0)
DATA = bytes(range(256)) * (9 << 12) + b"the end"
REFUSALS = [errno.EMLINK, errno.EPERM, errno.EXDEV, errno.ENOTSUP]


def entry_of(data: bytes) -> FileEntry:
    blocks = [data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES)]
    return FileEntry(size_bytes=len(data), block_digests="".join(map(digest, blocks)), origin=ORIGIN)


def run(path: Path, *, refusal: int | None = None) -> LocalStorage:
    def link(source: str, target: str) -> None:
        if refusal is not None:
            raise OSError(refusal, os.strerror(refusal), target)
        os.link(source, target)

    storage = LocalStorage(path, calls=SystemCalls(link=link))
    storage.put("old/file", DATA)
    storage.make_directory("new")
    return storage


def share(storage: Storage, key: str, new_key: str, entry: FileEntry) -> FileEntry:
    (found,) = share_files(storage, [SharedFile(key=key, new_key=new_key, entry=entry)], tell)
    return found


def tell(key: str, *, bytes_done: int, bytes_total: int) -> None:
    """Nobody listens."""


def test_a_shared_file_is_one_file(tmp_path: Path) -> None:
    storage = run(tmp_path)
    assert share(storage, "old/file", "new/file", entry_of(DATA)) == entry_of(DATA)
    assert (tmp_path / "new/file").samefile(tmp_path / "old/file")


@pytest.mark.parametrize("refusal", REFUSALS, ids=errno.errorcode.get)
def test_where_links_are_refused_the_bytes_are_copied_and_the_copy_has_no_origin(
    tmp_path: Path, refusal: int
) -> None:
    storage = run(tmp_path, refusal=refusal)
    found = share(storage, "old/file", "new/file", entry_of(DATA))
    assert found.origin is None
    assert found.block_digests == entry_of(DATA).block_digests
    assert storage.read("new/file") == DATA
    assert (tmp_path / "new/file").stat().st_nlink == 1


def test_damage_is_not_copied(tmp_path: Path) -> None:
    storage = run(tmp_path, refusal=errno.EPERM)
    entry = entry_of(DATA[:-1] + b"x")
    with pytest.raises(StorageError, match="block 9 differs from its digest"):
        share(storage, "old/file", "new/file", entry)
    assert storage.list_names("new/") == []


def test_another_size_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"{len(DATA)} bytes instead of {len(DATA) + 1}"):
        share(run(tmp_path), "old/file", "new/file", entry_of(DATA + b"x"))


def test_what_is_gone_is_named(tmp_path: Path) -> None:
    storage = run(tmp_path)
    for key, new_key in (("old/gone", "new/file"), ("old/file", "gone/file")):
        with pytest.raises(StorageNotFound, match=r"not changed since old cannot be shared"):
            share(storage, key, new_key, entry_of(DATA))
    assert storage.list_names("") == ["new/", "old/"]


def test_nothing_is_replaced_and_no_symbolic_link_is_shared(tmp_path: Path) -> None:
    storage = run(tmp_path)
    storage.put("new/file", b"x")
    with pytest.raises(StorageExists):
        share(storage, "old/file", "new/file", entry_of(DATA))
    assert storage.read("new/file") == b"x"
    (tmp_path / "old/link").symlink_to(tmp_path / "old/file")
    with pytest.raises(StorageError, match="symbolic links"):
        share(storage, "old/link", "new/other", entry_of(DATA))
    assert storage.list_names("new/") == ["file"]


def test_a_name_that_cannot_be_made_durable_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = run(tmp_path)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError):
        share(storage, "old/file", "new/file", entry_of(DATA))
    assert storage.list_names("new/") == []
