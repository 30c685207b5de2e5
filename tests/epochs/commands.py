"""The command line as a process of its own, which can be held like a trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from dcp_ckpt.testing.killpoints import Book, instrument
from tests.epochs.places import HELD_SECONDS, Gate, Moment, Place
from tests.eventually import eventually

__all__ = ["Command", "command", "run_command"]


class Command:
    """A command that was started."""

    def __init__(self, process: subprocess.Popen[str], book: Book, gate: Gate | None) -> None:
        self._process = process
        self._book = book
        self._gate = gate

    def wait_held(self) -> None:
        def is_held() -> bool:
            return bool(self._book.held()) if self._gate is None else self._gate.reached.is_set()

        assert eventually(is_held, timeout_seconds=HELD_SECONDS), self._process.poll()

    def release(self) -> None:
        if self._gate is not None:
            self._gate.released.set()
        self._book.release()

    def wait(self) -> tuple[int, str]:
        """Its exit code, and what it printed."""
        output, _ = self._process.communicate(timeout=HELD_SECONDS)
        return self._process.returncode, output


@contextmanager
def command(place: Place, name: str, *options: str, hold: Moment | None = None) -> Iterator[Command]:
    """`python -m dcp_ckpt NAME RUN OPTIONS`. Leaving the with-block kills it."""
    with ExitStack() as stack:
        points, environment, gate = stack.enter_context(place.held(hold)) if hold else ((), {}, None)
        number = len(list(place.directory.glob("command-*")))
        book = Book(place.directory / f"command-{number}")
        book.prepare()
        stack.callback(book.close)
        process = subprocess.Popen(
            [sys.executable, "-m", "dcp_ckpt", name, place.url, *options],
            env={**os.environ, **environment, **instrument(book, points)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        stack.enter_context(process)
        stack.callback(process.kill)
        yield Command(process, book, gate)


def run_command(place: Place, name: str, *options: str) -> tuple[int, str]:
    with command(place, name, *options) as started:
        return started.wait()
