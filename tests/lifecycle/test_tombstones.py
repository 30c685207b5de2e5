"""Where names are closed instead of directories moved: what stands beside a tombstone, and what it is not."""

from __future__ import annotations

import pytest

from dcp_ckpt.format.names import StepDir
from dcp_ckpt.lifecycle.epochs import claim_epoch
from dcp_ckpt.lifecycle.recover import recover_older_epochs
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.lifecycle.sweep import uncommit
from dcp_ckpt.storage import Storage
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint

DIRECTORY = StepDir(7)


@pytest.fixture
def storage() -> Storage:
    """A run of epoch 1 that has taken step 7 back, and was killed before it deleted anything."""
    storage = MemoryStorage()
    claim(storage)
    write_tiny_checkpoint(storage, step=7, run_id=ensure_run(storage).run_id)
    assert uncommit(storage, DIRECTORY, epoch=1)
    return storage


def claim(storage: Storage) -> int:
    run_id = ensure_run(storage).run_id
    return claim_epoch(
        storage, run_id=run_id, world_size=1, purpose="train", hold=lambda key: None, wait_seconds=0.0
    ).epoch


def test_what_is_not_ours_stays_beside_a_tombstone(storage: Storage) -> None:
    notes = [f"{DIRECTORY}/notes.txt", f"{DIRECTORY}/plots/loss.txt"]
    for key in notes:
        storage.put(key, b"mine")
    recover_older_epochs(storage, epoch=claim(storage))
    left = [info.key for info in storage.list(f"{DIRECTORY}/")]
    assert left == [f"{DIRECTORY}/manifest.json", *notes]


def test_a_tombstone_is_no_checkpoint_to_take_back(storage: Storage) -> None:
    before = storage.read(f"{DIRECTORY}/manifest.json")
    assert not uncommit(storage, DIRECTORY, epoch=1)
    assert storage.read(f"{DIRECTORY}/manifest.json") == before
