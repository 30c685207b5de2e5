"""Starts of the small training as real processes, and what a test asks of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from dcp_ckpt.testing.killpoints import Book, KillPoint, instrument
from tests.crash import small_training
from tests.crash.run_files import committed_steps, debris, require_all_verify

__all__ = ["LAST_STEP", "Start", "expected", "require_exact_resume", "wait_until"]

LAST_STEP = 5
END_SECONDS = 90.0
WRITERS_END_SECONDS = 20.0
_POLL_SECONDS = 0.005


class Start:
    """All processes of one start. Leaving the with-block kills what still runs.

    Args:
        directory: of the test; the run is `run` in it, unless `run` or `url` says otherwise.
        name: of this start, unique in the test.
        url: of the run, where that is not a directory.
        environment: of its processes, on top of this one's.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        world_size: int = 1,
        points: Sequence[KillPoint] = (),
        options: Sequence[str] = (),
        run: Path | None = None,
        url: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.world_size = world_size
        self.run = run or directory / "run"
        self.url = url or str(self.run)
        self.logs = directory / f"{name}-logs"
        self.logs.mkdir()
        self.book = Book(directory / f"{name}-book")
        self.book.prepare()
        self._trainers: list[subprocess.Popen[bytes]] = []
        own = {"WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1", **instrument(self.book, points)}
        rendezvous = str(directory / f"{name}-rendezvous")
        program = [sys.executable, str(small_training.__file__), self.url, str(self.logs)]
        command = [*program, "--steps", str(LAST_STEP), "--rendezvous", rendezvous, *options]
        for rank in range(world_size):
            with (self.logs / f"output-{rank}.txt").open("wb") as output:
                self._trainers.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **(environment or {}), **own, "RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def events(self, kind: str, rank: int = 0) -> list[dict[str, Any]]:
        path = self.logs / f"rank-{rank}.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def steps(self, kind: str, rank: int = 0, *, outcome: str | None = None) -> list[int]:
        return [event["step"] for event in self.events(kind, rank) if outcome in (None, event.get("outcome"))]

    def wait(self) -> list[int]:
        """Wait for all trainers; as with a launcher, when one dies all die. Returns exit codes."""
        wait_until(self._some_trainer_died_or_all_ended, END_SECONDS, self)
        for trainer in self._trainers:
            if trainer.poll() is None:
                trainer.kill()
        return [trainer.wait() for trainer in self._trainers]

    def succeed(self) -> None:
        codes = self.wait()
        assert codes == [0] * self.world_size, self.output()
        self.require_gone()

    def trainer(self, rank: int = 0) -> subprocess.Popen[bytes]:
        return self._trainers[rank]

    def require_gone(self) -> None:
        """Writers end by themselves, soon after their trainers."""
        left = self.book.wait_gone(timeout_seconds=WRITERS_END_SECONDS)
        assert not left, f"{left}\n{self.output()}"

    def output(self) -> str:
        return "\n".join(
            f"--- rank {rank}\n{(self.logs / f'output-{rank}.txt').read_text()[-4000:]}"
            for rank in range(self.world_size)
        )

    def __enter__(self) -> Start:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for trainer in self._trainers:
            trainer.kill()
            trainer.wait()
        self.book.close()

    def _some_trainer_died_or_all_ended(self) -> bool:
        codes = [trainer.poll() for trainer in self._trainers]
        return None not in codes or any(codes)


def wait_until(condition: Callable[[], bool], timeout_seconds: float, start: Start) -> None:
    """Poll a condition of the world; fails the test with the start's output when it does not come true."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s\n{start.output()}"
        time.sleep(_POLL_SECONDS)


@cache
def expected(world_size: int) -> list[list[str]]:
    """Digests by rank and step of a training that nobody interrupts."""
    return small_training.reference_digests(world_size=world_size, steps=LAST_STEP)


def require_exact_resume(directory: Path, crashed: Start, *, name: str = "next") -> int:
    """The next start finds all that was reported saved, goes on bit for bit, and leaves nothing behind.

    Returns:
        The step it resumed from.
    """
    require_all_verify(crashed.url)
    visible = committed_steps(crashed.url)
    world_size = crashed.world_size
    reported = crashed.steps("save", outcome="committed")
    with Start(directory, name, world_size=world_size, url=crashed.url) as start:
        start.succeed()
        resumed = start.steps("resume")[0]
        assert resumed >= max([*visible, *reported, 0]), start.output()
        for rank in range(world_size):
            seen = {event["step"]: event["digest"] for event in start.events("resume", rank)}
            seen |= {event["step"]: event["digest"] for event in start.events("step", rank)}
            assert seen == {step: expected(world_size)[rank][step] for step in range(resumed, LAST_STEP + 1)}
            saved = start.steps("save", rank, outcome="committed")
            assert saved == list(range(resumed + 1, LAST_STEP + 1)), start.output()
        found = start.events("resume")[0]["files"]
    _require_swept(found)
    require_all_verify(crashed.url)
    assert debris(crashed.url) == []
    assert committed_steps(crashed.url)[-1] == LAST_STEP
    return int(resumed)


def _require_swept(files: Sequence[str]) -> None:
    """As the resumed training found its run: no temporary file, every step directory a whole checkpoint."""
    directories = {name.partition("/")[0] for name in files if name.startswith("step-")}
    for directory in directories:
        assert f"{directory}/manifest.json" in files, files
    newest = max(directories, default=None)
    assert newest is None or f"{newest}/.metadata" in files, files
    assert not [name for name in files if name.endswith(".tmp") or name.startswith("trash/step")], files
