"""A training that was killed and resumed is the training that never stopped, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dcp_ckpt import open_checkpoint
from dcp_ckpt.testing.killpoints import Book, KillPoint, instrument
from tests.distributed.driver import EVERYTHING, SMALL, events, steps, trained

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"
LAST_STEP = 10
KILLED_STEP = 6
TIMEOUT_SECONDS = 120


def start(directory: Path, *flags: str, kill: KillPoint | None = None) -> tuple[int, str]:
    """The driver under torchrun on four ranks until it ends; its exit code and what it printed."""
    number = len(list(directory.glob("book-*")))
    book = Book(directory / f"book-{number}")
    book.prepare()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    printed = directory / f"output-{number}"
    try:
        with printed.open("wb") as output:
            finished = subprocess.run(
                [*launcher, str(TRAIN), *SMALL, "--run-dir", "runs", "--log-json", "log.jsonl", *flags],
                cwd=directory,
                env={**os.environ, **instrument(book, [kill] if kill else []), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
    finally:
        book.close()
    return finished.returncode, printed.read_text()


@pytest.mark.parametrize("layout", ["fsdp", pytest.param("ddp", marks=pytest.mark.crash)])
def test_killed_and_resumed_is_the_run_that_never_stopped(pool, tmp_path, layout):
    """One that never saves against one that saves every 2 steps and is killed, writers and all, in a save."""
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    killed.mkdir()
    flags = ("--parallel", layout, "--steps", str(LAST_STEP), *EVERYTHING)
    pool.run(trained, 4, str(plain), None, *flags, "--save-strategy", "no")
    in_a_save = KillPoint(
        role="writer", rank=2, call="open", path=f"*/step-{KILLED_STEP:08}/__2_*", action="kill_all"
    )
    code, printed = start(killed, *flags, "--save-every", "2", kill=in_a_save)
    assert code == -signal.SIGKILL, printed
    done_before = steps(killed)
    code, printed = start(killed, *flags, "--save-every", "2", "--resume", "must")
    assert code == 0, printed

    expected = steps(plain)
    assert [step for step, *_ in expected] == list(range(1, LAST_STEP + 1))
    assert len(done_before) >= KILLED_STEP
    (resume,) = events(killed, "resume")
    assert resume == {"event": "resume", "step": KILLED_STEP - 2, "from_world": 4, "to_world": 4}
    assert steps(killed) == expected[: len(done_before)] + expected[KILLED_STEP - 2 :]
    with open_checkpoint(f"{killed}/runs/run-001@latest") as checkpoint:
        scaler = checkpoint.read_value("scaler")
    assert scaler["_growth_tracker"] == LAST_STEP, "it counted on where it was"
