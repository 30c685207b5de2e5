"""A commit, a recovery and a removal end at every single moment, and the next start meets the rest.

In one process and exhaustively: before and after each system call on a file system, and before and after each
operation of the storage protocol. What was written stays; after a cut nothing is cleaned up.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from dcp_ckpt.errors import CheckpointError, StorageError, StorageTransient
from dcp_ckpt.format.epoch import EpochClaim, encode_epoch
from dcp_ckpt.format.names import EPOCHS, AttemptId, StepDir, epoch_name, fragment_name
from dcp_ckpt.lifecycle.commit import publish_manifest
from dcp_ckpt.lifecycle.recover import recover_older_epochs
from dcp_ckpt.lifecycle.sweep import delete_tree, seal, uncommit
from dcp_ckpt.storage import Storage
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.storage.system_calls import SystemCalls
from dcp_ckpt.testing.faults import FaultyStorage
from dcp_ckpt.testing.interposition import PowerCut, PowerCutAt, interposed
from dcp_ckpt.testing.tiny import TINY_RUN_ID, write_tiny_checkpoint
from tests.crash.next_start import on_disk
from tests.crash.run_files import committed_steps, debris, require_all_verify

MOMENTS_MAX = 300
NEXT_EPOCH = 3


class ProcessEnded(BaseException):
    """No `Exception`: nobody lives on to handle it."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What stands, what is cut short, and which steps the run may hold after the next start."""

    prepare: Callable[[Storage], None]
    act: Callable[[Storage], None]
    allowed: tuple[list[int], ...]


def write_steps(storage: Storage, *, committed: tuple[int, ...], complete: tuple[int, ...] = ()) -> None:
    for step in sorted(committed + complete):
        write_tiny_checkpoint(storage, step=step, save=step, commit=step in committed)
    claim(storage, 1)


def claim(storage: Storage, epoch: int) -> None:
    document = EpochClaim(
        run_id=TINY_RUN_ID,
        epoch=epoch,
        epoch_id=f"{epoch:032x}",
        world_size=2,
        host="here",
        pid=1,
        created_at="2026-01-01T00:00:00.000000Z",
        purpose="train",
    )
    storage.make_directory(EPOCHS)
    storage.create_exclusive(f"{EPOCHS}/{epoch_name(epoch)}", encode_epoch(document))


def commit(storage: Storage) -> None:
    publish_manifest(
        storage, StepDir(2), write_tiny_checkpoint(MemoryStorage(), step=2, save=2, commit=False)
    )


def prepare_recovery(storage: Storage) -> None:
    """An un-committed step 1, a complete step 3, and two without a fragment, one of them sealed already."""
    write_steps(storage, committed=(2,), complete=(1, 3, 4, 5))
    for step in (4, 5):
        storage.delete([f"step-0000000{step}/{fragment_name(1, AttemptId(1, step))}"])
    seal(storage, StepDir(4), epoch=1)
    claim(storage, 2)


def recover(storage: Storage) -> None:
    recover_older_epochs(storage, epoch=2)


def remove(storage: Storage) -> None:
    assert uncommit(storage, StepDir(1), epoch=1)
    sealed = seal(storage, StepDir(1), epoch=1)
    assert sealed is not None
    delete_tree(storage, sealed)


def prepare_removal(storage: Storage) -> None:
    write_steps(storage, committed=(1, 2, 3))
    storage.put("step-00000001/.metadata", b"derived")


