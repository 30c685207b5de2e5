"""The driver's exit code says whether its last save became a checkpoint, whichever rank it failed on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcp_ckpt import verify
from dcp_ckpt.testing.killpoints import Book, KillPoint, instrument
from launch.train import main

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"
SMALL = (
    *("--model-size", "tiny", "--batch-size", "10", "--eval-iters", "1", "--eval-every", "1000"),
    *("--steps", "4", "--save-every", "2"),
)
TIMEOUT_SECONDS = 110

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Book]:
    found = Book(tmp_path / "book")
    found.prepare()
    yield found
    found.close()


def full_disk(step: int, rank: int) -> KillPoint:
    """What the writer of a rank meets when it writes its part of a step."""
    return KillPoint(
        role="writer",
        rank=rank,
        call="pwrite",
        path=f"*/step-{step:08}/__*",
        action="fail",
        errno=errno.ENOSPC,
    )


def saved_steps(runs: Path) -> list[int | None]:
    report = verify(runs / "run-001")
    assert report.ok
    return [checked.step for checked in report.checkpoints]


@pytest.mark.parametrize(("step", "code", "saved"), [(4, 1, [2]), (2, 0, [4])], ids=["last", "before"])
def test_a_failed_last_save_is_exit_code_1(tmp_path, monkeypatch, capsys, book, step, code, saved):
    for name, value in instrument(book, [full_disk(step, 0)]).items():
        monkeypatch.setenv(name, value)
    assert main(["--run-dir", str(tmp_path / "runs"), *SMALL]) == code
    told = capsys.readouterr()
    assert f"save of step {step} failed: " in told.out
    assert ("train.py: " in told.err) == (code == 1)
    for where in (told.out, told.err)[: 1 + code]:
        assert f"rank 0, step {step}, phase write" in where
        assert f"errno {errno.ENOSPC}" in where
    assert saved_steps(tmp_path / "runs") == saved


@pytest.mark.crash
@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 2])
def test_under_torchrun_ranks_exit_with_1_and_name_the_rank(tmp_path: Path, book: Book, rank: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    process = subprocess.run(
        [*launcher, str(TRAIN), "--run-dir", str(tmp_path / "runs"), *SMALL],
        env={**os.environ, **instrument(book, [full_disk(4, rank)]), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert process.returncode == 1, process.stdout
    told = [line for line in process.stdout.splitlines() if "train.py: " in line]
    # torchrun ends the other ranks when it has seen the first one fail.
    assert 1 <= len(told) <= 3, process.stdout
    assert all(f"rank {rank}, step 4, phase write" in line for line in told), process.stdout
    assert all(f"errno {errno.ENOSPC}" in line for line in told), process.stdout
    assert not book.wait_gone("writer", timeout_seconds=20.0)
    assert saved_steps(tmp_path / "runs") == [2]
