"""Removing: only what is ours, only where no checkpoint is, and only by the newest owner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_ckpt import CheckpointConfig, Checkpointer, LatestN, verify
from dcp_ckpt.errors import Fenced
from dcp_ckpt.format.names import StepDir
from dcp_ckpt.lifecycle.epochs import claim_epoch
from dcp_ckpt.lifecycle.marks import write_mark
from dcp_ckpt.lifecycle.recover import recover_older_epochs
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.lifecycle.sweep import delete_tree, empty_trash, restore_sealed, seal, uncommit
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint

DIRECTORY = StepDir(7)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A run of epoch 1 with step 7."""
    storage = open_storage(tmp_path)
    claim(storage)
    write_tiny_checkpoint(storage, step=7, run_id=ensure_run(storage).run_id)
    return storage


def claim(storage: Storage) -> None:
    run_id = ensure_run(storage).run_id
    claim_epoch(
        storage, run_id=run_id, world_size=1, purpose="train", hold=lambda key: None, wait_seconds=0.0
    )


def state() -> dict[str, Any]:
    return {"tensor": torch.arange(4)}


def train(path: Path, steps: list[int]) -> None:
    config = CheckpointConfig(keep=LatestN(1), grace_seconds=0.0, timeout_seconds=30.0)
    with Checkpointer(path, config=config) as checkpointer:
        checkpointer.load(state())
        for step in steps:
            checkpointer.save(state(), step=step).result(30)


def texts(path: Path) -> set[str]:
    """What the user wrote, wherever it is now."""
    return {file.read_text() for file in path.rglob("*.txt")}


def test_retention_leaves_what_the_user_put_into_a_checkpoint(tmp_path):
    train(tmp_path, [1])
    first = tmp_path / "step-00000001"
    (first / "notes.txt").write_text("mine")
    (first / "plots").mkdir()
    (first / "plots" / "loss.txt").write_text("mine, too")
    train(tmp_path, [2])
    train(tmp_path, [3])
    assert [checked.step for checked in verify(tmp_path).checkpoints] == [2, 3]
    assert not (first / "manifest.json").exists()
    assert texts(tmp_path) == {"mine", "mine, too"}
    assert not list(tmp_path.rglob("*e0001-s000001*")), "what is ours goes all the same"
    train(tmp_path, [4])
    assert texts(tmp_path) == {"mine", "mine, too"}


def test_debris_with_a_file_of_the_user_stays_as_far_as_it_is_the_users(tmp_path):
    train(tmp_path, [1])
    debris = tmp_path / "step-00000002"
    debris.mkdir()
    (debris / "__0_0.e0001-s000009.distcp").write_bytes(b"debris")
    (debris / "notes.txt").write_text("mine")
    train(tmp_path, [3])
    assert texts(tmp_path) == {"mine"}
    assert not list(tmp_path.rglob("__0_0.e0001-s000009.distcp"))


@pytest.mark.parametrize("name", ["README", "notes.txt", "step-00000001.0123456789abcdef"])
def test_a_file_in_the_trash_breaks_no_start(tmp_path, name):
    train(tmp_path, [1])
    (tmp_path / "trash").mkdir(exist_ok=True)
    (tmp_path / "trash" / name).write_text("mine")
    train(tmp_path, [2])
    assert (tmp_path / "trash" / name).read_text() == "mine"
    assert [checked.step for checked in verify(tmp_path).checkpoints] == [1, 2]


def test_a_directory_in_the_trash_that_is_not_ours_stays(tmp_path):
    train(tmp_path, [1])
    other = tmp_path / "trash" / "old plots"
    other.mkdir(parents=True)
    (other / "loss.txt").write_text("mine")
    train(tmp_path, [2])
    assert (other / "loss.txt").read_text() == "mine"


