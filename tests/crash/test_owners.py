"""Who owns a run: writers that outlive trainers, two starts at once, and an owner that wakes up too late."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from dcp_ckpt.format.manifest import decode_manifest
from dcp_ckpt.testing.killpoints import KillPoint
from dcp_ckpt.writer.messages import Request, encode
from dcp_ckpt.writer.progress import make_page
from tests.crash.run_files import committed_steps, contents, debris, files_below, require_all_verify
from tests.crash.starts import LAST_STEP, Start, require_exact_resume, wait_until

STEP = "*/run/step-00000003"
HOLD_SECONDS = 60.0


def hold_writers(
    ranks: Iterable[int], call: str = "open", path: str = f"{STEP}/__*.distcp"
) -> list[KillPoint]:
    return [KillPoint(role="writer", rank=rank, call=call, path=path, action="hold") for rank in ranks]


def wait_held(start: Start) -> None:
    """Every rank has staged step 3, and its writer stands before the first byte of it."""
    ranks = range(start.world_size)
    wait_until(lambda: len(start.book.held()) == start.world_size, HOLD_SECONDS, start)
    wait_until(lambda: all(3 in start.steps("staged", rank) for rank in ranks), HOLD_SECONDS, start)


@pytest.mark.distributed
def test_a_staged_save_survives_all_trainers(tmp_path: Path) -> None:
    with Start(tmp_path, "killed", world_size=2, points=hold_writers((0, 1))) as start:
        wait_held(start)
        for trainer in start.book.members("trainer"):
            trainer.kill()
        assert start.wait() == [-9, -9]
        assert len(start.book.alive("writer")) == 2
        start.book.release()
        start.require_gone()
        assert committed_steps(start.run) == [1, 2]
        assert require_exact_resume(tmp_path, start) == 3


def test_a_writer_whose_replies_nobody_reads_still_does_all_it_was_given(tmp_path: Path) -> None:
    """A trainer that dies with a reply unread resets the connection; what it had sent before still counts."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    page = make_page()
    number = str(theirs.fileno())
    program = [sys.executable, "-m", "dcp_ckpt.writer.program", number, str(os.getpid()), str(page)]
    with theirs, ours:
        writer = subprocess.Popen(program, pass_fds=[theirs.fileno(), page], stderr=subprocess.PIPE)
        os.close(page)
        for key in ("first.lease", "second.lease"):
            ours.send(encode(Request(kind="lease", storage_url=str(tmp_path / "run"), key=key)))
        readable, _, _ = select.select([ours], [], [], HOLD_SECONDS)
        assert readable, "the writer did not answer"
    _, output = writer.communicate(timeout=HOLD_SECONDS)
    assert (writer.returncode, output) == (0, b"")
    assert files_below(tmp_path / "run") == ["first.lease", "second.lease"]


@pytest.mark.crash
def test_a_start_waits_for_the_writers_of_the_one_before(tmp_path: Path) -> None:
    with Start(tmp_path, "killed", points=hold_writers((0,))) as start:
        wait_held(start)
        start.trainer().kill()
        assert start.wait() == [-9]
        with Start(tmp_path, "next") as successor:
            wait_until(lambda: "still live; waiting" in successor.output(), HOLD_SECONDS, successor)
            assert len(start.book.alive("writer")) == 1
            start.book.release()
            successor.succeed()
            start.require_gone()
            assert successor.steps("resume") == [3]
            assert debris(start.run) == []
            require_all_verify(start.run)


@pytest.mark.crash
def test_what_a_dead_ranks_writer_finished_is_committed(tmp_path: Path) -> None:
    points = hold_writers((0, 1))
    with Start(tmp_path, "killed", world_size=2, points=points, options=["--timeout", "6"]) as start:
        wait_held(start)
        start.trainer(1).kill()
        start.trainer(1).wait()
        start.book.release()
        wait_until(lambda: 3 in start.steps("save", outcome="committed"), HOLD_SECONDS, start)
        start.wait()
        start.require_gone()
        assert require_exact_resume(tmp_path, start) == 3


@pytest.mark.distributed
def test_an_owner_that_wakes_up_late_is_fenced(tmp_path: Path) -> None:
    points = hold_writers((0,), call="mkdir", path=STEP)
    with Start(tmp_path, "old", points=points) as old:
        wait_held(old)
        for member in old.book.members():
            member.kill(signal.SIGSTOP)
        with Start(tmp_path, "new", options=["--wait", "0"]) as new:
            new.succeed()
            assert new.steps("resume") == [2]
        before = contents(old.run)
        for member in old.book.members():
            member.kill(signal.SIGCONT)
        old.book.release()
        assert old.wait() == [0], old.output()
        old.require_gone()
        saves = [(event["step"], event.get("kind")) for event in old.events("save")]
        assert saves == [(1, None), (2, None), (3, "Fenced"), (4, "Fenced"), (5, "Fenced")]
        after = contents(old.run)
        assert {name: after[name] for name in before} == before
        # It deletes nothing any more, not even its own; the next start does.
        assert all(".e0001-s" in name for name in after.keys() - before.keys())
        assert newest_epoch(old.run) == 2
        assert require_exact_resume(tmp_path, new, name="last") == LAST_STEP


@pytest.mark.crash
@pytest.mark.parametrize("wait", ["0", "30"])
def test_two_starts_at_the_same_moment(tmp_path: Path, wait: str) -> None:
    options = ["--wait", wait]
    with Start(tmp_path, "a", options=options) as one, Start(tmp_path, "b", options=options) as other:
        for start in (one, other):
            assert start.wait() == [0], start.output()
            start.require_gone()
            failed = {
                event["kind"] for event in start.events("save") if event["outcome"] in ("failed", "unknown")
            }
            assert failed <= {"Fenced", "StorageNotFound"}, start.output()
        require_all_verify(one.run)
        assert committed_steps(one.run)[-1] == LAST_STEP
        assert {path.name for path in one.run.glob("epochs/*.json")} >= {"00000001.json", "00000002.json"}
        assert require_exact_resume(tmp_path, one) == LAST_STEP


def newest_epoch(run: Path) -> int:
    """The epoch of the checkpoint that is latest."""
    manifests = [
        decode_manifest(path.read_bytes(), path=str(path)) for path in run.glob("step-*/manifest.json")
    ]
    return max(manifest.order for manifest in manifests)[0]
