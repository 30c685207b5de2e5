"""A failed attempt is taken back before anybody is told, and not from under a newer owner."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from dcp_ckpt.errors import StorageNotFound
from dcp_ckpt.format.names import AttemptId, StepDir
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.lifecycle.epochs import claim_epoch
from dcp_ckpt.lifecycle.recover import recover_older_epochs
from dcp_ckpt.lifecycle.retract import retract
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.lifecycle.sweep import create_again
from dcp_ckpt.load.stored import StoredCheckpoint
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.storage.forwarding import ForwardingStorage
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint

DIRECTORY = StepDir(100)
ATTEMPT = AttemptId(1, 1)
BOTH = pytest.mark.parametrize("kind", ["files", "store"])


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Storage]:
    """A run in which epoch 1 has written all of step 100 and committed nothing."""

    def make(kind: str) -> Storage:
        storage = open_storage(tmp_path) if kind == "files" else MemoryStorage()
        claim(storage)
        run_id = ensure_run(storage).run_id
        write_tiny_checkpoint(storage, step=100, ranks=2, run_id=run_id, commit=False)
        return storage

    return make


def claim(storage: Storage) -> int:
    run = ensure_run(storage)
    return claim_epoch(
        storage, run_id=run.run_id, world_size=2, purpose="train", hold=lambda key: None, wait_seconds=0.0
    ).epoch


@BOTH
@pytest.mark.parametrize("all_done", [False, True])
def test_what_was_taken_back_is_never_completed(make, kind: str, all_done: bool) -> None:
    storage = make(kind)
    assert retract(storage, DIRECTORY, ATTEMPT, epoch=1, all_done=all_done)
    assert not all_done or storage.list(f"{DIRECTORY}/") == []
    catalogue, report = recover_older_epochs(storage, epoch=claim(storage))
    assert catalogue.entries == ()
    assert report.committed == []


@BOTH
def test_what_is_committed_is_not_taken_back(make, kind: str) -> None:
    storage = make(kind)
    recover_older_epochs(storage, epoch=claim(storage))
    before = storage.list("")
    assert not retract(storage, DIRECTORY, ATTEMPT, epoch=2, all_done=True)
    assert storage.list("") == before


@BOTH
def test_a_newer_owner_that_has_read_the_fragments_finds_them_again(make, kind: str) -> None:
    """It claims, reads and commits between the look for a newer epoch and the deletion."""
    storage = make(kind)

    class Recovering(ForwardingStorage):
        """The newer owner; the older one deletes when this one has read all it needs."""

        def __init__(self, inner: Storage, delete: Callable[[], None]) -> None:
            super().__init__(inner)
            self._delete = delete

        def create_exclusive(self, key: str, data: bytes | bytearray | memoryview) -> None:
            if key.endswith("manifest.json"):
                self._delete()
            super().create_exclusive(key, data)

    class Late(ForwardingStorage):
        """The older owner; it is stopped right before it deletes."""

        is_late = True

        def delete(self, keys: Iterable[str]) -> None:
            keys = tuple(keys)
            if not self.is_late:
                super().delete(keys)
                return
            self.is_late = False
            newer = Recovering(self._inner, lambda: self._inner.delete(keys))
            _, report = recover_older_epochs(newer, epoch=claim(self._inner))
            assert report.committed == [str(DIRECTORY)]

    assert not retract(Late(storage), DIRECTORY, ATTEMPT, epoch=1, all_done=True)
    latest = read_catalogue(storage).latest
    assert latest is not None
    assert len(StoredCheckpoint(storage, DIRECTORY, latest.manifest).all_fragments()) == 2


def test_what_is_put_back_is_there_although_a_start_swept_its_temporary_file(make) -> None:
    storage = make("files")
    key = f"{DIRECTORY}/manifest.json"

    class Swept(ForwardingStorage):
        """A newer owner clears away at the moment between the temporary and the final name."""

        times = 1

        def create_exclusive(self, key: str, data: bytes | bytearray | memoryview) -> None:
            if self.times:
                self.times -= 1
                raise StorageNotFound("its temporary file is gone", path=key)
            super().create_exclusive(key, data)

    create_again(Swept(storage), key, b"put back")
    assert storage.read(key) == b"put back"
    create_again(storage, key, b"put back")
    create_again(storage, "step-00000200/manifest.json", b"put back")
    assert storage.list("step-00000200/") == []
