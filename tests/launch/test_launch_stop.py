"""Preemption with real signals: to torchrun or a worker, in a step, an evaluation or a save."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import dcp_ckpt
from dcp_ckpt.testing.killpoints import Book, KillPoint, instrument

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train.py"
SMALL = ("--model-size", "tiny", "--batch-size", "8", "--eval-every", "100000", "--eval-iters", "1")
ENDLESS = ("--steps", "100000", "--save-every", "100000")
END_SECONDS = 100.0
_POLL_SECONDS = 0.02


@dataclass(kw_only=True)
class Started:
    """A torchrun with its workers."""

    process: subprocess.Popen[str]
    log: Path
    output: Path

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().split("\n")[:-1] if self.log.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def steps(self) -> list[int]:
        return [event["step"] for event in self.events("step")]

    def workers(self) -> list[int]:
        """Process ids of the trainers, in order of their ranks."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        by_rank = {}
        for child in children:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks = [value.removeprefix(b"RANK=") for value in variables if value.startswith(b"RANK=")]
            by_rank[int(ranks[0])] = int(child)
        return [by_rank[rank] for rank in sorted(by_rank)]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + END_SECONDS
        while not condition():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(_POLL_SECONDS)

    def wait(self) -> tuple[int, float]:
        """Exit code, and how long it took from now."""
        since = time.monotonic()
        return self.process.wait(END_SECONDS), time.monotonic() - since


@contextmanager
def start(
    directory: Path,
    *flags: str,
    num_ranks: int = 2,
    program: Sequence[str] = (str(TRAIN),),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Started]:
    """The driver under torchrun, logging to `log.jsonl`; whatever runs at the end is killed."""
    log, output = directory / "log.jsonl", directory / f"output-{time.monotonic_ns()}"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks))
    with output.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *launcher, *program, *flags],
            cwd=directory,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
        )
    started = Started(process=process, log=log, output=output)
    try:
        yield started
    finally:
        for worker in started.workers() if process.poll() is None else ():
            os.kill(worker, signal.SIGKILL)
        process.kill()
        process.wait()


def driver(directory: Path, *flags: str) -> tuple[str, ...]:
    return (*SMALL, "--run-dir", str(directory / "runs"), "--log-json", str(directory / "log.jsonl"), *flags)


def committed(directory: Path) -> list[int]:
    run = directory / "runs" / "run-001"
    report = dcp_ckpt.verify(run)
    assert report.ok, report
    with dcp_ckpt.Checkpointer(run) as checkpointer:
        return [info.step for info in checkpointer.checkpoints()]


def require_one_final_save(directory: Path, started: Started, reason: str) -> int:
    """The last step that was trained is the one that is saved, and the driver says why it stopped."""
    last = started.steps()[-1]
    output = started.output.read_text()
    assert f"stopped at step {last} ({reason})" in output, output
    assert [event["step"] for event in started.events("save")] == [last]
    assert committed(directory) == [last]
    return last


def test_torchrun_is_told_to_end(tmp_path: Path) -> None:
    with start(tmp_path, *driver(tmp_path, *ENDLESS)) as started:
        started.wait_until(lambda: len(started.steps()) >= 5)
        started.process.terminate()
        code, seconds = started.wait()
        assert code == 1, "torchrun's own code for having been told to end"
        assert seconds < 25
        require_one_final_save(tmp_path, started, "SIGTERM")


@pytest.mark.crash
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_one_worker_is_signalled_and_all_stop(tmp_path: Path, rank: int, name: str) -> None:
    with start(tmp_path, *driver(tmp_path, *ENDLESS)) as started:
        started.wait_until(lambda: len(started.steps()) >= 5)
        os.kill(started.workers()[rank], signal.Signals[name])
        code, _ = started.wait()
        assert code == 1
        require_one_final_save(tmp_path, started, name)
        # Which of the two torchrun saw first is chance; it signals the other, which may be at its very end.
        assert f"exitcode: {128 + signal.Signals[name]}" in started.output.read_text()


@pytest.mark.crash
def test_ctrl_c_of_torchrun_saves(tmp_path: Path) -> None:
    with start(tmp_path, *driver(tmp_path, *ENDLESS)) as started:
        started.wait_until(lambda: len(started.steps()) >= 5)
        started.process.send_signal(signal.SIGINT)
        started.wait()
        require_one_final_save(tmp_path, started, "SIGINT")


@pytest.mark.crash
def test_an_evaluation_is_broken_off(tmp_path: Path) -> None:
    flags = driver(tmp_path, *ENDLESS, "--eval-every", "3", "--eval-iters", "100000")
    with start(tmp_path, *flags) as started:
        started.wait_until(lambda: started.steps()[-1:] == [3])
        started.process.terminate()
        _, seconds = started.wait()
        assert seconds < 25
        assert require_one_final_save(tmp_path, started, "SIGTERM") == 3


