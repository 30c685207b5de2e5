"""Runs: their numbers, their identity, and which one a start continues."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dcp_ckpt.errors import CheckpointNotFound, ConfigError, CorruptCheckpoint
from dcp_ckpt.lifecycle import provenance
from dcp_ckpt.lifecycle.provenance import git_state, package_versions
from dcp_ckpt.lifecycle.runs import RunParent, ensure_run, list_runs, open_run, read_run
from dcp_ckpt.storage import open_storage


def test_auto_starts_a_run_and_then_continues_it(tmp_path: Path) -> None:
    first = open_run(tmp_path, name="exp", config={"lr": 0.1})
    assert (first.number, first.is_new, first.start, first.name) == (1, True, 1, "exp")
    assert first.path == str(tmp_path / "run-001")
    again = open_run(tmp_path)
    assert (again.run_id, again.is_new, again.document) == (first.run_id, False, first.document)
    assert again.document.config == {"lr": 0.1}


def test_a_start_counts_the_epochs_before_it(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    epochs = Path(run.path) / "epochs"
    epochs.mkdir()
    (epochs / "00000004.json").write_bytes(b"{}")
    (epochs / "00000004.resumed.json").write_bytes(b"{}")
    assert open_run(tmp_path).start == 5


def test_never_starts_the_next_number_even_beside_an_empty_directory(tmp_path: Path) -> None:
    assert open_run(tmp_path, resume="never").number == 1
    (tmp_path / "run-007").mkdir()
    assert open_run(tmp_path, resume="never").number == 8
    assert [run.number for run in list_runs(tmp_path)] == [1, 8]
    assert open_run(tmp_path).number == 8


def test_must_and_numbers_fail_when_there_is_none_and_make_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="no run to resume; existing runs: none"):
        open_run(tmp_path / "base", resume="must")
    assert list(tmp_path.iterdir()) == []
    open_run(tmp_path)
    assert open_run(tmp_path, resume="must").number == 1
    assert open_run(tmp_path, resume=1).number == 1
    with pytest.raises(CheckpointNotFound, match="no run 3; existing runs: 1"):
        open_run(tmp_path, resume=3)


@pytest.mark.parametrize("resume", ["always", None, 1.0, True])
def test_an_unknown_resume_is_refused(tmp_path: Path, resume: Any) -> None:
    with pytest.raises(ConfigError, match="resume must be"):
        open_run(tmp_path, resume=resume)


def test_a_config_that_is_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="JSON"):
        open_run(tmp_path, config={"model": object()})


def test_another_name_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_run(tmp_path, name="a")
    assert open_run(tmp_path, name="b").name == "a"
    assert "'b' is for new runs only" in caplog.text


def test_a_run_that_cannot_be_read_is_left_out_and_its_number_stays_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_run(tmp_path)
    (tmp_path / "run-001" / "run.json").write_bytes(b"{}")
    assert list_runs(tmp_path) == ()
    assert "run-001" in caplog.text
    assert open_run(tmp_path).number == 2


def test_a_fork_remembers_its_parent(tmp_path: Path) -> None:
    parent = RunParent(run="run-001", run_id="0" * 32, epoch=2, step=100)
    run = open_run(tmp_path, resume="never", parent=parent)
    assert read_run(open_storage(run.path)) == run.document
    assert run.document.parent == parent


def _open_new(base: str) -> tuple[int, str]:
    run = open_run(base, resume="never")
    return run.number, run.run_id


def test_starts_at_the_same_moment_get_different_numbers(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        made = pool.map(_open_new, [str(tmp_path)] * 16, chunksize=1)
    assert sorted(number for number, _ in made) == list(range(1, 17))
    assert len({run_id for _, run_id in made}) == 16


def _ensure(path: str) -> str:
    return ensure_run(open_storage(path)).run_id


def test_a_bare_directory_becomes_one_run_for_all(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        made = pool.map(_ensure, [str(tmp_path / "run-012")] * 8, chunksize=1)
    assert len(set(made)) == 1
    assert ensure_run(open_storage(tmp_path / "run-012")).number == 12
    assert ensure_run(open_storage(tmp_path / "mine")).number == 0


def test_a_damaged_identity_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b"{")
    with pytest.raises(CorruptCheckpoint, match=r"run\.json"):
        ensure_run(open_storage(tmp_path))
    assert (tmp_path / "run.json").read_bytes() == b"{"


def test_provenance_of_a_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert git_state(str(tmp_path / "none")) is None
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    clean = git_state(str(tmp_path))
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert git_state(str(tmp_path)) == clean | {"dirty": True}


@pytest.mark.parametrize(
    ("script", "state"),
    [
        ("exec sleep 60", None),
        ('case "$*" in *rev-parse*) echo abc;; *) exec sleep 60;; esac', {"commit": "abc", "dirty": None}),
        ("exit 128", None),
        ("printf '\\377'", None),
    ],
)
def test_a_git_that_hangs_or_fails_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, state: dict[str, Any] | None
) -> None:
    git = tmp_path / "git"
    git.write_text(f"#!/bin/sh\n{script}\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(provenance, "_GIT_TIMEOUT_SECONDS", 0.2)
    started = time.monotonic()
    assert git_state() == state
    assert time.monotonic() - started < 30


def test_a_git_that_cannot_even_be_killed_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = threading.Event()
    monkeypatch.setattr(provenance, "_git", lambda *_: stuck.wait(60))
    monkeypatch.setattr(provenance, "_GIT_PATIENCE_SECONDS", 0.05)
    assert git_state() is None
    stuck.set()


def test_the_command_is_recorded_without_its_secrets_whatever_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--hf-token", "abc", "caf\udce9", "--lr", "0.1"])
    run = open_run(tmp_path)
    document = read_run(open_storage(run.path))
    assert document is not None
    assert document.command == ["train.py", "--hf-token", "<redacted>", "caf?", "--lr", "0.1"]


def test_versions_need_no_import() -> None:
    code = (
        "import sys; from dcp_ckpt.lifecycle.provenance import package_versions as p; "
        "v = p(); assert 'torch' in v and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert package_versions()["python"] == ".".join(map(str, sys.version_info[:3]))
