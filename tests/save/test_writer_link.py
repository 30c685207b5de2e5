"""The line to the writer: one that is late, dead or out of step is replaced, and never shares the arena."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_ckpt import CheckpointConfig, Checkpointer, verify
from dcp_ckpt.errors import SaveFailed

WAIT = 30.0
MANY_DESCRIPTORS = 1100

_LIAR = """\
#!{python}
import os, sys
arguments = sys.argv[1:]
if os.path.exists({lied!r}):
    os.execv({python!r}, [{python!r}, *arguments])
sys.path.insert(0, arguments[3])
from dataclasses import replace
from dcp_ckpt.writer import program

def encode(reply):
    if not reply.attempt:
        return real(reply)
    open({lied!r}, "w").close()
    return {answer}

real, program.encode = program.encode, encode
sys.exit(program.main(arguments[4:]))
"""


class Watching:
    """State that notes, while it is staged, whether a process still runs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.found: list[bool] = []

    def state_dict(self) -> dict[str, Any]:
        self.found.append(Path(f"/proc/{self.pid}").exists())
        return {"n": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError("only saved")


def writer_pid(checkpointer: Checkpointer) -> int:
    assert checkpointer._link._process is not None
    return checkpointer._link._process.pid


def config(timeout_seconds: float = WAIT) -> CheckpointConfig:
    return CheckpointConfig(keep=None, grace_seconds=0.0, timeout_seconds=timeout_seconds)


def state() -> dict[str, Any]:
    return {"tensor": torch.arange(1000)}


def require_next_save_works(checkpointer: Checkpointer, old: int) -> None:
    """The one that was out of step is gone before anything is copied into the arena."""
    watching = Watching(old)
    checkpointer.save({**state(), "watching": watching}, step=3).result(WAIT)
    assert watching.found == [False]
    assert writer_pid(checkpointer) != old


def test_a_writer_that_is_late_fails_the_save_and_is_replaced(tmp_path):
    with Checkpointer(tmp_path, config=config(timeout_seconds=3.0)) as checkpointer:
        checkpointer.save(state(), step=1).result(WAIT)
        old = writer_pid(checkpointer)
        os.kill(old, signal.SIGSTOP)
        handle = checkpointer.save(state(), step=2)
        with pytest.raises(SaveFailed, match=rf"the writer \(pid {old}\) did not finish within"):
            handle.result(WAIT)
        assert handle.outcome == "failed"
        require_next_save_works(checkpointer, old)
    assert [checked.step for checked in verify(tmp_path).checkpoints] == [1, 3]


def test_a_writer_that_dies_at_work_fails_the_save_by_name(tmp_path):
    with Checkpointer(tmp_path, config=config()) as checkpointer:
        checkpointer.save(state(), step=1).result(WAIT)
        old = writer_pid(checkpointer)
        os.kill(old, signal.SIGSTOP)
        handle = checkpointer.save(state(), step=2)
        os.kill(old, signal.SIGKILL)
        with pytest.raises(SaveFailed, match=rf"the writer \(pid {old}\) was killed by signal 9"):
            handle.result(WAIT)
        require_next_save_works(checkpointer, old)
    assert [checked.step for checked in verify(tmp_path).checkpoints] == [1, 3]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ('real(replace(reply, attempt="e0001-s000099"))', "answered e0001-s000099 instead of e0001-s000001"),
        ("b'{nonsense'", "answered nonsense"),
    ],
    ids=["another attempt", "nonsense"],
)
def test_a_writer_that_is_out_of_step_fails_the_save_and_is_replaced(tmp_path, monkeypatch, answer, told):
    program, lied = tmp_path / "liar", tmp_path / "lied"
    program.write_text(_LIAR.format(python=sys.executable, lied=str(lied), answer=answer))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(program))
    run = tmp_path / "run"
    with Checkpointer(run, config=config()) as checkpointer:
        old = writer_pid(checkpointer)
        handle = checkpointer.save(state(), step=1)
        with pytest.raises(SaveFailed, match=told):
            handle.result(WAIT)
        assert lied.exists()
        assert handle.outcome == "failed"
        assert not list(run.glob("step-*/rank-00000.*"))
        require_next_save_works(checkpointer, old)
    assert [checked.step for checked in verify(run).checkpoints] == [3]


_MANY = """\
import os, resource, sys
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard) if hard > 0 else 4096, hard))
for _ in range({count}):
    os.open(os.devnull, os.O_RDONLY)
from dcp_ckpt.save.writer_process import WriterProcess
with WriterProcess(rank=0) as writer:
    assert writer._connection.fileno() > 1024
    writer.hold_lease(sys.argv[1], "a.lease", timeout_seconds=20.0)
    writer.hold_lease(sys.argv[1], "b.lease", timeout_seconds=20.0)
print("held")
"""


def test_a_writer_works_where_many_files_are_open(tmp_path):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < MANY_DESCRIPTORS + 100:
        pytest.skip(f"this machine allows {hard} open files only")
    program = [sys.executable, "-c", _MANY.format(count=MANY_DESCRIPTORS), str(tmp_path / "run")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "held\n", "")
