"""One verdict: whatever fails on whichever rank is every rank's failure, told alike; the next save works."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_ckpt import Checkpointer, verify
from dcp_ckpt.errors import CheckpointError
from dcp_ckpt.save.handle import SaveHandle
from dcp_ckpt.store_channel import SILENCE_SECONDS
from dcp_ckpt.testing.killpoints import Book, KillPoint, instrument
from tests.distributed import worlds
from tests.failing_calls import failing

pytestmark = pytest.mark.distributed

WORLD_SIZE = 3
WAIT_SECONDS = 40.0
SHORT_SECONDS = 3.0
SLACK_SECONDS = 12.0
"""For processes to be scheduled, on a busy machine; a wait without an end is longer."""
STOPPED_SECONDS = 2 * SHORT_SECONDS + 2 * SILENCE_SECONDS + SLACK_SECONDS
"""Rank 0 has its deadline, and the others give it as much again to act on it; twice they may ask in vain."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """How one save ended on one rank: its outcome, and the error with everything that it says."""

    outcome: str
    kind: str = ""
    message: str = ""
    rank: int | None = None
    step: int | None = None
    phase: str | None = None
    path: str | None = None
    errno: int | None = None


def told(handle: SaveHandle) -> Told:
    try:
        handle.result(WAIT_SECONDS)
    except CheckpointError as error:
        return said(error, handle.outcome)
    return Told(outcome=handle.outcome)


def said(error: CheckpointError, outcome: str = "") -> Told:
    return Told(
        outcome=outcome,
        kind=type(error).__name__,
        message=error.message,
        rank=error.rank,
        step=error.step,
        phase=error.phase,
        path=error.path,
        errno=error.errno,
    )


def caught(act: Callable[[], Any]) -> Told:
    try:
        act()
    except CheckpointError as error:
        return said(error)
    return Told(outcome="ok")


OK = Told(outcome="committed")


def good(step: int) -> dict[str, Any]:
    """Held by all ranks, and of each kind something that each of them stores."""
    parts = {f"part{number}": torch.full((300,), step) for number in range(WORLD_SIZE)}
    return {**parts, "shared": torch.full((300,), step), "step": step}


def require_alike(results: Sequence[Any]) -> Any:
    """What all ranks were told, which is one thing."""
    assert all(result == results[0] for result in results), results
    return results[0]


def enroll(book: str, points: Sequence[KillPoint]) -> None:
    """Writers that this rank starts from now on meet the points."""
    os.environ.update(instrument(Book(Path(book)), points))


def unenroll() -> None:
    os.environ.pop("DCP_CKPT_KILLPOINTS", None)
    os.environ.pop("PYTHONPATH", None)


@pytest.fixture
def book(tmp_path):
    found = Book(tmp_path / "book")
    found.prepare()
    yield found
    found.close()


# What the writer of one rank meets: each in another system call of its part.
WRITER_FAULTS = [
    (errno.EACCES, "StorageError", "mkdir", ""),
    (errno.EIO, "StorageError", "open", "/__*.distcp"),
    (errno.ENOSPC, "StorageFull", "pwrite", "/__*.distcp"),
    (errno.EIO, "StorageError", "fsync", "/__*.distcp"),
    (errno.EDQUOT, "StorageFull", "open", "/.rank-*.tmp"),
    (errno.EROFS, "StorageError", "link", "/rank-*.json"),
]


def writer_points(rank: int) -> list[KillPoint]:
    return [
        KillPoint(
            role="writer", rank=rank, call=call, path=f"*/step-{step:08}{name}", action="fail", errno=code
        )
        for step, (code, _, call, name) in zip(failing_steps(), WRITER_FAULTS, strict=True)
    ]


def failing_steps() -> range:
    return range(1, 2 * len(WRITER_FAULTS), 2)


def save_all(path: str, book: str, points: Sequence[KillPoint], steps: Sequence[int]) -> list[Told]:
    enroll(book, points)
    try:
        with Checkpointer(path, config=worlds.config()) as checkpointer:
            return [told(checkpointer.save(good(step), step=step)) for step in steps]
    finally:
        unenroll()


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_what_a_writer_meets_is_told_on_all_ranks_and_the_next_save_works(pool, tmp_path, book, rank):
    run = tmp_path / "run"
    steps = range(1, 2 * len(WRITER_FAULTS) + 1)
    results = pool.run(save_all, WORLD_SIZE, str(run), str(book.directory), writer_points(rank), list(steps))
    found = dict(zip(steps, require_alike(results), strict=True))
    for step, (code, kind, call, _) in zip(failing_steps(), WRITER_FAULTS, strict=True):
        failure = found[step]
        assert (failure.outcome, failure.kind) == ("failed", kind), (call, failure)
        assert (failure.rank, failure.step, failure.phase, failure.errno) == (rank, step, "write", code)
        assert f"step-{step:08}" in failure.path
        assert found[step + 1] == OK
    report = verify(run)
    assert report.ok
    assert [checked.step for checked in report.checkpoints] == list(range(2, steps[-1] + 1, 2))
    assert not [path for step in failing_steps() for path in run.glob(f"step-{step:08}/*")]


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_a_writer_that_is_killed_is_told_on_all_ranks(pool, tmp_path, book, rank):
    """As the kernel does when memory is short."""
    points = [KillPoint(role="writer", rank=rank, call="pwrite", path="*/step-00000001/__*.distcp")]
    results = pool.run(save_all, WORLD_SIZE, str(tmp_path / "run"), str(book.directory), points, [1, 2])
    failure, after = require_alike(results)
    assert (failure.outcome, failure.kind) == ("failed", "SaveFailed")
    assert (failure.rank, failure.step, failure.phase) == (rank, 1, "write")
    assert "killed by signal 9" in failure.message
    assert after == OK


def save_with_stopped_writer(path: str, book: str, points: Sequence[KillPoint]) -> tuple[Told, Told, float]:
    enroll(book, points)
    try:
        with Checkpointer(path, config=worlds.config(timeout_seconds=SHORT_SECONDS)) as checkpointer:
            checkpointer.load(good(0))
            dist.barrier()
            started = time.monotonic()
            failure = told(checkpointer.save(good(1), step=1))
            seconds = time.monotonic() - started
            dist.barrier()
            return failure, told(checkpointer.save(good(2), step=2)), seconds
    finally:
        unenroll()


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.crash)])
def test_a_writer_that_is_stopped_fails_the_save_at_its_deadline(pool, tmp_path, book, rank):
    points = [
        KillPoint(role="writer", rank=rank, call="fsync", path="*/step-00000001/__*.distcp", action="stop")
    ]
    results = pool.run(
        save_with_stopped_writer, WORLD_SIZE, str(tmp_path / "run"), str(book.directory), points
    )
    failure, after = require_alike([(failure, after) for failure, after, _ in results])
    assert (failure.outcome, failure.kind, failure.rank, failure.step) == ("failed", "SaveFailed", rank, 1)
    assert after == OK
    assert all(SHORT_SECONDS - 1 < seconds < SHORT_SECONDS + SLACK_SECONDS for _, _, seconds in results)


class Raising:
    """State whose owner fails when it is asked for."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def state_dict(self) -> dict[str, Any]:
        raise self._error

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError("only saved")


