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
if sys.argv[2] == "ignored":
    signal.signal(number, signal.SIG_IGN)
else:
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
with SignalWatch([sys.argv[1]], print):
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    print("still here", flush=True)
    time.sleep(1.1)
    os.kill(os.getpid(), number)
    time.sleep(30)
print("not reached")
"""


@pytest.mark.parametrize("before", ["default", "ignored"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_the_process_and_an_echo_of_the_first_does_not(name: str, before: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SECOND_SIGNAL, name, before],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
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


BUSY = """
import hashlib, os, signal, sys, threading, time
from dcp_ckpt.stopping.signals import SignalWatch
threading.Thread(target=sys.stdin.read, daemon=True).start()
with SignalWatch(["SIGTERM"], print):
    print("busy", flush=True)
    # One call into C: no handler of Python's runs before it ends.
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 200_000_000)
"""


def test_a_second_signal_ends_a_process_that_runs_no_handler() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "busy\n"
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 143
        finally:
            process.kill()


FORKED = """
import os, signal, time
from dcp_ckpt.stopping.signals import SignalWatch
asked = []
with SignalWatch(["SIGTERM"], asked.append):
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), asked)
    time.sleep(1.1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.5)
    print(asked)
"""


def test_a_forked_child_ends_by_its_own_signal_and_counts_for_nothing() -> None:
    ended = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=20)
    assert (ended.stdout, ended.returncode) == ("-15 []\n['SIGTERM']\n", 0), ended.stderr


BESIDE_A_CHILD = """
import os, time
from dcp_ckpt.stopping.signals import SignalWatch
def closed_since():
    return before - len(os.listdir("/proc/self/fd"))
watch = SignalWatch(["SIGTERM"], print)
held = os.dup(watch._alarm._writer)  # as in a child of whoever forks past Python
heard, told = os.pipe()
before = len(os.listdir("/proc/self/fd"))
child = os.fork()
if child == 0:
    os.write(told, b"%d" % closed_since())
    watch.close()
    time.sleep(30)
    os._exit(0)
watch.close()
print("closed", closed_since(), os.read(heard, 9))
os.kill(child, 9)
os.waitpid(child, 0)
"""


def test_it_ends_beside_forked_children_that_live_on() -> None:
    """Such as data-loading processes: an end of file would come when the last of them has ended."""
    ended = subprocess.run([sys.executable, "-c", BESIDE_A_CHILD], capture_output=True, text=True, timeout=20)
    assert (ended.stdout, ended.returncode) == ("closed 2 b'2'\n", 0), ended.stderr


def test_what_was_blocked_stays_blocked_across_a_fork() -> None:
    """As where data-loading processes are started: they begin with SIGTERM blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        with SignalWatch(["SIGUSR1", "SIGUSR2"], print):
            child = os.fork()
            if child == 0:
                os._exit(signal.pthread_sigmask(signal.SIG_BLOCK, []) != before | {signal.SIGUSR1})
            assert os.waitpid(child, 0)[1] == 0
            assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before | {signal.SIGUSR1}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_signal_that_nobody_heard_is_raised_again() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        for is_heard in (True, False):
            watch = SignalWatch(["SIGUSR1"], lambda name: None)
            os.kill(os.getpid(), signal.SIGUSR1)
            watch.close(is_heard=is_heard)
            assert heard == ([] if is_heard else [signal.SIGUSR1])
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_was_installed_later_stays() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        watch = SignalWatch(["SIGUSR1"], print)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        watch.close()
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)
