"""Train, kill in the middle of a save, resume on other numbers of ranks: the program behind `make demo`.

    python launch/demo.py

Runs `launch/train.py` under torchrun in ./demo-run and compares every step with an uninterrupted run. Exits 0
only if the resumed chain used the same samples in the same order and its losses stayed within the band.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["DemoFailed", "Phase", "chain_problem", "largest_difference", "read_events", "save_in_flight"]

TRAIN = Path(__file__).with_name("train.py")
WORKSPACE = Path("demo-run")
MARKER = ".dcp-ckpt-demo"

LAST_STEP = 40
BAND = 1e-4
"""Largest allowed difference of a step's loss from the uninterrupted run. Only the order of float32 sums
differs with the number of ranks: 4e-7 was measured. Lost optimizer state or a wrong sample moves it more."""

CHILD_TIMEOUT_SECONDS = 150.0
WRITERS_TIMEOUT_SECONDS = 30.0
POLL_SECONDS = 0.001
SMALL_MODEL = ("--model-size", "tiny", "--eval-every", "1000", "--eval-iters", "1")


class DemoFailed(Exception):
    """Something did not go as promised; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One start of the driver: how many ranks, how they share the model, and up to which step."""

    name: str
    world_size: int
    parallel: str
    steps: int
    arguments: tuple[str, ...] = ()

    @property
    def log_json(self) -> Path:
        return WORKSPACE / f"{self.name}.jsonl"

    @property
    def output(self) -> Path:
        return WORKSPACE / f"{self.name}.log"

    def command(self) -> list[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(self.world_size), str(TRAIN)]
        flags = ["--parallel", self.parallel, "--steps", str(self.steps), "--log-json", str(self.log_json)]
        return [*launcher, *flags, *SMALL_MODEL, *self.arguments]


_SAVING = ("--run-dir", str(WORKSPACE / "runs"), "--save-every", "2")
REFERENCE = Phase(
    name="reference",
    world_size=8,
    parallel="fsdp",
    steps=LAST_STEP,
    arguments=("--run-dir", str(WORKSPACE / "reference"), "--save-strategy", "no"),
)
KILLED = Phase(name="killed", world_size=8, parallel="fsdp", steps=LAST_STEP, arguments=_SAVING)
_RESUMING = (*_SAVING, "--resume", "must")
RESUMED = (
    Phase(name="resumed-on-4", world_size=4, parallel="fsdp", steps=24, arguments=_RESUMING),
    Phase(name="resumed-on-3", world_size=3, parallel="ddp", steps=32, arguments=_RESUMING),
    Phase(name="resumed-on-8", world_size=8, parallel="fsdp", steps=LAST_STEP, arguments=_RESUMING),
)
EARLIEST_KILL_STEP, LATEST_KILL_STEP = 6, 16


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a JSON log; a last line that a kill cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def save_in_flight(run_path: Path) -> Path | None:
    """The newest step directory, if data is being written there and no manifest stands yet.

    Older ones without a manifest are what retention is about to delete.
    """
    newest = max(run_path.glob("step-*"), default=None)
    if newest is None:
        return None
    names = os.listdir(newest)
    writing = "manifest.json" not in names and any(name.endswith(".distcp") for name in names)
    return newest if writing else None


def largest_difference(
    reference: Sequence[dict[str, Any]], chain: Sequence[dict[str, Any]]
) -> tuple[float, int]:
    """Largest absolute difference of the losses of equal steps, and the step; nan counts as infinite."""
    expected = {event["step"]: event["loss"] for event in reference if event["event"] == "step"}
    worst = (0.0, 0)
    for event in chain:
        if event["event"] == "step":
            difference = abs(event["loss"] - expected[event["step"]])
            worst = max(worst, (math.inf if math.isnan(difference) else difference, event["step"]))
    return worst


def chain_problem(
    reference: Sequence[dict[str, Any]], chain: Sequence[dict[str, Any]], *, last_step: int, band: float
) -> str | None:
    """Why the resumed chain is not the reference run, or None. Steps that were done twice count twice."""
    expected = {event["step"]: event for event in reference if event["event"] == "step"}
    done = {event["step"] for event in chain if event["event"] == "step"}
    wanted = set(range(1, last_step + 1))
    if set(expected) != wanted:
        return f"the uninterrupted run did {len(expected)} steps, not {last_step}"
    if done != wanted:
        return (
            f"the resumed chain lacks steps {sorted(wanted - done)} and has {sorted(done - wanted)} too many"
        )
    for event in chain:
        if event["event"] == "step" and event["samples"] != expected[event["step"]]["samples"]:
            return f"step {event['step']} used other samples than the uninterrupted run"
    difference, step = largest_difference(reference, chain)
    if difference > band:
        return f"the loss of step {step} differs by {difference:.2e}, the band is {band:g}"
    return None


@contextmanager
def started(phase: Phase) -> Iterator[subprocess.Popen[bytes]]:
    """Start the driver with its output in a file; on leaving, end all of it that still runs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with phase.output.open("wb") as output:
        process = subprocess.Popen(
            phase.command(), stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            for writer in kill_all(process):
                _kill(writer)


def kill_all(process: subprocess.Popen[bytes]) -> list[int]:
    """`kill -9` torchrun and all its workers; gives the processes that workers had started, which are spared.

    Those are the writers: what they have taken over, they finish.
    """
    workers = _children(process.pid)
    spared = [child for worker in workers for child in _children(worker)]
    process.kill()  # first: a torchrun that sees a worker die would tell the others
    for worker in workers:
        _kill(worker)
    process.wait()
    return spared


def _children(pid: int) -> list[int]:
    try:
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def tail(path: Path, num_lines: int = 25) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])


