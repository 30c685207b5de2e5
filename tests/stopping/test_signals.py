"""One signal is noted, a second one ends the process; data-loading processes let both pass."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dcp_ckpt import ignore_stop_signals
from dcp_ckpt.stopping.signals import SignalWatch

SECOND_SIGNAL = """
import os, signal, sys, time
from dcp_ckpt.stopping.signals import SignalWatch
number = getattr(signal, sys.argv[1])
with SignalWatch([sys.argv[1]], print):
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    print("still here", flush=True)
    time.sleep(1.1)
    os.kill(os.getpid(), number)
    time.sleep(30)
print("not reached")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_the_process_and_an_echo_of_the_first_does_not(name: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SECOND_SIGNAL, name], capture_output=True, text=True, timeout=20, check=False
    )
    assert ended.stdout == f"{name}\nstill here\n"
    assert ended.returncode == -signal.Signals[name]


def test_the_handlers_from_before_come_back() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        asked: list[str] = []
        watch = SignalWatch(["SIGUSR1"], asked.append)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert asked == ["SIGUSR1"]
        watch.close()
        watch.close()
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_elsewhere_than_on_the_main_thread_nothing_is_handled(caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: SignalWatch(["SIGTERM"], print).close())
    thread.start()
    thread.join()
    assert "main thread" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_data_loading_process_lets_the_signals_pass() -> None:
    started = time.monotonic()
    script = (
        "import os, signal; from dcp_ckpt import ignore_stop_signals; ignore_stop_signals(3); "
        "[os.kill(os.getpid(), number) for number in (signal.SIGTERM, signal.SIGINT)]; print('alive')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "alive\n")
    assert time.monotonic() - started < 20
    assert ignore_stop_signals.__module__ == "dcp_ckpt.stopping.signals"
