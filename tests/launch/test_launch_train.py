"""The driver as a program: resumes are exact, saves and validation change nothing, flags are heeded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dcp_ckpt import Checkpointer
from launch.train import main
from tests.programs import run_program

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"
SMALL = ("--model-size", "tiny", "--batch-size", "10", "--eval-iters", "2")
TIMEOUT_SECONDS = 90


def train(directory: Path, log: str, *flags: str) -> list[dict[str, Any]]:
    """Train to the end in one process; gives the events added to the log."""
    path = directory / log
    old = len(path.read_text().splitlines()) if path.exists() else 0
    command = [sys.executable, str(TRAIN), *SMALL, "--log-json", log, *flags]
    out = run_program(command, directory=directory, timeout_seconds=TIMEOUT_SECONDS)
    assert "to extend this run: --steps" in out
    return [json.loads(line) for line in path.read_text().splitlines()[old:]]


def steps(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "step"]


def test_saves_validation_and_resume_change_nothing(tmp_path):
    common = ("--dropout", "0.1", "--seed", "7")
    plain = train(tmp_path, "a.jsonl", "--run-dir", "a", "--steps", "8", "--save-strategy", "no", *common)
    chain = ("--run-dir", "b", "--save-every", "2", "--eval-every", "2", *common)
    first = train(tmp_path, "b.jsonl", "--steps", "5", *chain)
    second = train(tmp_path, "b.jsonl", "--steps", "8", "--resume", "must", *chain)

    assert steps(first) + steps(second) == steps(plain)
    assert [event["step"] for event in steps(plain)] == list(range(1, 9))
    assert second[0] == {"event": "resume", "step": 5, "from_world": 1, "to_world": 1}
    saves = [event for event in first + second if event["event"] == "save"]
    assert [event["step"] for event in saves] == [2, 4, 5, 6, 8]
    assert set(saves[0]) == {"event", "step", "stall_seconds", "durable_seconds", "bytes"}
    assert set(plain[0]) == {"event", "step", "loss", "lr", "samples"}
    assert steps(train(tmp_path, "b.jsonl", "--steps", "8", *chain)) == []  # finished: nothing is done again


def test_must_resume_exits_with_3_when_there_is_nothing(tmp_path, capsys):
    assert main(["--resume", "must", "--run-dir", str(tmp_path / "runs"), *SMALL]) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("layout", ["hsdp", "fsdp+tp", "pp"])
def test_a_layout_of_pairs_needs_torchrun(tmp_path, capsys, layout):
    assert main(["--parallel", layout, "--run-dir", str(tmp_path / "runs"), *SMALL]) == 2
    assert "needs an even number of ranks, not 1" in capsys.readouterr().err


def test_settings_that_would_falsify_a_run_exit_with_5_and_others_are_told(tmp_path, capsys):
    flags = ["--run-dir", str(tmp_path / "runs"), *SMALL]
    assert main(["--steps", "2", *flags]) == 0
    capsys.readouterr()
    assert main(["--steps", "4", "--seed", "1", *flags]) == 5
    told = capsys.readouterr()
    assert "seed 0 -> 1" in told.out
    assert "refused" in told.out
    assert "seed 0 -> 1" in told.err
    assert main(["--steps", "4", "--lr", "0.01", "--save-every", "2", *flags]) == 0
    assert "lr 0.001 -> 0.01                  with care" in capsys.readouterr().out
    with Checkpointer(tmp_path / "runs" / "run-001") as checkpointer:
        assert [info.tags for info in checkpointer.checkpoints()] == [(), ("lr=0.01",)]


def test_never_starts_another_run_and_runs_are_listed(tmp_path, capsys):
    flags = ["--run-dir", str(tmp_path / "runs"), *SMALL]
    for name in ("first", "second"):
        assert main(["--steps", "1", "--resume", "never", "--name", name, *flags]) == 0
    capsys.readouterr()
    assert main(["--list-runs", *flags]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["1", "first"], ["2", "second"]]

    assert main(["--steps", "2", "--run-number", "1", *flags]) == 0
    assert "resumed at step 1" in capsys.readouterr().out
    assert main(["--list-runs", *flags]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_milestones_stay_beside_the_rolling_ones(tmp_path):
    flags = ["--run-dir", str(tmp_path / "runs"), *SMALL, "--eval-every", "100"]
    kept = ["--save-every", "1", "--keep-last", "2", "--keep-every", "4"]
    assert main(["--steps", "10", *flags, *kept]) == 0
    with Checkpointer(tmp_path / "runs" / "run-001") as checkpointer:
        assert [info.step for info in checkpointer.checkpoints()] == [4, 8, 9, 10]