def unfit_states() -> dict[str, dict[str, Any]]:
    return {
        "sparse": {"odd": torch.eye(3).to_sparse()},
        "object": {"odd": object()},
        "raises": {"odd": Raising(ZeroDivisionError("not now"))},
        "storage": {"odd": Raising(OSError(errno.EIO, "a file of mine"))},
    }


def save_unfit(path: str) -> list[tuple[str, int, Told, Told]]:
    found = []
    step = 0
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        for name in unfit_states():
            for rank in range(dist.get_world_size()):
                step += 1
                spoilt = unfit_states()[name] if dist.get_rank() == rank else {}
                failure = told(checkpointer.save({**good(step), **spoilt}, step=step))
                found.append((name, rank, failure, told(checkpointer.save(good(step), step=step))))
    return found


def test_a_state_that_cannot_be_staged_on_one_rank_fails_all(pool, tmp_path):
    for name, rank, failure, after in require_alike(pool.run(save_unfit, WORLD_SIZE, str(tmp_path))):
        assert failure.outcome == "failed", (name, failure)
        assert failure.rank == rank, (name, failure)
        assert "odd" in failure.message or "not now" in failure.message or "a file of mine" in failure.message
        assert after == OK


COMMIT_FAULTS = [
    ("open", "*/step-{step:08}/.manifest.json.*", errno.ENOSPC, "StorageFull"),
    ("open", "*/step-{step:08}/.manifest.json.*", errno.EACCES, "StorageError"),
    ("fsync", "*/step-{step:08}/.manifest.json.*", errno.EIO, "StorageError"),
    ("open", "*/step-{step:08}/.manifest.json.*", errno.EROFS, "StorageError"),
    ("fsync", "*/step-{step:08}/.manifest.json.*", errno.EDQUOT, "StorageFull"),
]