def test_a_sealed_directory_goes_and_a_checkpoint_in_the_trash_comes_back(tmp_path, storage):
    sealed = tmp_path / "trash" / f"{DIRECTORY}.0123456789abcdef"
    sealed.parent.mkdir()
    (tmp_path / str(DIRECTORY)).rename(sealed)
    assert empty_trash(storage, epoch=1) == []
    restore_sealed(storage, epoch=1)
    assert (tmp_path / str(DIRECTORY) / "manifest.json").exists()
    assert uncommit(storage, DIRECTORY, epoch=1)
    assert seal(storage, DIRECTORY, epoch=1) is not None
    assert len(empty_trash(storage, epoch=1)) == 1
    assert list(sealed.parent.iterdir()) == []


def test_what_comes_back_from_the_trash_is_what_the_start_goes_on_from(tmp_path, storage):
    """Whoever sealed it died before its second look; here it is the newest."""
    sealed = tmp_path / "trash" / f"{DIRECTORY}.0123456789abcdef"
    sealed.parent.mkdir()
    (tmp_path / str(DIRECTORY)).rename(sealed)
    # Older and whole: it must not be committed past a newer checkpoint.
    write_tiny_checkpoint(storage, step=6, save=2, run_id=ensure_run(storage).run_id, commit=False)
    claim(storage)
    catalogue, report = recover_older_epochs(storage, epoch=2)
    assert [entry.directory for entry in catalogue.entries] == [DIRECTORY]
    assert report.committed == []


def test_the_trash_of_a_newer_owner_is_left_alone(tmp_path, storage):
    assert uncommit(storage, DIRECTORY, epoch=1)
    sealed = seal(storage, DIRECTORY, epoch=1)
    assert sealed is not None
    before = sorted(path.name for path in (tmp_path / sealed).iterdir())
    claim(storage)
    with pytest.raises(Fenced):
        empty_trash(storage, epoch=1)
    assert sorted(path.name for path in (tmp_path / sealed).iterdir()) == before


def test_a_directory_with_a_manifest_is_never_sealed(tmp_path, storage):
    assert seal(storage, DIRECTORY, epoch=1) is None
    assert (tmp_path / str(DIRECTORY) / "manifest.json").exists()
    assert seal(storage, StepDir(8), epoch=1) is None, "there is no such directory"


def test_the_name_of_a_dead_attempt_is_not_used_again(tmp_path):
    """An older owner that wakes up may still be about to seal it, and must not meet a newer owner's files."""
    train(tmp_path, [1])
    debris = tmp_path / "step-00000002"
    debris.mkdir()
    (debris / "__0_0.e0001-s000009.distcp").write_bytes(b"debris")
    train(tmp_path, [2])
    assert (tmp_path / "step-00000002.e2" / "manifest.json").exists()
    assert not debris.exists()


def test_a_late_manifest_keeps_its_tree(tmp_path, storage):
    """Published after the second look of the seal: the data goes with a checkpoint, so the manifest stays."""
    manifest = (tmp_path / str(DIRECTORY) / "manifest.json").read_bytes()
    assert uncommit(storage, DIRECTORY, epoch=1)
    sealed = seal(storage, DIRECTORY, epoch=1)
    assert sealed is not None
    (tmp_path / sealed / "manifest.json").write_bytes(manifest)
    delete_tree(storage, sealed)
    assert (tmp_path / sealed / "manifest.json").read_bytes() == manifest


def test_pinned_and_missing_checkpoints_are_not_taken_back(tmp_path, storage):
    write_mark(storage, DIRECTORY, kind="pin", epoch=1, step=7, attempt="e0001-s000001")
    assert not uncommit(storage, DIRECTORY, epoch=1)
    assert not uncommit(storage, StepDir(8), epoch=1)
    assert (tmp_path / str(DIRECTORY) / "manifest.json").exists()


def test_a_fenced_owner_removes_nothing(tmp_path, storage):
    claim(storage)
    for remove in (uncommit, seal):
        with pytest.raises(Fenced):
            remove(storage, DIRECTORY, epoch=1)
    assert (tmp_path / str(DIRECTORY) / "manifest.json").exists()
