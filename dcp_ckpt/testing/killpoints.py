"""Killing real trainers and writers at a chosen system call, without a word about it in the code that dies.

Owns the hook that Python runs at the start of every process of an instrumented start (a `sitecustomize`
module on PYTHONPATH), and the book in which these processes enroll, so that a test knows every one that was
started. Must not know checkpoints. Called by crash tests.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dcp_ckpt.testing.interposition import CALLS, SystemCall, interpose

__all__ = ["Book", "KillPoint", "Member", "instrument", "take_part"]

Action = Literal["kill", "kill_trainers", "kill_all", "hold", "stop", "fail"]
_VARIABLE = "DCP_CKPT_KILLPOINTS"
_HOOK = """\
import os
from dcp_ckpt.testing.killpoints import take_part
take_part(os.environ["{variable}"], rank=int(os.environ.get("RANK", "0")))
"""
_WRITER_MARK = "dcp_ckpt.writer.program"
_POLL_SECONDS = 0.005


@dataclass(frozen=True, kw_only=True)
class KillPoint:
    """What happens at the `number`-th call of `call` with a path like `path` in one process.

    Args:
        role: `trainer` or `writer`, of `rank`.
        call: a name of `dcp_ckpt.testing.interposition.CALLS`.
        path: pattern as in `fnmatch`; absolute, `*` stands for slashes too.
        after: once the call has succeeded, instead of before it.
        action: `kill` this process; `kill_trainers` and go on; `kill_all` processes of the start, this one
            last; `hold` the calling thread until `Book.release`; `stop` the whole process (SIGSTOP) until
            somebody lets it go on; `fail` the call with `errno`, in place of making it.
        errno: of `fail`.
    """

    role: Literal["trainer", "writer"]
    call: str
    path: str
    rank: int = 0
    after: bool = False
    number: int = 1
    action: Action = "kill"
    errno: int = 0

    def __post_init__(self) -> None:
        if self.call not in CALLS:
            raise ValueError(f"call must be one of {CALLS}, not {self.call!r}")
        if (self.action == "fail") != (self.errno != 0) or (self.after and self.action == "fail"):
            raise ValueError("fail, and nothing else, takes an errno, and comes before the call")

    def __str__(self) -> str:
        moment = "after" if self.after else "before"
        return f"{self.action}-by-{self.role}{self.rank}-{moment}-{self.call}-{self.path.strip('*/')}"


@dataclass(frozen=True, kw_only=True)
class Member:
    """One process of an instrumented start; `started` tells it from a later one of the same id."""

    role: str
    rank: int
    pid: int
    started: str

    @property
    def is_alive(self) -> bool:
        """A zombie that nobody has reaped yet is not alive."""
        status = _status(self.pid)
        return status is not None and status[0] != "Z" and status[1] == self.started

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send it a signal; nothing happens when it is gone."""
        if not self.is_alive:
            return
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return


