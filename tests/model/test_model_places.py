"""The storages of the model do what every storage must do, and what makes each profile itself."""

from __future__ import annotations

import pytest

from dcp_ckpt.errors import StorageNotFound
from dcp_ckpt.storage import Storage
from dcp_ckpt.testing.storage_suite import StorageSuite
from tests.model.places import FilePlace, ObjectPlace


class TestFilePlace(StorageSuite):
    @pytest.fixture
    def storage(self) -> Storage:
        return FilePlace()


class TestObjectPlace(StorageSuite):
    @pytest.fixture
    def storage(self) -> Storage:
        return ObjectPlace()


def test_a_file_that_is_being_written_moves_with_its_directory() -> None:
    place = FilePlace()
    writer = place.open_writer("old/file", size_bytes=1, direct=False)
    place.rename_directory("old", "new")
    writer.write_segment(0, memoryview(b"x"))
    with pytest.raises(StorageNotFound):
        writer.finish()
    assert place.objects == {"new/file": b"x"}


def test_a_copy_is_independent_and_equal() -> None:
    for place in (FilePlace(), ObjectPlace()):
        place.put("a/b", b"x")
        other = place.copy()
        assert other.fingerprint() == place.fingerprint()
        other.put("a/c", b"y")
        assert other.fingerprint() != place.fingerprint()
        assert "a/c" not in place.objects
