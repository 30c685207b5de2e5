"""Room on storage: what policies keep at most, and what a look before a save finds out, frees and refuses."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dcp_ckpt.errors import StorageFull
from dcp_ckpt.format.names import StepDir
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.lifecycle.epochs import claim_epoch
from dcp_ckpt.lifecycle.janitor import Janitor
from dcp_ckpt.lifecycle.known import KnownRun
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.policies import AnyOf, BestN, EveryNSteps, KeepPolicy, LatestN
from dcp_ckpt.save.handle import SaveHandle
from dcp_ckpt.save.space import Space, most_kept, retention_shortage
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.storage.forwarding import ForwardingStorage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint

WAIT = 20.0


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (LatestN(2), 2),
        (BestN(3, "loss"), 4),
        (AnyOf(LatestN(2), BestN(3, "loss")), 5),
        (EveryNSteps(10), None),
        (AnyOf(LatestN(2), EveryNSteps(10)), None),
        (None, None),
    ],
)
def test_how_many_checkpoints_a_policy_keeps_at_most(keep: KeepPolicy | None, expected: int | None) -> None:
    assert most_kept(keep) == expected


def test_retention_needs_room_for_one_more_than_it_keeps() -> None:
    def shortage(free_bytes: int, removable_bytes: int) -> str | None:
        return retention_shortage(
            LatestN(2), needed_bytes=100, free_bytes=free_bytes, removable_bytes=removable_bytes
        )

    assert shortage(300, 0) is None
    assert shortage(100, 200) is None, "what is committed already is replaced"
    message = shortage(199, 100)
    assert message is not None
    for number in ("LatestN(n=2)", "300 bytes", "199 bytes", "100 bytes"):
        assert number in message
    # Nothing is known of what grows with the training.
    assert retention_shortage(None, needed_bytes=100, free_bytes=100, removable_bytes=0) is None


class SmallStorage(ForwardingStorage):
    """A storage of `room_bytes`, as it says itself; the files in it count. `hung`: it does not answer."""

    def __init__(self, inner: Storage, room_bytes: int | None) -> None:
        super().__init__(inner)
        self.room_bytes = room_bytes
        self.num_looks = 0
        self.hung = threading.Event()
        self.hung.set()

    def free_bytes(self) -> int | None:
        self.num_looks += 1
        self.hung.wait(WAIT)
        if self.room_bytes is None:
            return None
        return self.room_bytes - sum(info.size_bytes for info in self.list("") if "distcp" in info.key)


class Run:
    """A run of its own with three tiny checkpoints, and what rank 0 holds of it."""

    def __init__(self, storage: SmallStorage, *, grace_seconds: float) -> None:
        self.storage = storage
        claim = claim_epoch(
            storage,
            run_id=ensure_run(storage).run_id,
            world_size=1,
            purpose="train",
            hold=lambda key: None,
            wait_seconds=0.0,
        )
        manifests = [
            write_tiny_checkpoint(storage, step=step, run_id=claim.run_id, epoch=claim.epoch)
            for step in (1, 2, 3)
        ]
        self.bytes_each = manifests[0].total_bytes
        self.janitor = Janitor(
            storage,
            KnownRun(storage, read_catalogue(storage)),
            epoch=claim.epoch,
            keep=LatestN(2),
            grace_seconds=grace_seconds,
        )
        self.space = Space(storage, self.janitor, timeout_seconds=WAIT)
        self.space.expect(self.bytes_each)

    def directories(self) -> list[str]:
        return [name for name in self.storage.list_names("") if StepDir.parse(name.rstrip("/"))]


@contextmanager
def run_in(path: Path, *, spare_checkpoints: float, grace_seconds: float) -> Iterator[Run]:
    storage = SmallStorage(open_storage(path), None)
    run = Run(storage, grace_seconds=grace_seconds)
    storage.room_bytes = int((3 + spare_checkpoints) * run.bytes_each)
    try:
        yield run
    finally:
        storage.close()


def settled_handle(run: Run, outcome: str) -> SaveHandle:
    handle = SaveHandle(3)
    handle.resolve(outcome, error=StorageFull("for a test") if outcome == "failed" else None)
    return handle


def test_enough_room_costs_one_look(tmp_path: Path) -> None:
    with run_in(tmp_path, spare_checkpoints=1, grace_seconds=0.0) as run:
        assert run.space.shortage(4, None) is None
        assert run.storage.num_looks == 1


def test_a_storage_that_does_not_say_is_never_full(tmp_path: Path) -> None:
    with run_in(tmp_path, spare_checkpoints=0, grace_seconds=0.0) as run:
        run.storage.room_bytes = None
        assert run.space.shortage(4, None) is None


def test_before_anything_is_known_nothing_is_refused(tmp_path: Path) -> None:
    with run_in(tmp_path, spare_checkpoints=0, grace_seconds=0.0) as run:
        assert Space(run.storage, run.janitor, timeout_seconds=WAIT).shortage(4, None) is None
        assert run.storage.num_looks == 0


def test_too_little_room_is_refused_with_numbers(tmp_path: Path) -> None:
    with run_in(tmp_path, spare_checkpoints=0.5, grace_seconds=0.0) as run:
        error = run.space.shortage(4, None)
        assert isinstance(error, StorageFull)
        assert (error.errno, error.step, error.rank) == (errno.ENOSPC, 4, 0)
        assert error.path == str(tmp_path)
        assert f"{run.bytes_each} bytes needed" in error.message
        assert f"{run.bytes_each // 2} bytes free" in error.message
        assert len(run.directories()) == 3


def test_what_retention_took_back_is_deleted_when_a_save_needs_the_room(tmp_path: Path) -> None:
    with run_in(tmp_path, spare_checkpoints=0.5, grace_seconds=0.2) as run:
        assert [str(directory) for directory in run.janitor.take_back()] == ["step-00000001"]
        assert len(run.directories()) == 3, "its files wait for readers"
        assert run.space.shortage(4, None) is None
        assert run.directories() == ["step-00000002/", "step-00000003/"]


def test_a_long_grace_period_is_kept_though_the_save_fails(tmp_path: Path) -> None:
    with run_in(tmp_path, spare_checkpoints=0.5, grace_seconds=3600.0) as run:
        run.janitor.take_back()
        assert run.space.shortage(4, None) is not None
        assert len(run.directories()) == 3


def test_the_save_before_and_its_retention_are_waited_for(tmp_path: Path) -> None:
    with run_in(tmp_path, spare_checkpoints=0.5, grace_seconds=0.0) as run:
        handle = SaveHandle(3)
        found: list[StorageFull | None] = []
        asking = threading.Thread(target=lambda: found.append(run.space.shortage(4, handle)))
        asking.start()
        handle.resolve("committed")
        # The verdict is out, and what follows a commit is not yet done.
        asking.join(0.2)
        assert asking.is_alive()
        run.janitor.tidy()
        run.space.settled(3)
        asking.join(WAIT)
        assert found == [None]
        assert run.directories() == ["step-00000002/", "step-00000003/"]


def test_the_space_of_a_save_in_flight_counts_as_taken(tmp_path: Path) -> None:
    with run_in(tmp_path, spare_checkpoints=1.5, grace_seconds=0.0) as run:
        handle = SaveHandle(3)
        asking = threading.Thread(target=run.space.shortage, args=(4, handle))
        asking.start()
        asking.join(0.2)
        assert asking.is_alive(), "room for one, and two are on their way"
        handle.resolve("failed", error=StorageFull("for a test"))
        asking.join(WAIT)
        assert not asking.is_alive()


def test_a_save_that_failed_has_nothing_to_wait_for(tmp_path: Path) -> None:
    with run_in(tmp_path, spare_checkpoints=0.5, grace_seconds=0.0) as run:
        assert run.space.shortage(4, settled_handle(run, "failed")) is not None


def test_a_file_server_that_does_not_answer_holds_no_save(tmp_path: Path) -> None:
    with run_in(tmp_path, spare_checkpoints=0, grace_seconds=0.0) as run:
        run.storage.hung.clear()
        try:
            assert run.space.shortage(4, None) is None
            assert run.space.shortage(5, None) is None
            assert run.storage.num_looks == 1, "one look at a time"
        finally:
            run.storage.hung.set()
