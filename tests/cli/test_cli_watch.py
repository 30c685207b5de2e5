"""`dcp-ckpt watch`: what is under way, live, and an end by Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from dcp_ckpt.cli import watch
from dcp_ckpt.cli.watch import ranks_to_show
from dcp_ckpt.errors import StorageTransient
from dcp_ckpt.lifecycle.activity import RankActivity, RunActivity, read_activity
from dcp_ckpt.lifecycle.epochs import claim_epoch
from dcp_ckpt.lifecycle.runs import open_run
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint
from tests.cli.commands import as_json, invoke


def run_in_the_middle_of_a_save(base: Path) -> Path:
    """Step 10 is committed; of step 20, rank 0 is done and rank 1 has begun."""
    run = open_run(base)
    storage = open_storage(run.path)
    claim_epoch(
        storage, run_id=run.run_id, world_size=2, purpose="train", hold=lambda key: None, wait_seconds=0.0
    )
    write_tiny_checkpoint(storage, step=10, run_id=run.run_id)
    write_tiny_checkpoint(storage, step=5, save=3, run_id=run.run_id, commit=False)  # of one that is removed
    write_tiny_checkpoint(storage, step=20, save=2, run_id=run.run_id, commit=False)
    (fragment,) = (Path(run.path) / "step-00000020").glob("rank-00001.*.json")
    fragment.unlink()
    return Path(run.path)


def test_once_says_how_it_is(tmp_path: Path) -> None:
    run = run_in_the_middle_of_a_save(tmp_path)
    result = invoke("watch", run, "--once")
    assert result.exit_code == 0, result.output
    headline, save = result.stdout.splitlines()
    assert headline == "epoch 1 (train, 2 ranks): not running; 1 checkpoint, newest step 10"
    assert save.startswith("  unfinished save of step 20 (e0001-s000002): 1/2 ranks written, ")
    assert save.endswith("waiting for rank 1")
    (told,) = as_json("watch", run, "--once")["saves"]
    assert [rank["state"] for rank in told["ranks"]] == ["written", "writing"]
    assert all(rank["num_bytes"] == rank["expected_bytes"] > 0 for rank in told["ranks"])
    assert invoke("watch", tmp_path, "--once").exit_code == 3


def test_a_pipe_gets_a_line_for_every_change_until_ctrl_c(tmp_path: Path) -> None:
    run = run_in_the_middle_of_a_save(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "dcp_ckpt", "watch", str(run), "--json", "--every", "0.05"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["latest_step"] == 10
        write_tiny_checkpoint(open_storage(run), step=30, save=3, run_id=_run_id(run))
        assert json.loads(process.stdout.readline())["latest_step"] is not None
        process.send_signal(signal.SIGINT)
        rest, problems = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert problems == ""
    assert all(json.loads(line) for line in rest.splitlines())


def _run_id(run: Path) -> str:
    run_id: str = json.loads((run / "run.json").read_bytes())["run_id"]
    return run_id


def test_a_terminal_gets_a_picture_that_goes_on_until_ctrl_c(tmp_path: Path) -> None:
    run = run_in_the_middle_of_a_save(tmp_path)
    reader, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dcp_ckpt", "watch", str(run), "--every", "0.05"],
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "COLUMNS": "100", "LINES": "30", "TERM": "xterm"},
    )
    os.close(terminal)
    try:
        shown = read_until(reader, "written")
        assert "1/2 ranks written" in shown
        assert "rank 1  ████" in shown
        write_tiny_checkpoint(open_storage(run), step=30, save=3, run_id=_run_id(run))
        assert "\x1b[2K" in read_until(reader, "newest step 30")  # drawn over the picture before
        process.send_signal(signal.SIGINT)
        assert read_until(reader, "\x1b[?25h")  # the cursor is back
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reader)


def read_until(terminal: int, text: str) -> str:
    """What is shown from now on, to the end of `text` at least; the process is bound to end or to show it."""
    shown = b""
    while text.encode() not in shown:
        shown += os.read(terminal, 1 << 16)
    return shown.decode(errors="replace")


def test_where_there_is_no_room_those_furthest_behind_are_shown() -> None:
    def rank(number: int, state: Literal["waiting", "writing", "written"], num_bytes: int) -> RankActivity:
        return RankActivity(rank=number, state=state, num_bytes=num_bytes, expected_bytes=9)

    ranks = [rank(0, "written", 9), rank(1, "writing", 5), rank(2, "waiting", 0), rank(3, "writing", 4)]
    assert [one.rank for one in ranks_to_show(ranks, 2)] == [2, 3]
    assert [one.rank for one in ranks_to_show(ranks, 3)] == [1, 2, 3]
    assert ranks_to_show(ranks, 9) == ranks


def test_a_passing_trouble_of_the_storage_is_told_and_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_in_the_middle_of_a_save(tmp_path)
    answers = iter([StorageTransient("slow down"), KeyboardInterrupt()])

    def look_again(storage: Storage) -> RunActivity:
        raise next(answers)

    first = read_activity(open_storage(run))
    monkeypatch.setattr(watch, "read_activity", look_again)
    with pytest.raises(KeyboardInterrupt):
        watch._watch(open_storage(run), first, once=False, every=0.01, as_json=True)
    shown = capsys.readouterr()
    assert shown.err == "dcp-ckpt: looking again: slow down\n"
    assert shown.out.count("\n") == 1
