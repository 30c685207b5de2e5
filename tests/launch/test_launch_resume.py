"""Which run a start goes on with: by checkpoint, by a question, and what a fork may change."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dcp_ckpt import AnyOf, BestN, CheckpointConfig, Checkpointer, LatestN, list_runs, open_run
from dcp_ckpt.errors import ConfigError
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint
from launch import runs
from launch.options import parse_options
from launch.train import checkpoint_config, main

TRAIN = Path(__file__).resolve().parents[2] / "launch" / "train.py"
SMALL = ("--model-size=tiny", "--batch-size=10", "--eval-iters=1", "--save-every=2", "--keep-last=9")


def start(directory: Path, *flags: str) -> int:
    log = ("--log-json", str(directory / "log.jsonl"))
    return main(["--run-dir", str(directory / "runs"), *log, *SMALL, *flags])


def losses(directory: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [(event["step"], event["loss"]) for event in lines if event["event"] == "step"]


def numbers(directory: Path) -> list[int]:
    return [run.number for run in list_runs(directory / "runs")]


def test_a_named_checkpoint_is_continued_or_forked(tmp_path, capsys):
    run = f"{tmp_path}/runs/run-001"
    assert start(tmp_path, "--steps", "6") == 0
    original = losses(tmp_path)
    # The newest: its run goes on.
    assert start(tmp_path, "--steps", "7", "--resume", f"{run}@6") == 0
    assert numbers(tmp_path) == [1]
    # An older one: a new run, with all of the state, which repeats what the original did.
    assert start(tmp_path, "--steps", "6", "--resume", f"{run}/step-00000004") == 0
    assert numbers(tmp_path) == [1, 2]
    assert losses(tmp_path)[-2:] == original[4:]
    parent = list_runs(tmp_path / "runs")[1].document.parent
    assert parent is not None
    assert (parent.run, parent.step) == ("run-001", 4)
    # With another learning rate, told; nothing that would falsify it, and no run is left behind then.
    capsys.readouterr()
    assert start(tmp_path, "--steps", "5", "--resume", f"{run}@4", "--lr", "0.01") == 0
    told = capsys.readouterr().out
    assert "lr 0.001 -> 0.01" in told
    assert "this run begins from step 4 of run-001" in told
    assert start(tmp_path, "--steps", "5", "--resume", f"{run}@4", "--seed", "3") == 5
    assert numbers(tmp_path) == [1, 2, 3]
    with Checkpointer(tmp_path / "runs" / "run-001", config=CheckpointConfig()) as checkpointer:
        assert [info.step for info in checkpointer.checkpoints()] == [2, 4, 6, 7]
    assert start(tmp_path, "--resume", f"{run}@99") == 3


def test_runs_are_listed_with_their_best(tmp_path, capsys):
    assert start(tmp_path, "--steps", "2", "--keep-best", "1", "--name", "first") == 0
    capsys.readouterr()
    assert start(tmp_path, "--list-runs") == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.split()[:2] == ["1", "first"]
    assert "val_loss" in line
    document: dict[str, Any] = json.loads((tmp_path / "runs" / "run-001" / "run.json").read_bytes())
    assert document["command"]
    assert document["config"]["world_size"] == 1


def test_the_best_is_kept_across_resumes(tmp_path, monkeypatch):
    """The greatest validation loss of a run that learns is its first, and stays the best."""
    # Removals wait for readers that may be under way; nobody reads here.
    monkeypatch.setattr(
        "launch.train.checkpoint_config",
        lambda options: replace(checkpoint_config(options), grace_seconds=0.0),
    )
    flags = ("--keep-best=1", "--mode=max", "--keep-last=1")
    assert start(tmp_path, *flags, "--steps", "4") == 0
    assert start(tmp_path, *flags, "--steps", "8") == 0
    keep = AnyOf(LatestN(1), BestN(1, "val_loss", mode="max"))
    with Checkpointer(tmp_path / "runs" / "run-001", config=CheckpointConfig(keep=keep)) as checkpointer:
        best = checkpointer.best()
        assert best is not None
        assert best.step == 2
        assert [info.step for info in checkpointer.checkpoints()] == [2, 4, 8], "4 is what it resumed from"


@pytest.mark.parametrize(("answer", "expected"), [("y\n", [1]), ("\n", [1, 2]), (None, [1, 2])])
def test_ask(tmp_path, answer, expected):
    """On a terminal the answer counts; without one nobody waits for it, and a new run begins."""
    assert start(tmp_path, "--steps", "2") == 0
    command = [sys.executable, str(TRAIN), "--run-dir", f"{tmp_path}/runs", *SMALL]
    command += ["--steps", "3", "--resume", "ask"]
    ours, terminal = pty.openpty()
    try:
        if answer is not None:
            os.write(ours, answer.encode())
        finished = subprocess.run(
            command,
            stdin=subprocess.DEVNULL if answer is None else terminal,
            capture_output=True,
            text=True,
            timeout=90,
            check=True,
        )
    finally:
        with suppress(OSError):
            os.close(terminal)
        os.close(ours)
    assert "Resume from step 2? [y/N]" in finished.stdout
    assert numbers(tmp_path) == expected


def test_a_question_that_nobody_answers_does_not_hold_up_the_ranks(tmp_path, monkeypatch, capsys):
    run = open_run(tmp_path)
    write_tiny_checkpoint(open_storage(run.path), step=2, run_id=run.run_id)
    monkeypatch.setattr(runs, "_ANSWER_SECONDS", 0.05)
    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0), open(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        chosen = runs.choose_run(parse_options(["--run-dir", str(tmp_path), "--resume", "ask"]), {}, rank=0)
    assert chosen.is_new
    assert "Resume from step 2? [y/N] no answer" in capsys.readouterr().out


def test_ctrl_c_before_there_is_anything_to_save_is_no_traceback(tmp_path, monkeypatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.train.train", interrupted)
    assert start(tmp_path) == 130


@pytest.mark.parametrize(
    ("arguments", "here"),
    [
        ({"save_total_limit": 3}, "LatestN"),
        ({"max_to_keep": 3}, "LatestN"),
        ({"keep_latest_k": 3}, "LatestN"),
        ({"save_top_k": 3}, "BestN"),
        ({"interval": 3}, "EverySteps"),
        ({"checkpoint_dir": "x"}, "Checkpointer"),
    ],
)
def test_settings_of_other_libraries_are_answered_with_their_name_here(arguments, here):
    with pytest.raises(ConfigError, match=here):
        CheckpointConfig(**arguments)


def test_the_directory_by_another_name(tmp_path):
    with pytest.raises(ConfigError, match="here it is path"):
        Checkpointer(checkpoint_dir=tmp_path)  # type: ignore[call-arg]
