"""What the driver tells about its steps and saves."""

from __future__ import annotations

import json

import pytest
import torch

from dcp_ckpt import CheckpointInfo, LoadReport, SaveHandle, errors
from dcp_ckpt.load.report import RejectedCheckpoint
from launch.data import Batch
from launch.report import Reporter, exit_code, print_runs, samples_digest


def batch(*sample_ids: int) -> Batch:
    empty = torch.zeros(0)
    return Batch(inputs=empty, targets=empty, sample_ids=sample_ids, num_tokens=8)


def info(step: int) -> CheckpointInfo:
    return CheckpointInfo(
        step=step,
        path=f"run/step-{step:08d}",
        bytes=1234,
        stall_seconds=0.1,
        durable_seconds=0.2,
        metrics={},
        tags=(),
        world_size=1,
        created_at="2026-01-01T00:00:00Z",
    )


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_save_is_told_once_when_its_outcome_is_known(tmp_path, capsys):
    reporter = Reporter(rank=0, log_json=tmp_path / "new" / "log.jsonl")
    handle = SaveHandle(5)
    reporter.saving(step=5, handle=handle)
    reporter.poll()
    assert events(tmp_path / "new" / "log.jsonl") == []
    handle.resolve("committed", info=info(5))
    reporter.poll()
    reporter.close()
    assert events(tmp_path / "new" / "log.jsonl") == [
        {"event": "save", "step": 5, "stall_seconds": 0.1, "durable_seconds": 0.2, "bytes": 1234}
    ]
    assert "saved step 5" in capsys.readouterr().out


def test_failed_save_is_not_told_as_saved(tmp_path, capsys):
    with_failure = SaveHandle(5)
    with_failure.resolve("failed", error=errors.SaveFailed("disk full", rank=3))
    reporter = Reporter(rank=0, log_json=tmp_path / "log.jsonl")
    reporter.saving(step=5, handle=with_failure)
    reporter.close()
    assert events(tmp_path / "log.jsonl") == []
    out = capsys.readouterr().out
    assert "save of step 5 failed: disk full" in out
    assert "rank 3" in out


def test_numbers_read_back_exactly_and_the_log_grows(tmp_path):
    loss, lr = 0.1 + 0.2, 1e-3 / 3
    for step in (1, 2):
        reporter = Reporter(rank=0, log_json=tmp_path / "log.jsonl")
        reporter.stepped(step=step, last_step=2, loss=loss, lr=lr, batch=batch(3, 1))
        reporter.close()
    samples = samples_digest([3, 1])
    assert events(tmp_path / "log.jsonl") == [
        {"event": "step", "step": step, "loss": loss, "lr": lr, "samples": samples} for step in (1, 2)
    ]


def test_other_ranks_are_silent(tmp_path, capsys):
    reporter = Reporter(rank=1, log_json=tmp_path / "log.jsonl")
    reporter.stepped(step=1, last_step=1, loss=1.0, lr=1.0, batch=batch(1))
    reporter.validated(step=1, loss=1.0)
    reporter.close()
    assert not (tmp_path / "log.jsonl").exists()
    assert capsys.readouterr().out == ""


def test_digest_depends_on_ids_and_order():
    digests = {samples_digest(ids) for ids in ([1, 2], [2, 1], [1, 2, 3], [])}
    assert len(digests) == 4
    assert all(len(digest) == 16 for digest in digests)
    assert samples_digest(range(1, 3)) == samples_digest([1, 2])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError, 2),
        (errors.CheckpointNotFound, 3),
        (errors.CorruptCheckpoint, 4),
        (errors.StateMismatch, 5),
        (errors.SaveFailed, 1),
    ],
)
def test_exit_code_is_that_of_the_command_line(error, code):
    assert exit_code(error("reason")) == code


def test_a_resume_tells_all_that_was_not_simply_restored(capsys):
    report = LoadReport(
        step=7,
        path="runs/run-001/step-00000007",
        epoch=1,
        saved_world_size=4,
        world_size=2,
        restored=("model.weight",),
        reinitialised={"rng": "torch derived from step and data coordinate"},
        cast=(),
        notes=("a note",),
        skipped=("scaler",),
        rejected=(RejectedCheckpoint(path="runs/run-001/step-00000008", reason="damaged"),),
        metrics={},
        bytes_read=1,
        seconds=0.1,
    )
    Reporter(rank=0, log_json=None).loaded(report, None, world_size=2)
    assert capsys.readouterr().out.splitlines() == [
        "resumed at step 7, saved by 4 ranks, now 2",
        "  rejected runs/run-001/step-00000008: damaged",
        "  rng: reinitialised (torch derived from step and data coordinate)",
        "  scaler: skipped",
        "  a note",
    ]


def test_a_log_that_cannot_be_written_is_wrong_usage(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(errors.ConfigError, match="--log-json: cannot write there"):
        Reporter(rank=0, log_json=tmp_path / "file" / "log.jsonl")


def test_no_runs_are_told_in_words(tmp_path, capsys):
    print_runs(str(tmp_path))
    assert capsys.readouterr().out == f"no runs under {tmp_path}\n"
