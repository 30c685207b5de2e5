"""What a program learns of the runs below a directory."""

from __future__ import annotations

from pathlib import Path

from dcp_ckpt import summarize_runs
from dcp_ckpt.format.names import StepDir
from dcp_ckpt.lifecycle.marks import write_mark
from dcp_ckpt.lifecycle.runs import open_run
from dcp_ckpt.ops.runs import BestCheckpoint
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint


def test_a_run_at_a_glance(tmp_path: Path) -> None:
    run = open_run(tmp_path, name="baseline", config={"monitor": "loss", "mode": "min", "lr": 0.1})
    storage = open_storage(run.path)
    manifests = [
        write_tiny_checkpoint(storage, step=step, run_id=run.run_id, metrics={"loss": loss})
        for step, loss in ((10, 0.5), (20, 0.25), (30, float("nan")), (40, 0.75))
    ]
    write_mark(storage, StepDir(40), kind="bad", epoch=1, step=40, attempt="e0001-s000001")
    open_run(tmp_path, resume="never")
    first, second = summarize_runs(tmp_path)
    assert (first.run.number, first.run.name, first.run.document.config["lr"]) == (1, "baseline", 0.1)
    assert (first.num_checkpoints, first.latest_step) == (4, 30), "what is bad is there, and not the latest"
    assert first.best == BestCheckpoint(step=20, metric="loss", mode="min", value=0.25)
    assert first.num_bytes == first.written_bytes == sum(manifest.total_bytes for manifest in manifests)
    assert (second.run.number, second.num_checkpoints, second.latest_step, second.best) == (2, 0, None, None)
