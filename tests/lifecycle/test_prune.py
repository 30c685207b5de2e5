"""Prune: does what its plan says, touches nothing else, and survives being killed at any moment."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dcp_ckpt.errors import CheckpointError, ConfigError, CorruptCheckpoint, FormatTooNew
from dcp_ckpt.format.names import MANIFEST, StepDir
from dcp_ckpt.lifecycle.catalogue import Catalogue, read_catalogue
from dcp_ckpt.lifecycle.epochs import claim_epoch, record_resumed
from dcp_ckpt.lifecycle.marks import MarkKind, write_mark
from dcp_ckpt.lifecycle.prune import PruneItem, PruneReport, plan_prune, prune_run
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.ops.checkpoint import read_fragment
from dcp_ckpt.policies import AnyOf, BestN, EveryNSteps, KeepPolicy, LatestN
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.testing.faults import FaultyStorage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint

ATTEMPT = "e0001-s000001"


class Killed(Exception):
    """The process is gone: nothing that it does has any effect from here."""


@pytest.fixture(params=["disk", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A run with steps 10 to 50; nobody lives."""
    return new_run(tmp_path if request.param == "disk" else None)


def new_run(path: Path | None) -> Storage:
    storage: Storage = MemoryStorage() if path is None else LocalStorage(path)
    run_id = ensure_run(storage).run_id
    claim(storage)
    for step in (10, 20, 30, 40, 50):
        write_tiny_checkpoint(storage, step=step, run_id=run_id, metrics={"loss": abs(step - 20.0)})
    return storage


def claim(storage: Storage) -> int:
    return claim_epoch(
        storage,
        run_id=ensure_run(storage).run_id,
        world_size=1,
        purpose="train",
        hold=lambda key: None,
        wait_seconds=0.0,
    ).epoch


def mark(storage: Storage, step: int, kind: MarkKind) -> None:
    write_mark(storage, StepDir(step), kind=kind, epoch=1, step=step, attempt=ATTEMPT)


def prune(storage: Storage, keep: KeepPolicy, *, force: bool = False) -> PruneReport:
    return prune_run(storage, keep, grace_seconds=0.0, force=force)


def steps(items: Catalogue | tuple[PruneItem, ...]) -> list[int]:
    return [item.step for item in (items.entries if isinstance(items, Catalogue) else items)]


def content(storage: Storage) -> dict[str, bytes]:
    return {info.key: storage.read(info.key) for info in storage.list("")}


def leftovers(storage: Storage) -> list[str]:
    """Files in step directories that are no checkpoints, tombstones left out, and what is in the trash."""
    kept = {str(entry.directory) for entry in read_catalogue(storage).entries}
    keys = [info.key for info in storage.list("") if info.key.startswith(("step-", "trash/"))]
    return [key for key in keys if key.split("/")[0] not in kept and not key.endswith(f"/{MANIFEST}")]


def test_it_keeps_what_any_policy_keeps_and_frees_the_rest(storage: Storage) -> None:
    keep = AnyOf(LatestN(1), EveryNSteps(40), BestN(1, "loss", "min"))
    before = {info.key: info.size_bytes for info in storage.list("")}
    plan = plan_prune(storage, keep)
    report = prune(storage, keep)
    assert (report.kept, report.removed) == (plan.kept, plan.removed)
    assert steps(report.kept) == steps(read_catalogue(storage)) == [20, 40, 50]
    assert steps(report.removed) == [10, 30]
    gone = {key for key in before if key.startswith(("step-00000010/", "step-00000030/"))}
    gone -= {f"{StepDir(step)}/{MANIFEST}" for step in (10, 30)}
    assert report.freed_bytes == plan.freed_bytes == sum(before[key] for key in gone)
    assert leftovers(storage) == []
    for entry in read_catalogue(storage).entries:
        for rank in range(2):
            read_fragment(storage, str(entry.directory), entry.manifest, rank)


def test_the_plan_touches_nothing(storage: Storage) -> None:
    before = content(storage)
    plan = plan_prune(storage, LatestN(1))
    assert content(storage) == before
    assert steps(plan.removed) == [10, 20, 30, 40]
    assert [item.reason for item in plan.kept] == ["newest valid, among the latest 1"]