@pytest.mark.crash
def test_the_final_save_is_made_although_its_evaluation_is_broken_off(tmp_path: Path) -> None:
    flags = driver(tmp_path, *ENDLESS, "--keep-best", "1", "--max-minutes", "0")
    with start(tmp_path, *flags) as started:
        assert started.wait()[0] == 0, started.output.read_text()
        require_one_final_save(tmp_path, started, "time limit")


@pytest.mark.crash
def test_the_save_in_flight_is_finished_first(tmp_path: Path) -> None:
    book = Book(tmp_path / "book")
    book.prepare()
    point = KillPoint(role="writer", call="open", path="*/step-00000004/__0_*", action="hold")
    environment = instrument(book, [point])
    try:
        with start(tmp_path, *driver(tmp_path, "--save-every", "4"), environment=environment) as started:
            started.wait_until(lambda: bool(book.held()) and started.steps()[-1] >= 4)
            started.process.terminate()
            started.wait_until(lambda: "Sending process" in started.output.read_text())
            book.release()
            started.wait()
            last = started.steps()[-1]
            assert committed(tmp_path) in ([4, last], [4])
            assert [event["step"] for event in started.events("save")] in ([4, last], [4])
            assert "stopped at step" in started.output.read_text()
    finally:
        book.close()


@pytest.mark.crash
def test_a_save_that_outlives_the_grace_period_is_committed_by_the_next_start(tmp_path: Path) -> None:
    """Its writer hangs; torchrun kills the trainers after 30 s; then the writer goes on."""
    book = Book(tmp_path / "book")
    book.prepare()
    point = KillPoint(role="writer", call="open", path="*/step-00000004/__0_*", action="hold")
    environment = instrument(book, [point])
    try:
        with start(tmp_path, *driver(tmp_path, "--save-every", "4"), environment=environment) as started:
            started.wait_until(lambda: bool(book.held()) and started.steps()[-1] >= 4)
            trainers = book.members("trainer")
            started.process.terminate()
            started.wait()
            assert not [member for member in trainers if member.is_alive and member.role == "trainer"]
            assert "no time for step" in started.output.read_text()
            book.release()
            assert not book.wait_gone("writer", timeout_seconds=20)
        flags = driver(tmp_path, "--steps", "5", "--save-every", "4", "--resume", "must")
        with start(tmp_path, *flags) as again:
            assert again.wait()[0] == 0, again.output.read_text()
            assert again.events("resume")[0]["step"] == 4
    finally:
        book.close()


@pytest.mark.crash
def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    book = Book(tmp_path / "book")
    book.prepare()
    point = KillPoint(role="writer", call="open", path="*/step-00000004/__0_*", action="hold")
    environment = instrument(book, [point])
    try:
        with start(tmp_path, *driver(tmp_path, "--save-every", "4"), environment=environment) as started:
            started.wait_until(lambda: bool(book.held()) and started.steps()[-1] >= 4)
            workers = started.workers()
            for worker in workers:
                os.kill(worker, signal.SIGTERM)
            first = time.monotonic()
            started.wait_until(lambda: time.monotonic() - first > 1.1)
            for worker in workers:
                os.kill(worker, signal.SIGTERM)
            _, seconds = started.wait()
            assert seconds < 10, "no final save, no waiting for the one in flight"
            assert "stopped at step" not in started.output.read_text()
            book.release()
            assert not book.wait_gone(timeout_seconds=20)
    finally:
        book.close()


@pytest.mark.crash
def test_a_training_with_data_workers_saves_too(tmp_path: Path) -> None:
    program = (str(ROOT / "tests" / "launch" / "loading_training.py"), str(tmp_path / "run"))
    log = tmp_path / "steps.txt"
    environment = {"PYTHONPATH": str(ROOT)}
    with start(tmp_path, str(log), program=program, environment=environment) as started:
        started.wait_until(lambda: log.exists() and len(log.read_text().split()) >= 5)
        started.process.terminate()
        started.wait()
        last = int(log.read_text().split()[-1])
        assert "DataLoader worker" not in started.output.read_text()
    with dcp_ckpt.Checkpointer(tmp_path / "run") as checkpointer:
        assert [info.step for info in checkpointer.checkpoints()] == [last], started.output.read_text()


@pytest.mark.crash
def test_a_limited_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    common = ("--dropout", "0.1", "--seed", "3", "--steps", "8")
    straight = tmp_path / "straight"
    straight.mkdir()
    with start(straight, *driver(straight, *common, "--save-strategy", "no")) as whole:
        assert whole.wait()[0] == 0
        expected = whole.events("step")
    for limit in (("--max-minutes", "0"), ("--max-minutes", "0"), ()):
        with start(tmp_path, *driver(tmp_path, *common, *limit)) as part:
            assert part.wait()[0] == 0, part.output.read_text()
            stops = "time limit" in part.output.read_text()
            assert stops is bool(limit), part.output.read_text()
    first, second = (event["step"] for event in part.events("resume"))
    assert 0 < first < second < 8, "all ranks stop at a step that they agree on, so one or a few steps in"
    assert part.events("step") == expected