def fail_commits(path: str) -> list[tuple[Told, Told]]:
    found = []
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        for step, (call, pattern, code, _) in enumerate(COMMIT_FAULTS, start=1):
            here = pattern.format(step=step) if dist.get_rank() == 0 else "nowhere"
            with failing(call, here, code):
                failure = told(checkpointer.save(good(step), step=step))
            found.append((failure, told(checkpointer.save(good(step), step=step))))
    return found


def test_a_manifest_that_cannot_be_written_is_told_on_all_ranks(pool, tmp_path):
    found = require_alike(pool.run(fail_commits, WORLD_SIZE, str(tmp_path)))
    for step, ((failure, after), (_, _, code, kind)) in enumerate(
        zip(found, COMMIT_FAULTS, strict=True), start=1
    ):
        assert (failure.outcome, failure.kind, failure.errno) == ("failed", kind, code)
        assert (failure.rank, failure.step, failure.phase) == (0, step, "commit")
        assert "manifest.json" in failure.path
        assert after == OK
    assert verify(tmp_path).ok


def fail_unread(path: str, book: str, points: Sequence[KillPoint]) -> tuple[list[str], Told, Told, Told]:
    """Nobody asks for the outcome; training saves on."""
    enroll(book, points)
    checkpointer = Checkpointer(path, config=worlds.config(on_failure="raise"))
    unenroll()
    handle = checkpointer.save(good(1), step=1)
    checkpointer.wait()
    at_next = caught(lambda: checkpointer.save(good(2), step=2))
    after = told(checkpointer.save(good(2), step=2))
    last = checkpointer.save(good(3), step=3)
    at_close = caught(checkpointer.close)
    checkpointer.close()
    return [handle.outcome, last.outcome], at_next, after, at_close


@pytest.mark.parametrize("rank", [0, 2])
def test_an_unread_failure_surfaces_at_the_same_call_on_all_ranks(pool, tmp_path, book, rank):
    points = [
        KillPoint(
            role="writer", rank=rank, call="pwrite", path=f"*/step-0000000{step}/__*",
            action="fail", errno=errno.ENOSPC,
        )
        for step in (1, 3)
    ]  # fmt: skip
    results = pool.run(fail_unread, WORLD_SIZE, str(tmp_path / "run"), str(book.directory), points)
    outcomes, at_next, after, at_close = require_alike(results)
    assert outcomes == ["failed", "failed"]
    assert (at_next.kind, at_next.rank, at_next.step, at_next.errno) == ("StorageFull", rank, 1, errno.ENOSPC)
    assert after == OK
    assert (at_close.kind, at_close.rank, at_close.step) == ("StorageFull", rank, 3)


# Ranks that do not do the same


def save_apart(path: str, rank: int, how: str) -> tuple[Told, Told]:
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        checkpointer.load({})
        step, state = 1, good(1)
        if dist.get_rank() == rank:
            if how == "step":
                step = 9
            elif how == "more":
                state["more"] = torch.zeros(3)
            elif how == "less":
                del state["step"]
            elif how == "shape":
                state["shared"] = torch.full((301,), 1)
            elif how == "dtype":
                state["shared"] = state["shared"].float()
        return told(checkpointer.save(state, step=step)), told(checkpointer.save(good(10), step=10))