def test_what_retention_never_touches(storage: Storage) -> None:
    mark(storage, 10, "pin")
    mark(storage, 50, "bad")
    record_resumed(storage, claim(storage), StepDir(20), 1, 20)
    claim(storage)  # a later command, which resumed from nothing
    write_tiny_checkpoint(storage, step=5, run_id="f" * 32)
    storage.put(f"{StepDir(6)}/{MANIFEST}", b"{")
    report = prune(storage, LatestN(1))
    assert {item.step: item.reason for item in report.kept} == {
        10: "pinned",
        20: "resumed from by epoch 2",
        40: "newest valid, among the latest 1",
        50: "marked bad, kept for inspection",
    }
    assert steps(report.removed) == [30]
    directories = {info.key.split("/")[0] for info in storage.list("")}
    assert {str(StepDir(5)), str(StepDir(6))} <= directories


def test_a_pin_at_the_last_moment_spares(storage: Storage) -> None:
    def pin_30(number: int, operation: str, key: str) -> None:
        if key == f"{StepDir(20)}/.metadata":
            mark(storage, 30, "pin")

    report = prune(FaultyStorage(storage, pin_30), LatestN(1))
    assert steps(report.removed) == [10, 20, 40]
    assert [(item.step, item.reason) for item in report.spared] == [(30, "pinned or gone at the last look")]
    assert steps(read_catalogue(storage)) == [30, 50]


def test_a_live_owner_is_left_alone_unless_forced(storage: Storage) -> None:
    before = content(storage)
    with storage.hold_lease("epochs/00000001.lease"):
        held = content(storage)
        with pytest.raises(ConfigError, match=r"epoch\(s\) 1 .* still live.*--force"):
            prune(storage, LatestN(1))
        assert content(storage) == held
        report = prune(storage, LatestN(1), force=True)
    assert report.epoch == 2
    assert steps(read_catalogue(storage)) == [50]
    assert len(before) > len(content(storage))


@pytest.mark.parametrize("kind", ["no such metric", "newer format", "damaged lineage"])
def test_when_in_doubt_nothing_is_removed(storage: Storage, kind: str) -> None:
    error: type[CheckpointError] = ConfigError
    keep: KeepPolicy = LatestN(1)
    if kind == "no such metric":
        keep = AnyOf(keep, BestN(1, "los"))
    elif kind == "newer format":
        storage.put(f"{StepDir(60)}/{MANIFEST}", b'{"format":"dcp_ckpt.manifest","format_version":9}')
        storage.put(f"{StepDir(60)}/rank-00000.e0001-s000002.json", b"{}")
        error = FormatTooNew
    else:
        storage.put("epochs/00000001.resumed.json", b"{")
        error = CorruptCheckpoint
    before = content(storage)
    with pytest.raises(error):
        prune(storage, keep)
    assert {key: data for key, data in content(storage).items() if not key.startswith("epochs/")} == {
        key: data for key, data in before.items() if not key.startswith("epochs/")
    }


def test_a_finished_save_of_a_dead_start_is_committed_first(storage: Storage) -> None:
    write_tiny_checkpoint(storage, step=60, run_id=ensure_run(storage).run_id, commit=False)
    report = prune(storage, LatestN(2))
    assert report.recovered.committed == [str(StepDir(60))]
    assert steps(read_catalogue(storage)) == [50, 60]


@pytest.mark.parametrize("answer_lost", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["disk", "object store"])
def test_killed_anywhere_it_leaves_old_or_new_and_again_finishes(
    kind: str, answer_lost: bool, tmp_path: Path
) -> None:
    keep = AnyOf(LatestN(1), EveryNSteps(20))
    if kind == "disk":
        new_run(tmp_path / "0")
    moment = 0
    while True:
        moment += 1
        if kind == "disk":
            storage: Storage = LocalStorage(shutil.copytree(tmp_path / "0", tmp_path / str(moment)))
        else:
            storage = new_run(None)

        def kill(number: int, operation: str, key: str, moment: int = moment) -> Exception | None:
            # The kernel gives the lease of a killed process up.
            return Killed() if number >= moment and "lease" not in operation else None

        try:
            prune(FaultyStorage(storage, kill, answer_lost=answer_lost), keep)
        except Killed:
            pass
        else:
            break
        found = steps(read_catalogue(storage))
        assert {20, 40, 50} <= set(found) <= {10, 20, 30, 40, 50}
        for entry in read_catalogue(storage).entries:
            for rank in range(2):
                fragment = read_fragment(storage, str(entry.directory), entry.manifest, rank)
                for index, file in enumerate(fragment.files):
                    name = f"{entry.directory}/__{rank}_{index}.{ATTEMPT}.distcp"
                    assert storage.size(name) == file.size_bytes
        prune(storage, keep)
        assert steps(read_catalogue(storage)) == [20, 40, 50]
        assert leftovers(storage) == []
    assert moment > 15, "every change of the storage was a moment to be killed at"
