"""References: what a person types finds one checkpoint, or says what there is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from dcp_ckpt.errors import CheckpointNotFound, ConfigError, CorruptCheckpoint, FormatTooNew
from dcp_ckpt.format.names import StepDir
from dcp_ckpt.lifecycle.marks import write_mark
from dcp_ckpt.lifecycle.runs import open_run
from dcp_ckpt.ops.refs import RunRef, parse_ref, resolve_ref
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    storage = open_storage(tmp_path / "run")
    for step, loss in ((10, 0.2), (20, 0.1), (30, 0.3)):
        write_tiny_checkpoint(storage, step=step, metrics={"loss": loss})
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/run-001@latest", RunRef(run="runs/run-001", selector="latest")),
        ("r@best", RunRef(run="r", selector="best")),
        ("r@best:val:max", RunRef(run="r", selector="best", metric="val", mode="max")),
        ("r@best:a:b:min", RunRef(run="r", selector="best", metric="a:b", mode="min")),
        ("r@0012", RunRef(run="r", selector=12)),
        ("user@host/r@7", RunRef(run="user@host/r", selector=7)),
        ("file:///r@7", RunRef(run="file:///r", selector=7)),
        ("user@host/run", None),
        ("r@newest", None),
        ("r@best:val", None),
        ("@latest", None),
        ("r@-1", None),
        ("r", None),
    ],
)
def test_grammar(text: str, expected: RunRef | None) -> None:
    assert parse_ref(text) == expected


def test_selectors(run: Path) -> None:
    found = {
        selector: resolve_ref(f"{run}@{selector}").directory
        for selector in ("latest", "10", "best:loss:min", "best:loss:max")
    }
    assert found == {
        "latest": "step-00000030",
        "10": "step-00000010",
        "best:loss:min": "step-00000020",
        "best:loss:max": "step-00000030",
    }


def test_best_alone_follows_what_the_run_monitors(tmp_path: Path) -> None:
    run = open_run(tmp_path, config={"monitor": "acc", "mode": "max"})
    for step, acc in ((10, 0.9), (20, 0.1)):
        metrics = {"acc": acc}
        write_tiny_checkpoint(open_storage(run.path), step=step, run_id=run.run_id, metrics=metrics)
    assert resolve_ref(f"{run.path}@best").directory == "step-00000010"


def test_best_alone_is_never_guessed(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"best:METRIC:min.*metrics: loss"):
        resolve_ref(f"{run}@best")
    with pytest.raises(CheckpointNotFound, match="no valid checkpoint with a value of 'acc'"):
        resolve_ref(f"{run}@best:acc:min")


def test_a_bad_one_is_never_the_latest_but_can_be_asked_for(run: Path) -> None:
    write_mark(open_storage(run), StepDir(30), kind="bad", epoch=1, step=30, attempt="e0001-s000001")
    assert resolve_ref(f"{run}@latest").directory == "step-00000020"
    assert resolve_ref(f"{run}@30").directory == "step-00000030"
    with pytest.raises(CheckpointNotFound, match=r"existing steps: 10, 20, 30 \(marked bad\)"):
        resolve_ref(f"{run}@40")


def test_a_step_that_cannot_be_used_says_why(run: Path) -> None:
    (run / "step-00000010" / "manifest.json").write_bytes(b"{}")
    newer = b'{"format":"dcp_ckpt.manifest","format_version":9}'
    (run / "step-00000020" / "manifest.json").write_bytes(newer)
    (run / "step-00000030" / "manifest.json").unlink()
    with pytest.raises(CorruptCheckpoint, match="step-00000010"):
        resolve_ref(f"{run}@10")
    with pytest.raises(FormatTooNew, match="9"):
        resolve_ref(f"{run}@20")
    with pytest.raises(CheckpointNotFound, match="no checkpoint of step 30"):
        resolve_ref(f"{run}@30")


def test_paths(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "step-00000010")
    copied = tmp_path / "copy@home"
    shutil.copytree(run / "step-00000020", copied)
    for path in (".", "../step-00000010/", run / "step-00000010", f"file://{run}/step-00000010/"):
        location = resolve_ref(path)
        assert os.path.samefile(str(location).removeprefix("file://"), run / "step-00000010")
    assert resolve_ref(copied).directory == "copy@home"


@pytest.mark.parametrize("path", ["/", "file:///", "missing", "missing/step-00000001", ".."])
def test_what_is_no_checkpoint(run: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    with pytest.raises(CheckpointNotFound):
        resolve_ref(path)
    assert not (run / "missing").exists()


def test_a_run_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="not a run"):
        resolve_ref(f"{tmp_path}/none@latest")
    assert list(tmp_path.iterdir()) == []
