"""A save that does not move is reported while it hangs, and its error says where it stood."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_ckpt import CheckpointConfig, Checkpointer, verify
from dcp_ckpt.errors import SaveFailed
from dcp_ckpt.save import watch
from dcp_ckpt.save.watch import Watch, Watchdog
from dcp_ckpt.save.writer_link import describe
from dcp_ckpt.testing.killpoints import Book, KillPoint, instrument
from dcp_ckpt.writer.progress import Progress, ProgressPage, make_page
from tests.eventually import eventually

WAIT = 30.0
MIB = 1 << 20


# When it is said


def test_silence_is_told_at_first_and_then_at_doubling_intervals():
    clock = Watch("a", now=100.0, first_seconds=30.0)
    told = {now: clock.look("a", now=float(now)) for now in range(105, 700, 5)}
    assert [now for now, still in told.items() if still is not None] == [130, 160, 220, 340, 580]
    assert told[340] == 240.0


def test_movement_begins_anew():
    clock = Watch("a", now=0.0, first_seconds=30.0)
    assert clock.look("a", now=29.0) is None
    assert clock.look("b", now=31.0) is None
    assert clock.still_seconds(60.0) == 29.0
    assert clock.look("b", now=61.0) == 30.0


def test_a_watchdog_looks_while_somebody_else_is_blocked(monkeypatch):
    monkeypatch.setattr(watch, "WATCH_SECONDS", 0.05)
    told: list[tuple[str, float]] = []
    enough = threading.Event()

    def tell(state: str, seconds: float) -> None:
        told.append((state, seconds))
        if len(told) == 3:
            enough.set()

    with Watchdog(lambda: "stuck", tell):
        assert enough.wait(WAIT)
    seconds = [still for _, still in told]
    assert seconds[0] >= 0.05
    assert all(later >= 2 * earlier for earlier, later in pairwise(seconds))
    assert not [thread for thread in threading.enumerate() if thread.name == "dcp_ckpt-watchdog"]


# What the writer shows


@pytest.fixture
def pages() -> Iterator[tuple[ProgressPage, ProgressPage]]:
    """The writer's view of a page, and the trainer's."""
    descriptor = make_page()
    with ProgressPage(descriptor) as theirs, ProgressPage(descriptor) as ours:
        os.close(descriptor)
        yield theirs, ours


def test_progress_is_seen_by_the_other_side(pages):
    theirs, ours = pages
    assert ours.read() == Progress()
    for done in (0, 5, 9):
        written = Progress(attempt="e0001-s000001", key="a/b", bytes_done=done, bytes_total=9)
        theirs.write(written)
        assert ours.read() == written


def test_a_page_that_is_never_finished_shows_what_was_there_before(pages):
    """The writer was stopped in the middle of an update."""
    theirs, ours = pages
    before = Progress(attempt="a", key="k", bytes_done=1, bytes_total=2)
    theirs.write(before)
    assert ours.read() == before
    theirs._page[0:8] = (3).to_bytes(8, "little")
    theirs._page[12:20] = b"nonsense"
    assert ours.read() == before


def test_what_does_not_fit_is_left_out(pages):
    theirs, ours = pages
    theirs.write(Progress(attempt="a", key="k"))
    theirs.write(Progress(attempt="b", key="k" * 5000))
    assert ours.read().attempt == "a"


def test_progress_reads_well():
    assert describe(None) == "it has not begun"
    part = Progress(key="s/f", bytes_done=1, bytes_total=2)
    assert describe(part) == "1 of 2 bytes of s/f are written"
    assert describe(Progress(key="s/f", bytes_done=2, bytes_total=2)) == (
        "all 2 of 2 bytes of s/f are written, and not yet durable"
    )


# Real writers that hang


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and "does not move" in record.getMessage()
    ]


def state(num_mib: int) -> dict[str, Any]:
    return {"weight": torch.full((num_mib, MIB // 4), 1.0)}


def config(timeout_seconds: float) -> CheckpointConfig:
    return CheckpointConfig(keep=None, grace_seconds=0.0, timeout_seconds=timeout_seconds)


def test_a_stopped_writer_is_reported_and_then_named_in_the_error(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(watch, "WATCH_SECONDS", 0.5)
    with Checkpointer(tmp_path, config=config(4.0)) as checkpointer:
        checkpointer.save(state(1), step=1).result(WAIT)
        assert checkpointer._link._process is not None
        os.kill(checkpointer._link._process.pid, signal.SIGSTOP)
        caplog.clear()
        started = time.monotonic()
        handle = checkpointer.save(state(1), step=2)
        with pytest.raises(SaveFailed, match=r"it has not begun, and nothing has moved for [34] s") as caught:
            handle.result(WAIT)
        assert time.monotonic() - started < 4.0 + 5.0
    assert (caught.value.rank, caught.value.step, caught.value.phase) == (0, 2, "write")
    first, second, *_ = warnings_of(caplog)
    for part in ("save of step 2", "rank 0", "e0001-s000002", f"{tmp_path}/step-00000002", "has not begun"):
        assert part in first
    assert len(warnings_of(caplog)) <= 4, "the intervals double"
    assert "nothing for " in second


@pytest.fixture
def held_at_the_second_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Book]:
    """The writer's second write of the data file of step 2 hangs, as on a server that does not answer."""
    book = Book(tmp_path / "book")
    book.prepare()
    path = "*/step-00000002/__0_0.*"
    point = KillPoint(role="writer", call="pwrite", path=path, number=2, action="hold")
    for name, value in instrument(book, [point]).items():
        monkeypatch.setenv(name, value)
    try:
        yield book
    finally:
        book.close()


def test_a_write_that_hangs_is_reported_with_its_file_and_bytes(
    tmp_path, monkeypatch, caplog, held_at_the_second_write
):
    monkeypatch.setattr(watch, "WATCH_SECONDS", 0.5)
    run = tmp_path / "run"
    with Checkpointer(run, config=config(5.0)) as checkpointer:
        checkpointer.save(state(20), step=1).result(WAIT)
        caplog.clear()
        handle = checkpointer.save(state(20), step=2)
        assert eventually(lambda: bool(warnings_of(caplog)), timeout_seconds=WAIT)
        assert handle.outcome == "pending", "it is told while the save hangs"
        assert held_at_the_second_write.held()
        with pytest.raises(SaveFailed, match="did not finish within") as caught:
            handle.result(WAIT)
        checkpointer.save(state(20), step=3).result(WAIT)
    segment, total = 8 * MIB, (run / "step-00000001" / "__0_0.e0001-s000001.distcp").stat().st_size
    name = "step-00000002/__0_0.e0001-s000002.distcp"
    assert f"{segment} of {total} bytes of {name} are written" in warnings_of(caplog)[0]
    assert f"{segment} of {total} bytes of {name} are written" in caught.value.message
    assert caught.value.path == f"{run}/{name}"
    assert [checked.step for checked in verify(run).checkpoints] == [1, 3]


def test_a_save_that_moves_is_never_reported(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(watch, "WATCH_SECONDS", 5.0)
    with Checkpointer(tmp_path, config=config(WAIT)) as checkpointer:
        for step in (1, 2):
            checkpointer.save(state(20), step=step).result(WAIT)
    assert warnings_of(caplog) == []