class Book:
    """Where the processes of one start enroll, and where held ones wait.

    Args:
        directory: made if missing; of this start alone.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._gate = directory / "gate"
        self._opened: int | None = None

    def prepare(self) -> None:
        """Called by the test before the start. Whoever prepares must `close`."""
        self.directory.mkdir(parents=True)
        os.mkfifo(self._gate)
        self._opened = os.open(self._gate, os.O_RDWR | os.O_CLOEXEC)

    def members(self, role: str | None = None) -> list[Member]:
        """All that enrolled so far, dead ones included."""
        found = [Member(**json.loads(path.read_text())) for path in self.directory.glob("member-*.json")]
        return sorted((m for m in found if role in (None, m.role)), key=lambda m: (m.role, m.rank, m.pid))

    def alive(self, role: str | None = None) -> list[Member]:
        return [member for member in self.members(role) if member.is_alive]

    def held(self) -> list[int]:
        """Process ids of those that stand at a `hold` or `stop`, or have stood."""
        return sorted(int(path.suffix[1:]) for path in self.directory.glob("held.*"))

    def release(self) -> None:
        """Let all that are held go on. Idempotent."""
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None

    def wait_gone(self, role: str | None = None, *, timeout_seconds: float) -> list[Member]:
        """Wait until no member lives; returns those that still do after `timeout_seconds`."""
        deadline = time.monotonic() + timeout_seconds
        while (left := self.alive(role)) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return left

    def close(self) -> None:
        """Kill all that live. Idempotent."""
        for member in self.alive():
            member.kill()
        self.release()

    def enroll(self, role: str, rank: int) -> None:
        """Called by the member itself."""
        status = _status(os.getpid())
        assert status is not None
        member = Member(role=role, rank=rank, pid=os.getpid(), started=status[1])
        path = self.directory / f"member-{member.pid}.json"
        draft = self.directory / f"draft-{member.pid}"
        draft.write_text(json.dumps(asdict(member)))
        draft.rename(path)

    def hold(self) -> None:
        """Called by a member that is to wait for `release`."""
        gate = os.open(self._gate, os.O_RDONLY | os.O_CLOEXEC)
        self._tell_held()
        while os.read(gate, 1):
            pass
        os.close(gate)

    def stop(self) -> None:
        """Called by a member that is to stop as a whole, until somebody sends it SIGCONT."""
        self._tell_held()
        os.kill(os.getpid(), signal.SIGSTOP)

    def _tell_held(self) -> None:
        (self.directory / f"held.{os.getpid()}").touch()


def instrument(book: Book, points: Sequence[KillPoint] = ()) -> dict[str, str]:
    """The environment variables with which a start enrolls its processes in `book` and meets `points`.

    Writes the hook into the book's directory; its PYTHONPATH replaces one that is set.
    """
    (book.directory / "sitecustomize.py").write_text(_HOOK.format(variable=_VARIABLE))
    package_root = Path(__file__).resolve().parents[2]
    settings = {"book": str(book.directory), "points": [asdict(point) for point in points]}
    return {
        "PYTHONPATH": os.pathsep.join((str(book.directory), str(package_root))),
        _VARIABLE: json.dumps(settings),
    }


def take_part(settings: str, *, rank: int) -> None:
    """Called by the hook before the program of this process starts: enroll, and meet the points."""
    parsed = json.loads(settings)
    role = "writer" if any(_WRITER_MARK in argument for argument in sys.orig_argv) else "trainer"
    book = Book(Path(parsed["book"]))
    book.enroll(role, rank)
    points = [KillPoint(**fields) for fields in parsed["points"]]
    own = [point for point in points if (point.role, point.rank) == (role, rank)]
    if own:
        interpose(_Trigger(book, own))


class _Trigger:
    """Counts matching calls, and acts."""

    def __init__(self, book: Book, points: Sequence[KillPoint]) -> None:
        self._book = book
        self._points = points
        self._counts = [0] * len(points)
        self._lock = threading.Lock()
        self._acting = threading.local()

    def __call__(self, call: SystemCall) -> None:
        if getattr(self._acting, "now", False):
            return
        for index, point in enumerate(self._points):
            if (call.name, call.after) != (point.call, point.after) or not call.matches(point.path):
                continue
            with self._lock:
                self._counts[index] += 1
                due = self._counts[index] == point.number
            if due:
                self._acting.now = True
                try:
                    self._act(point, call)
                finally:
                    self._acting.now = False

    def _act(self, point: KillPoint, call: SystemCall) -> None:
        match point.action:
            case "hold":
                self._book.hold()
            case "stop":
                self._book.stop()
            case "fail":
                raise OSError(point.errno, os.strerror(point.errno), call.paths[-1])
            case "kill_trainers":
                self._kill_others("trainer")
            case "kill_all":
                self._kill_others(None)
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)

    def _kill_others(self, role: str | None) -> None:
        for member in self._book.alive(role):
            if member.pid != os.getpid():
                member.kill()


def _status(pid: int) -> tuple[str, str] | None:
    """State and start time of a process, or None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may hold anything, spaces and parentheses too.
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]