SITUATIONS = {
    "commit": Situation(
        prepare=lambda storage: write_steps(storage, committed=(1,), complete=(2,)),
        act=commit,
        allowed=([1, 2],),
    ),
    "recover": Situation(
        prepare=prepare_recovery,
        act=recover,
        allowed=([2, 3],),
    ),
    "remove": Situation(prepare=prepare_removal, act=remove, allowed=([2, 3], [1, 2, 3])),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_every_system_call_may_be_the_last(tmp_path: Path, name: str) -> None:
    situation = SITUATIONS[name]
    for number in range(1, MOMENTS_MAX):
        root = tmp_path / str(number)
        situation.prepare(LocalStorage(root))
        cut = PowerCutAt(number, root=root)
        with interposed(cut), suppress(PowerCut):
            # Made here, so that it takes the functions that are watched.
            situation.act(LocalStorage(root, calls=SystemCalls(link=os.link, pwrite=os.pwrite)))
        require_recovered(LocalStorage(root), tmp_path / f"{number}-seen", situation)
        if not cut.is_cut:
            assert number > 10, "nothing was watched"
            return
    pytest.fail(f"still not at the end after {MOMENTS_MAX} moments")


@pytest.mark.parametrize("answer_lost", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("failure", ["ends", "refused", "unanswered"])
@pytest.mark.parametrize("kind", ["local", "memory"])
@pytest.mark.parametrize("name", SITUATIONS)
def test_every_operation_may_fail(
    tmp_path: Path, name: str, kind: str, failure: str, answer_lost: bool
) -> None:
    situation = SITUATIONS[name]
    for number in range(1, MOMENTS_MAX):
        inner: Storage = LocalStorage(tmp_path / f"{number}") if kind == "local" else MemoryStorage()
        situation.prepare(inner)
        storage = FaultyStorage(inner, failing(failure, number), answer_lost=answer_lost)
        with suppress(ProcessEnded, CheckpointError):
            situation.act(storage)
        require_recovered(inner, tmp_path / f"{number}-seen", situation)
        if storage.num_operations < number:
            assert number > 1, "nothing was watched"
            return
    pytest.fail(f"still not at the end after {MOMENTS_MAX} operations")


def test_a_checkpoint_that_was_sealed_too_late_is_put_back(tmp_path: Path) -> None:
    """It was published between the look and the rename, and whoever sealed it died before the second look."""
    storage = LocalStorage(tmp_path)
    write_steps(storage, committed=(1, 2))
    storage.rename_directory("step-00000002", "trash/step-00000002.0123456789abcdef")
    claim(storage, 2)
    _, report = recover_older_epochs(storage, epoch=2)
    assert report.removed == []
    assert committed_steps(tmp_path) == [1, 2]
    require_all_verify(tmp_path)
    assert debris(tmp_path) == []


def test_only_leftovers_of_older_epochs_are_swept(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    write_steps(storage, committed=(1,))
    claim(storage, 2)
    token = "0123456789abcdef.tmp"
    old = [
        f".run.json.{token}",
        f"epochs/.00000001.resumed.json.{token}",
        f"marks/step-00000001/.pin-{'0' * 32}.json.{token}",
        f"step-00000001/..metadata.{token}",
        f"step-00000001/.manifest.json.{token}",
        "step-00000001/__0_0.e0001-s000007.distcp",
    ]
    others = [f"epochs/.00000003.json.{token}", "step-00000001/__0_0.e0002-s000001.distcp", "notes.txt"]
    for key in old + others:
        storage.put(key, b"x")
    _, report = recover_older_epochs(storage, epoch=2)
    assert sorted(report.removed) == sorted(old)
    assert debris(tmp_path) == sorted(others)
    require_all_verify(tmp_path)


def failing(failure: str, number: int) -> Callable[[int, str, str], Exception | None]:
    def fail_at(count: int, operation: str, key: str) -> Exception | None:
        if failure == "ends" and count >= number:
            raise ProcessEnded
        if failure != "ends" and count == number:
            kind = StorageError if failure == "refused" else StorageTransient
            return kind("on purpose", path=key)
        return None

    return fail_at


def require_recovered(storage: Storage, seen: Path, situation: Situation) -> None:
    """The next start finds whole checkpoints only, loses none of them, and leaves nothing else."""
    before = committed_steps(on_disk(storage, seen / "before"))
    require_all_verify(seen / "before")
    claim(storage, NEXT_EPOCH)
    recover_older_epochs(storage, epoch=NEXT_EPOCH)
    after = on_disk(storage, seen / "after")
    steps = committed_steps(after)
    assert steps in situation.allowed
    assert set(before) <= set(steps)
    if situation.act is remove:
        assert steps == before, "what was un-committed came back"
    require_all_verify(after)
    assert debris(after) == []
    claim(storage, NEXT_EPOCH + 1)
    _, report = recover_older_epochs(storage, epoch=NEXT_EPOCH + 1)
    assert (report.committed, report.debris, report.removed) == ([], [], [])
