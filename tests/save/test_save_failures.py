"""Saves and loads that go wrong in one process: what is told, what stands, and that work goes on."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_ckpt import CheckpointConfig, Checkpointer, LatestN, verify
from dcp_ckpt.errors import (
    CheckpointError,
    CommitUnknown,
    ConfigError,
    LoadError,
    SaveFailed,
    StateError,
    StateMismatch,
    StepAlreadySaved,
    StorageError,
    StorageTransient,
    StorageUnsuitable,
)
from dcp_ckpt.save.handle import SaveHandle
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.interposition import SystemCall, interposed
from tests.failing_calls import failing

WAIT = 30.0


def settings(**changes: Any) -> CheckpointConfig:
    defaults: dict[str, Any] = {"keep": None, "grace_seconds": 0.0, "timeout_seconds": WAIT}
    return CheckpointConfig(**defaults | changes)


def state_of(number: int) -> dict[str, Any]:
    return {"tensor": torch.full((10,), number), "number": number}


def save_all(path: Path, steps: list[int], **changes: Any) -> None:
    with Checkpointer(path, config=settings(**changes)) as checkpointer:
        for step in steps:
            checkpointer.save(state_of(step), step=step).result(WAIT)


def steps_of(path: Path) -> list[int | None]:
    return [checked.step for checked in verify(path).checkpoints]


def files_of(directory: Path) -> list[str]:
    return sorted(name.name for name in directory.iterdir())


def newest_handle(checkpointer: Checkpointer) -> SaveHandle:
    """The handle of a call that raised instead of returning it."""
    assert checkpointer._session is not None
    handle = checkpointer._session.saver.last
    assert handle is not None
    return handle


# What came before


def test_saving_into_a_run_with_history_needs_a_load_first(tmp_path):
    save_all(tmp_path, [10, 20])
    with Checkpointer(tmp_path, config=settings(keep=LatestN(1))) as checkpointer:
        with pytest.raises(StepAlreadySaved, match=r"up to step 20 and none was loaded"):
            checkpointer.save(state_of(1), step=1)
        with pytest.raises(StepAlreadySaved, match=r"none was loaded"):
            checkpointer.save(state_of(20), step=20)
    assert steps_of(tmp_path) == [10, 20]


def test_a_load_that_failed_does_not_count_as_one(tmp_path):
    save_all(tmp_path, [10, 20])
    with Checkpointer(tmp_path, config=settings(keep=LatestN(1))) as checkpointer:
        with pytest.raises(StateMismatch):
            checkpointer.load({"other": torch.zeros(3)})
        with pytest.raises(StepAlreadySaved, match=r"none was loaded"):
            checkpointer.save({"other": torch.zeros(3)}, step=1)
    assert steps_of(tmp_path) == [10, 20]


def test_a_rollback_after_a_save_needs_a_checkpointer_of_its_own(tmp_path):
    save_all(tmp_path, [100])
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        checkpointer.load(state_of(0))
        checkpointer.save(state_of(200), step=200).result(WAIT)
        checkpointer.load(state_of(0), 100)
        with pytest.raises(StepAlreadySaved, match="step 150 is not after step 200"):
            checkpointer.save(state_of(150), step=150)
    state = state_of(0)
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        report = checkpointer.load(state, 100)
        assert report is not None
        assert (report.step, state["number"]) == (100, 100)
        checkpointer.save(state_of(150), step=150).result(WAIT)
        latest = checkpointer.latest()
    assert latest is not None
    assert latest.step == 150
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        report = checkpointer.load(state)
    assert report is not None
    assert (report.step, state["number"]) == (150, 150)


# Storage that goes away or does not answer


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_run_that_is_gone_is_not_made_anew(tmp_path, how):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with Checkpointer(run, config=settings(dcp_metadata="never")) as checkpointer:
        checkpointer.save(state_of(1), step=1).result(WAIT)
        shutil.rmtree(run) if how == "deleted" else run.rename(elsewhere)
        handle = checkpointer.save(state_of(2), step=2)
        with pytest.raises((StorageUnsuitable, SaveFailed), match="does not see the epoch"):
            handle.result(WAIT)
    assert handle.outcome in ("failed", "unknown")
    assert not list(tmp_path.glob("*/step-00000002/manifest.json"))


def test_a_run_that_goes_away_before_the_commit_gets_no_manifest(tmp_path):
    run = tmp_path / "run"
    removed: list[bool] = []

    def remove_run(call: SystemCall) -> None:
        """The writer has published its fragment; what is left to do is done by this process."""
        if call.matches("*/.manifest.json.*") and call.name == "open" and not call.after and not removed:
            removed.append(True)
            shutil.rmtree(run)

    with Checkpointer(run, config=settings()) as checkpointer, interposed(remove_run):
        handle = checkpointer.save(state_of(1), step=1)
        with pytest.raises(CheckpointError):
            handle.result(WAIT)
    assert removed
    assert handle.outcome in ("failed", "unknown")
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
def test_a_manifest_that_may_not_be_durable_is_unknown_and_nothing_is_deleted(tmp_path, times):
    step = tmp_path / "step-00000001"
    with (
        Checkpointer(tmp_path, config=settings()) as checkpointer,
        failing("fsync", str(step), errno.EIO, times=times, only_if=(step / "manifest.json").exists),
    ):
        handle = checkpointer.save(state_of(1), step=1)
        with pytest.raises(CommitUnknown, match=r"manifest\.json"):
            handle.result(WAIT)
    assert handle.outcome == "unknown"
    assert steps_of(tmp_path) == [1]
    assert verify(tmp_path).ok


@pytest.mark.parametrize(
    ("call", "pattern"),
    [("open", "*/epochs/.*.json.*"), ("rename", "*/step-00000007")],
    ids=["claim", "recover"],
)
def test_a_start_that_failed_can_be_repeated(tmp_path, call, pattern):
    save_all(tmp_path, [5])
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / "step-00000007" / "__0_0.e0001-s000009.distcp").write_bytes(b"debris")
    storage = open_storage(tmp_path)
    state = state_of(0)
    with Checkpointer(tmp_path, config=settings(recover_wait_seconds=0.0)) as checkpointer:
        with failing(call, pattern, errno.ESTALE), pytest.raises(StorageTransient):
            checkpointer.load(state)
        assert not storage.lease_is_held("epochs/00000002.lease")
        report = checkpointer.load(state)
        assert report is not None
        assert report.step == 5
        assert storage.lease_is_held("epochs/00000003.lease")
        checkpointer.save(state_of(6), step=6).result(WAIT)
    assert steps_of(tmp_path) == [5, 6]


def test_a_relative_path_means_the_directory_of_the_start(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Checkpointer("run", config=settings()) as checkpointer:
        checkpointer.save(state_of(1), step=1).result(WAIT)
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert checkpointer._link._process is not None
        writer = checkpointer._link._process.pid
        os.kill(writer, signal.SIGKILL)
        os.waitid(os.P_PID, writer, os.WEXITED | os.WNOWAIT)
        info = checkpointer.save(state_of(2), step=2).result(WAIT)
    assert info.path == str(tmp_path / "run" / "step-00000002")
    assert steps_of(tmp_path / "run") == [1, 2]
    assert not list((tmp_path / "elsewhere").iterdir())


# Failures that come late


@pytest.mark.parametrize("where", ["call", "close"])
def test_a_failure_that_comes_after_a_newer_save_is_raised(tmp_path, where):
    newer_is_taken = threading.Event()

    def see(call: SystemCall) -> None:
        if call.name == "open" and not call.after and call.matches("*/step-00000001/.manifest.json.*"):
            assert newer_is_taken.wait(WAIT)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    checkpointer = Checkpointer(tmp_path, config=settings(on_failure="raise"))
    with interposed(see):
        handles = [checkpointer.save(state_of(step), step=step) for step in (1, 2)]
        newer_is_taken.set()
        handles[-1].wait_done(WAIT)
    assert [handle.outcome for handle in handles] == ["failed", "committed"]
    if where == "call":
        with pytest.raises(StorageError) as caught:
            checkpointer.save(state_of(3), step=3)
        checkpointer.save(state_of(3), step=3).result(WAIT)
        checkpointer.close()
    else:
        with pytest.raises(StorageError) as caught:
            checkpointer.close()
    assert caught.value.step == 1
    assert steps_of(tmp_path) == ([2, 3] if where == "call" else [2])


# The user's objects


class Interrupted:
    """Somebody presses Ctrl-C while its state is asked for."""

    def state_dict(self) -> dict[str, Any]:
        raise KeyboardInterrupt

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError("only saved")


def test_an_interrupt_goes_on_and_fails_the_save(tmp_path):
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save({"object": Interrupted()}, step=1)
        handle = newest_handle(checkpointer)
        assert handle.wait_done(WAIT)
        assert handle.outcome == "failed"
        with pytest.raises(CheckpointError, match="KeyboardInterrupt"):
            handle.result()
        checkpointer.save(state_of(1), step=1).result(WAIT)
    assert steps_of(tmp_path) == [1]


class Picky:
    """Takes its state back only when it is told to."""

    def __init__(self, *, refuses: bool) -> None:
        self.refuses = refuses

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.refuses:
            raise RuntimeError("not today")


def test_a_state_that_is_a_mixture_is_not_saved(tmp_path):
    picky = Picky(refuses=False)
    state: dict[str, Any] = {"picky": picky, "tensor": torch.ones(3)}
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        checkpointer.save(state, step=1).result(WAIT)
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        picky.refuses = True
        with pytest.raises(LoadError, match=r"picky.*not today.*the state is a mixture") as caught:
            checkpointer.load(state)
        assert not isinstance(caught.value, StateMismatch)
        with pytest.raises(SaveFailed, match="mixture"):
            checkpointer.save(state, step=2)
        with pytest.raises(StateMismatch):
            checkpointer.load({"other": 1})
        with pytest.raises(SaveFailed, match="mixture"):
            checkpointer.save(state, step=2)
        picky.refuses = False
        checkpointer.load(state)
        checkpointer.save(state, step=2).result(WAIT)
    assert steps_of(tmp_path) == [1, 2]


def test_a_state_that_is_none_fails_the_save_and_the_load_only(tmp_path):
    wrong: Any = [1, 2]
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        with pytest.raises(ConfigError, match="must be a TrainState or a dict"):
            checkpointer.save(wrong, step=1).result(WAIT)
        checkpointer.save(state_of(1), step=1).result(WAIT)
        with pytest.raises(ConfigError, match="must be a TrainState or a dict"):
            checkpointer.load(wrong)
        checkpointer.save(state_of(2), step=2).result(WAIT)
    assert steps_of(tmp_path) == [1, 2]


# Handles, waiting and leaving


def test_a_handle_tells_of_its_save(tmp_path):
    with Checkpointer(tmp_path, config=settings()) as checkpointer:
        checkpointer.wait()
        handle = checkpointer.save(state_of(3), step=3, metrics={"loss": torch.tensor(0.5)}, tags=("a", "b"))
        assert handle.wait_staged(0)
        checkpointer.wait()
        info = handle.result(0)
        assert handle.wait_done(0)
        assert (handle.outcome, handle.error, handle.failure_seen) == ("committed", None, True)
        assert (info.step, info.metrics["loss"], info.tags, info.world_size) == (3, 0.5, ("a", "b"), 1)
        assert info.path == str(tmp_path / "step-00000003")
        assert info.bytes == sum(file.stat().st_size for file in Path(info.path).glob("__*.distcp"))
        assert 0 < info.stall_seconds <= info.durable_seconds
        (listed,) = checkpointer.checkpoints()
        assert (listed.path, listed.bytes, listed.created_at) == (info.path, info.bytes, info.created_at)


def test_waiting_has_an_end(tmp_path):
    go_on = threading.Event()

    def see(call: SystemCall) -> None:
        if call.name == "open" and not call.after and call.matches("*/.manifest.json.*"):
            assert go_on.wait(WAIT)

    with Checkpointer(tmp_path, config=settings()) as checkpointer, interposed(see):
        handle = checkpointer.save(state_of(1), step=1)
        assert not handle.wait_done(0.01)
        with pytest.raises(TimeoutError, match="step 1 is still under way"):
            handle.result(0.01)
        with pytest.raises(TimeoutError, match="step 1 is still under way"):
            checkpointer.wait(0.01)
        assert handle.outcome == "pending"
        go_on.set()
        assert handle.result(WAIT).step == 1


def test_looking_at_the_error_is_not_having_been_told(tmp_path):
    checkpointer = Checkpointer(tmp_path, config=settings())
    handle = checkpointer.save({"bad": object()}, step=1)
    checkpointer.wait(WAIT)
    assert isinstance(handle.error, StateError)
    assert not handle.failure_seen
    with pytest.raises(StateError, match="bad"):
        checkpointer.close()
    assert handle.failure_seen
    checkpointer.close()


def train_badly(path: Path) -> None:
    with Checkpointer(path, config=settings()) as checkpointer:
        checkpointer.save({"bad": object()}, step=1)
        raise ZeroDivisionError


def test_an_error_of_the_training_is_not_hidden_by_one_of_the_save(tmp_path, caplog):
    with caplog.at_level(logging.ERROR, logger="dcp_ckpt.checkpointer"), pytest.raises(ZeroDivisionError):
        train_badly(tmp_path)
    assert "while closing after ZeroDivisionError()" in caplog.text
    assert "bad" in caplog.text


def test_a_forked_child_does_not_hold_up_the_end(tmp_path):
    checkpointer = Checkpointer(tmp_path, config=settings(timeout_seconds=8.0))
    checkpointer.save(state_of(1), step=1).result(WAIT)
    child_ends, ours = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        os.read(child_ends, 1)
        os._exit(0)
    os.close(child_ends)
    try:
        started = time.monotonic()
        checkpointer.close()
        assert time.monotonic() - started < 4.0
    finally:
        os.close(ours)
        os.waitpid(child, 0)
