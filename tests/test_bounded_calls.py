"""Calls that never return hold up nobody, and a channel whose store is stopped says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in its __all__

from dcp_ckpt import store_channel
from dcp_ckpt.bounded_calls import BoundedCalls
from dcp_ckpt.errors import CoordinationError
from dcp_ckpt.store_channel import StoreChannel

WAIT_SECONDS = 20.0
SILENCE_SECONDS = 0.5

STORE = """\
import sys
from datetime import timedelta
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def calls() -> Iterator[BoundedCalls]:
    with closing(BoundedCalls("test-calls")) as calls:
        yield calls


def test_results_and_errors_come_back(calls: BoundedCalls) -> None:
    assert calls.call(lambda: 5, patience_seconds=WAIT_SECONDS) == 5
    with pytest.raises(ZeroDivisionError):
        calls.call(lambda: 1 // 0, patience_seconds=WAIT_SECONDS)


def test_a_call_that_does_not_end_is_given_up_and_those_behind_it_are_never_made(calls: BoundedCalls) -> None:
    release = threading.Event()
    made: list[int] = []
    try:
        with pytest.raises(TimeoutError):
            calls.call(release.wait, patience_seconds=0.05)
        with pytest.raises(TimeoutError):
            calls.call(lambda: made.append(1), patience_seconds=0.05)
    finally:
        release.set()
    calls.call(lambda: made.append(2), patience_seconds=WAIT_SECONDS)
    assert made == [2]


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[StoreChannel, int]]:
    """The channel to a store, and the process that hosts it."""
    monkeypatch.setattr(store_channel, "SILENCE_SECONDS", SILENCE_SECONDS)
    program = [sys.executable, "-c", STORE]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        store = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=5), wait_for_workers=False)
        channel = StoreChannel(store, 1, 2, host_ranks=(0, 1), close_seconds=1.0)
        channel.put("there", 1)
        try:
            yield channel, process.pid
        finally:
            os.kill(process.pid, signal.SIGCONT)
            channel.close()
            process.kill()


def stop(pid: int) -> None:
    """Stop a child of this process; none of its threads runs any more when this returns."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def test_no_call_of_a_channel_waits_longer_than_it_says(stopped: tuple[StoreChannel, int]) -> None:
    channel, pid = stopped
    clone = channel.clone()
    stop(pid)
    waited: list[float] = []

    def wait_in_a_thread() -> None:
        started = time.monotonic()
        with pytest.raises(CoordinationError, match="rank 0 has not answered rank 1"):
            clone.get_many(["never"], timeout_seconds=0.5)
        waited.append(time.monotonic() - started)

    thread = threading.Thread(target=wait_in_a_thread)
    thread.start()
    started = time.monotonic()
    with pytest.raises(CoordinationError, match="rank 0 has not answered rank 1"):
        channel.get("never", timeout_seconds=0.5)
    with pytest.raises(CoordinationError):
        channel.clone()
    channel.close()
    waited.append(time.monotonic() - started)
    thread.join(WAIT_SECONDS)
    clone.close()
    assert len(waited) == 2
    assert max(waited) < WAIT_SECONDS / 2


def test_a_store_that_goes_on_is_heard_again(stopped: tuple[StoreChannel, int]) -> None:
    channel, pid = stopped
    stop(pid)
    with pytest.raises(CoordinationError):
        channel.present(["there"])
    os.kill(pid, signal.SIGCONT)
    assert channel.get_many(["there", "never"], timeout_seconds=0.1) == [1, store_channel.MISSING]