def run_to_end(phase: Phase) -> list[dict[str, Any]]:
    """Run a phase until it ends by itself and give its events."""
    with started(phase) as process:
        try:
            code = process.wait(CHILD_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise DemoFailed(
                f"{phase.name} did not end within {CHILD_TIMEOUT_SECONDS:g} s:\n{tail(phase.output)}"
            ) from None
    if code != 0:
        raise DemoFailed(f"{phase.name} exited with {code}:\n{tail(phase.output)}")
    return read_events(phase.log_json)


def run_and_kill(phase: Phase) -> tuple[list[dict[str, Any]], Path, list[int]]:
    """Run a phase and kill it in the middle of a save; gives its events, step directory and writers."""
    run_path = WORKSPACE / "runs" / "run-001"
    deadline = time.monotonic() + CHILD_TIMEOUT_SECONDS
    with started(phase) as process:
        while process.poll() is None and time.monotonic() < deadline:
            step_directory = save_in_flight(run_path)
            if step_directory is not None and _may_kill(step_directory, phase):
                spared = kill_all(process)
                return read_events(phase.log_json), step_directory, spared
            time.sleep(POLL_SECONDS)
    raise DemoFailed(f"no save of {phase.name} was caught in the middle:\n{tail(phase.output)}")


def _may_kill(step_directory: Path, phase: Phase) -> bool:
    if not EARLIEST_KILL_STEP <= _step(step_directory) <= LATEST_KILL_STEP:
        return False
    return any(event["event"] == "save" for event in read_events(phase.log_json))


def _step(step_directory: Path) -> int:
    return int(step_directory.name.removeprefix("step-").partition(".")[0])


def await_end(pids: Sequence[int]) -> None:
    """Wait until the writers that outlived the kill are gone; a last resort ends them."""
    deadline = time.monotonic() + WRITERS_TIMEOUT_SECONDS
    while any(map(_is_running, pids)):
        if time.monotonic() > deadline:
            left = [pid for pid in pids if _is_running(pid)]
            for pid in left:
                _kill(pid)
            raise DemoFailed(f"writers {left} still ran {WRITERS_TIMEOUT_SECONDS:g} s after the kill")
        time.sleep(0.05)


def resume_row(phase: Phase, before: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> list[str]:
    """The cells of one resume; `before` are the events of all starts before it."""
    resume = next((event for event in events if event["event"] == "resume"), None)
    if resume is None:
        raise DemoFailed(f"{phase.name} began anew instead of resuming:\n{tail(phase.output)}")
    losses = {event["step"]: event["loss"] for event in before if event["event"] == "step"}
    first = next((event for event in events if event["event"] == "step"), None)
    saves = [event for event in events if event["event"] == "save"]
    if first is None or not saves:
        raise DemoFailed(f"{phase.name} did not train and save after step {resume['step']}")
    durable = median(event["durable_seconds"] for event in saves)
    return [
        str(resume["step"]),
        f"{resume['from_world']} -> {resume['to_world']}",
        phase.parallel,
        f"{losses[resume['step']]:.4f}",
        f"{first['loss']:.4f}",
        f"{median(event['stall_seconds'] for event in saves) * 1e3:.1f}",
        f"{durable * 1e3:.0f}",
        f"{median(event['bytes'] for event in saves) / 1e6 / durable:.0f}",
    ]


def resume_all(console: Console, chain: list[dict[str, Any]], killed_step: int) -> Table:
    """Run the resumes one after the other, append their events to `chain`, and give a row for each."""
    columns = ("step", "ranks", "parallel", "loss before", "after", "stall ms", "durable ms", "MB/s")
    table = Table(*columns, box=box.SIMPLE)
    for number, phase in enumerate(RESUMED, start=3):
        goal = f"{phase.world_size} ranks ({phase.parallel}) up to step {phase.steps}"
        console.print(f"{number}. resume on {goal}")
        events = run_to_end(phase)
        row = resume_row(phase, chain, events)
        if phase is RESUMED[0]:
            finished = row[0] == str(killed_step)
            fate = (
                "was finished by its writers" if finished else "was not complete, nothing was lost before it"
            )
            console.print(f"   the interrupted save of step {killed_step} {fate}: resumed at step {row[0]}")
        table.add_row(*row)
        chain += events
    return table


def prepare_workspace() -> None:
    """Empty ./demo-run; a directory of that name that no demo made is left alone."""
    if WORKSPACE.exists() and not (WORKSPACE / MARKER).exists():
        raise DemoFailed(f"{WORKSPACE.resolve()} was not made by this demo: move it away and repeat")
    shutil.rmtree(WORKSPACE, ignore_errors=True)
    WORKSPACE.mkdir()
    (WORKSPACE / MARKER).touch()


def demonstrate(console: Console) -> None:
    """Run all phases; raises `DemoFailed` with the reason where something was not as promised."""
    prepare_workspace()
    console.print(f"1. {REFERENCE.world_size} ranks, {LAST_STEP} steps, never interrupted, no saves")
    reference = run_to_end(REFERENCE)

    console.print(f"2. {KILLED.world_size} ranks with a save every 2 steps, killed in the middle of a save")
    chain, step_directory, writers = run_and_kill(KILLED)
    console.print(f"   kill -9 of torchrun and all workers while {step_directory.name} had no manifest")
    try:
        table = resume_all(console, chain, _step(step_directory))
    finally:
        await_end(writers)
    console.print(table)

    problem = chain_problem(reference, chain, last_step=LAST_STEP, band=BAND)
    if problem is not None:
        raise DemoFailed(problem)
    difference, step = largest_difference(reference, chain)
    console.print(
        f"All {LAST_STEP} steps used the samples of the uninterrupted run. Its loss and theirs differ by "
        f"{difference:.1e} at most (step {step}); allowed: {BAND:g}."
    )


def main() -> int:
    """Run the demo; 0 if all promises were seen to hold, else 1 with the reason."""
    console = Console(highlight=False, soft_wrap=True)
    since = time.monotonic()
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # leave through every `finally`
    try:
        demonstrate(console)
    except DemoFailed as failure:
        console.print(f"demo failed: {failure}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("demo interrupted; nothing is left running")
        return 130
    console.print(f"Done in {time.monotonic() - since:.0f} s; logs and checkpoints are in {WORKSPACE}/.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
