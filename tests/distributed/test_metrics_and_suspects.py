"""Metrics that arrive after the commit, suspect checkpoints, and when to save, as all ranks see it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_ckpt import (
    AnyOf,
    AtFirstStep,
    AtLastStep,
    BestN,
    Checkpointer,
    EveryEpochs,
    LatestN,
    LossSpike,
    Young,
)
from tests.distributed import worlds

pytestmark = pytest.mark.distributed


def save(checkpointer: Checkpointer, step: int, **metrics: float) -> None:
    checkpointer.save({"tensor": torch.arange(10)}, step=step, metrics=metrics).result(30)


def committed(path: str) -> list[int]:
    return sorted(int(found.parent.name[5:]) for found in Path(path).glob("step-*/manifest.json"))


def report_late(path: str) -> dict[str, Any]:
    """Rank 0's numbers count; the best is known by them, and survives retention."""
    found: dict[str, Any] = {}
    keep = AnyOf(LatestN(2), BestN(1, "val_loss"))
    with Checkpointer(path, config=worlds.config(keep=keep)) as checkpointer:
        save(checkpointer, 1, loss=1.0)
        checkpointer.report_metrics(1, {"val_loss": 0.25 + dist.get_rank()})
        handle = checkpointer.save({"tensor": torch.arange(10)}, step=2, metrics={"loss": 1.0})
        checkpointer.report_metrics(2, {"val_loss": torch.tensor(0.5)})
        found["durable when reported"] = handle.outcome
        best = checkpointer.best()
        found["best"] = best and (best.step, best.metrics)
        save(checkpointer, 3)
        save(checkpointer, 4)
        found["missing"] = worlds.outcome(lambda: checkpointer.report_metrics(9, {"val_loss": 1.0}))
        found["empty"] = worlds.outcome(lambda: checkpointer.report_metrics(4, {}))
        checkpointer.prune()
        found["left"] = committed(path)
        # Better by its number, and reported as not to be trusted: never the best.
        checkpointer.report_metrics(4, {"val_loss": 0.1, "grad_norm": math.inf})
        best = checkpointer.best()
        found["best of good ones"] = best and best.step
    return found


def test_metrics_that_arrive_late(pool, tmp_path):
    results = pool.run(report_late, 3, str(tmp_path))
    found = results[0]
    assert all(result == found for result in results)
    assert found["durable when reported"] == "committed"
    assert found["best"] == (1, {"loss": 1.0, "val_loss": 0.25})
    assert found["missing"][0] == "CheckpointNotFound"
    assert found["empty"][0] == "ConfigError"
    assert found["left"] == [1, 3, 4]
    assert found["best of good ones"] == 1


def go_wrong(path: str) -> dict[str, Any]:
    keep = AnyOf(LatestN(2), BestN(1, "loss"))
    config = worlds.config(keep=keep, suspect_when=LossSpike("loss", factor=2.0))
    found: dict[str, Any] = {}
    with Checkpointer(path, config=config) as checkpointer:
        for step, loss in enumerate((3.0, 2.0, 2.5, 2.4, 9.0, math.nan, math.nan, 8.0), start=1):
            save(checkpointer, step, loss=loss)
        best = checkpointer.best()
        found["best"] = best and best.step
    found["left"] = committed(path)
    with Checkpointer(path, config=config) as checkpointer:
        report = checkpointer.load({"tensor": torch.zeros(10, dtype=torch.int64)})
        found["resumed"] = report and report.step
    return found


def test_suspect_checkpoints_evict_no_good_ones(pool, tmp_path):
    results = pool.run(go_wrong, 2, str(tmp_path))
    assert all(result == results[0] for result in results)
    assert results[0] == {"left": [2, 3, 4, 7, 8], "best": 2, "resumed": 8}
    assert {path.parent.name for path in tmp_path.glob("marks/*/suspect-*.json")} >= {
        "step-00000007",
        "step-00000008",
    }


def ask_when(path: str) -> list[bool]:
    """Ranks whose saves took different times agree about the interval that follows from them."""
    policy = AnyOf(AtFirstStep(), AtLastStep(), EveryEpochs(2), Young(3600.0, first_seconds=3600.0))
    answers = []
    with Checkpointer(path, config=worlds.config(save_when=policy)) as checkpointer:
        for step in range(11, 17):
            due = checkpointer.should_save(step, finished_epoch={13: 1, 15: 2}.get(step), is_last=step == 16)
            answers.append(due)
            if due:
                save(checkpointer, step)
    return answers


def test_all_ranks_save_at_the_same_moments(pool, tmp_path):
    results = pool.run(ask_when, 3, str(tmp_path))
    assert results == [[True, False, False, False, True, True]] * 3
