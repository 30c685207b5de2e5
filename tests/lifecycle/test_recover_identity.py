"""Recover completes only what is this run's own, and what is not ours never stands in its way."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcp_ckpt.format.names import AttemptId, StepDir
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.lifecycle.epochs import claim_epoch
from dcp_ckpt.lifecycle.recover import AttemptFiles, plan_recovery, recover_older_epochs, recover_run
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint

FOREIGN = "f" * 32


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = open_storage(tmp_path)
    ensure_run(storage)
    return storage


def steps(storage: Storage) -> list[tuple[int, int]]:
    return [entry.manifest.order for entry in read_catalogue(storage).entries]


def test_an_attempt_of_this_run_is_completed(storage):
    write_tiny_checkpoint(storage, step=5, run_id=ensure_run(storage).run_id, commit=False)
    assert recover_run(storage, force=False, wait_seconds=0.0).committed == ["step-00000005"]
    assert steps(storage) == [(1, 5)]


def test_an_attempt_of_another_run_is_refused(storage):
    write_tiny_checkpoint(storage, step=5, run_id=FOREIGN, commit=False)
    report = recover_run(storage, force=False, wait_seconds=0.0)
    assert report.committed == []
    assert report.debris == ["step-00000005 attempt e0001-s000001: it belongs to another run"]
    assert steps(storage) == []


def test_an_attempt_whose_rank_lies_about_its_step_is_refused(storage, tmp_path):
    write_tiny_checkpoint(storage, step=5, run_id=ensure_run(storage).run_id, commit=False)
    (tmp_path / "step-00000005").rename(tmp_path / "step-00000006")
    report = recover_run(storage, force=False, wait_seconds=0.0)
    assert report.committed == []
    assert "is of another rank, attempt or step" in report.debris[0]


@pytest.mark.parametrize("damaged", [False, True], ids=["its manifest", "a damaged manifest"])
@pytest.mark.parametrize("arrives", ["before the claim", "after the claim"])
def test_a_foreign_directory_of_a_newer_epoch_blocks_nothing(storage, tmp_path, damaged, arrives):
    """Somebody copied a step of another run here; its numbers are higher than ours."""
    write_tiny_checkpoint(storage, step=5, run_id=ensure_run(storage).run_id, commit=False)

    def copy() -> None:
        write_tiny_checkpoint(storage, step=900, epoch=99, run_id=FOREIGN)
        if damaged:
            (tmp_path / "step-00000900" / "manifest.json").write_bytes(b"{")

    if arrives == "before the claim":
        copy()
    claim = claim_epoch(
        storage,
        run_id=ensure_run(storage).run_id,
        world_size=1,
        purpose="recover",
        hold=lambda key: None,
        wait_seconds=0.0,
    )
    if arrives == "after the claim":
        copy()
    _, report = recover_older_epochs(storage, epoch=claim.epoch)
    assert report.committed == ["step-00000005"]
    assert steps(storage) == [(1, 5)]
    assert len(list((tmp_path / "step-00000900").iterdir())) > 1, "what is not ours stays"


def test_a_damaged_checkpoint_of_this_run_lets_no_older_attempt_come_back(storage, tmp_path):
    """Steps that were removed when it was committed would return otherwise."""
    run_id = ensure_run(storage).run_id
    write_tiny_checkpoint(storage, step=5, run_id=run_id, commit=False)
    write_tiny_checkpoint(storage, step=6, save=2, run_id=run_id)
    (tmp_path / "step-00000006" / "manifest.json").write_bytes(b"{")
    report = recover_run(storage, force=False, wait_seconds=0.0)
    assert report.committed == []
    assert (tmp_path / "step-00000006" / "manifest.json").read_bytes() == b"{"


def test_the_plan_is_ascending_and_takes_the_latest_save_first():
    def files(step: int, epoch: int, save: int) -> AttemptFiles:
        return AttemptFiles(directory=StepDir(step), attempt=AttemptId(epoch, save), fragments={}, data={})

    found = [files(9, 2, 1), files(5, 1, 3), files(7, 1, 1), files(7, 1, 2), files(3, 1, 1), files(1, 3, 1)]
    plan = plan_recovery(found, newest=(1, 5), epoch=3)
    assert [[str(item.attempt) for item in group] for group in plan] == [
        ["e0001-s000002", "e0001-s000001"],
        ["e0002-s000001"],
    ]