@pytest.mark.parametrize("how", ["step", "more", "less", "shape", "dtype"])
def test_a_rank_that_saves_something_else_is_named(pool, tmp_path, how):
    rank = WORLD_SIZE - 1
    failure, after = require_alike(pool.run(save_apart, WORLD_SIZE, str(tmp_path), rank, how))
    assert failure.outcome == "failed"
    assert failure.rank == rank
    named = {"step": "step=9", "more": "more", "less": "step", "shape": "shared", "dtype": "shared"}[how]
    assert named in failure.message
    assert after == OK


def save_elsewhere(path: str, rank: int) -> Told:
    own = path if dist.get_rank() != rank else f"{path}-elsewhere"

    def start_and_save() -> None:
        with Checkpointer(own, config=worlds.config(timeout_seconds=10.0)) as checkpointer:
            checkpointer.save(good(1), step=1).result(WAIT_SECONDS)

    return caught(start_and_save)


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_a_rank_with_another_root_is_named(pool, tmp_path, rank):
    results = pool.run(save_elsewhere, WORLD_SIZE, str(tmp_path / "run"), rank)
    failure = require_alike(results)
    # Roots are compared with rank 0's: where that is the odd one, the first of the others is named.
    assert failure.rank == (rank or 1), failure
    assert re.search(r"elsewhere|does not see", failure.message + str(failure.path)), failure
    assert not list(tmp_path.glob("*/step-*/manifest.json"))


# Ranks that are stopped


class Stopping:
    """State whose reading stops this process on one rank."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == self._rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        return {"n": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError("only saved")


def stop_one(path: str, rank: int, phase: str) -> tuple[Told, float, Told, float]:
    """One rank stops itself, and the waker lets it go on once the others have been told."""
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    waker = 1 if rank == 0 else 0
    checkpointer = Checkpointer(path, config=worlds.config(timeout_seconds=SHORT_SECONDS))
    checkpointer.load(good(0))
    dist.barrier()
    started = time.monotonic()
    if dist.get_rank() == rank and phase == "before":
        os.kill(os.getpid(), signal.SIGSTOP)
    state = {**good(1), "stopping": Stopping(rank)} if phase == "staging" else good(1)
    handles: list[SaveHandle] = []

    def save() -> None:
        handles.append(checkpointer.save(state, step=1))
        if dist.get_rank() == rank and phase == "staged":
            os.kill(os.getpid(), signal.SIGSTOP)
        handles[0].result(WAIT_SECONDS)

    failure = caught(save)
    seconds = time.monotonic() - started
    closing = time.monotonic()
    closed = caught(checkpointer.close)
    closing = time.monotonic() - closing
    if dist.get_rank() == waker:
        # Rank 0 waits in close() for what the others say at the end of theirs, so by now all have been told.
        os.kill(pids[rank], signal.SIGCONT)
    with suppress(CheckpointError):
        checkpointer.close()
    dist.barrier()
    return failure, seconds, closed, closing


@pytest.mark.parametrize(
    ("rank", "phase"),
    [
        (2, "staging"),
        *(
            pytest.param(rank, phase, marks=pytest.mark.crash)
            for rank in (0, 1)
            for phase in ("before", "staging", "staged")
        ),
    ],
)
def test_a_rank_that_is_stopped_holds_up_nobody_for_longer_than_the_deadline(pool, tmp_path, rank, phase):
    results = pool.run(stop_one, WORLD_SIZE, str(tmp_path), rank, phase, timeout_seconds=90)
    told_apart = [result for other, result in enumerate(results) if other != rank]
    failure, _, _, _ = told_apart[0]
    for other, seconds, _, closing in told_apart:
        assert seconds < STOPPED_SECONDS
        assert closing < STOPPED_SECONDS
        if rank == 0:
            assert other.kind == "CoordinationError"
            assert "rank 0" in other.message
        else:
            assert other == failure
    if phase == "staged" and rank != 0:
        assert failure.outcome == "ok", "its writer finished without it"
    elif rank != 0:
        assert (failure.kind, failure.rank, failure.step) == ("SaveFailed", rank, 1)
