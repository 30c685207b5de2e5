"""Pins: kept until taken back, and never a promise about a checkpoint that is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcp_ckpt.errors import CheckpointNotFound
from dcp_ckpt.format.names import StepDir
from dcp_ckpt.lifecycle.catalogue import CheckpointEntry, read_catalogue
from dcp_ckpt.lifecycle.epochs import claim_epoch
from dcp_ckpt.lifecycle.pins import pin, pin_reason, unpin
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.lifecycle.sweep import uncommit
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.testing.faults import FaultyStorage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint

STEP = StepDir(10)


@pytest.fixture(params=["disk", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A run, owned by epoch 1, with step 10."""
    storage: Storage = LocalStorage(tmp_path) if request.param == "disk" else MemoryStorage()
    run_id = ensure_run(storage).run_id
    claim_epoch(
        storage, run_id=run_id, world_size=1, purpose="train", hold=lambda key: None, wait_seconds=0.0
    )
    write_tiny_checkpoint(storage, step=10, run_id=run_id)
    return storage


def entry(storage: Storage) -> CheckpointEntry:
    (found,) = read_catalogue(storage).entries
    return found


def test_a_pin_holds_until_all_pins_are_taken_back(storage: Storage) -> None:
    assert pin(storage, entry(storage), reason="for the paper")
    assert not pin(storage, entry(storage), reason="again")
    assert pin_reason(entry(storage)) == "for the paper"
    assert not uncommit(storage, STEP, epoch=1)
    assert unpin(storage, entry(storage))
    assert not unpin(storage, entry(storage))
    assert not entry(storage).is_pinned
    assert pin(storage, entry(storage)), "it can be pinned again"
    assert pin_reason(entry(storage)) is None
    assert not uncommit(storage, STEP, epoch=1)
    assert unpin(storage, entry(storage))
    assert uncommit(storage, STEP, epoch=1)


def test_two_who_pin_at_once_are_both_heard(storage: Storage) -> None:
    seen = entry(storage)
    assert pin(storage, seen, reason="mine")
    assert pin(storage, seen, reason="yours")
    assert pin_reason(entry(storage)) == "mine; yours"
    assert unpin(storage, entry(storage))
    assert not entry(storage).is_pinned


def test_a_pin_that_comes_too_late_says_so(storage: Storage) -> None:
    seen = entry(storage)
    assert uncommit(storage, STEP, epoch=1)
    with pytest.raises(CheckpointNotFound, match="was removed before the pin"):
        pin(storage, seen)


def test_a_pin_in_the_middle_of_a_removal_wins(storage: Storage) -> None:
    """Between the removal's look for pins and its removal of the manifest."""
    seen = entry(storage)
    pinned: list[bool] = []

    def pin_first(number: int, operation: str, key: str) -> None:
        if key == f"{STEP}/manifest.json" and not pinned:
            pinned.append(pin(storage, seen))

    before = storage.read(f"{STEP}/manifest.json")
    assert not uncommit(FaultyStorage(storage, pin_first), STEP, epoch=1)
    assert pinned == [True]
    assert storage.read(f"{STEP}/manifest.json") == before
    assert entry(storage).is_pinned
