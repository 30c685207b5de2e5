"""What a load prints: a few lines that say what happened to each part of the state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dcp_ckpt import Checkpointer, TrainState, load_checkpoint
from dcp_ckpt.load.grouping import grouped, last_parts
from dcp_ckpt.load.report import CastTensor, LoadReport, RejectedCheckpoint


def report(**fields: Any) -> LoadReport:
    given: dict[str, Any] = {
        "step": 40, "path": "runs/run-001/step-00000040", "epoch": 2, "saved_world_size": 8, "world_size": 4,
        "restored": (), "notes": (), "skipped": (), "rejected": (), "metrics": {}, "bytes_read": 12_345_678,
        "seconds": 0.256,
    }  # fmt: skip
    return LoadReport(**given | fields)


def test_a_report_reads_well() -> None:
    moments = [f"optimizer.state.blocks.{i}.{part}" for i in range(3) for part in ("weight", "bias")]
    shown = str(
        report(
            rejected=(RejectedCheckpoint(path="runs/run-001/step-00000050", reason="block 7 differs"),),
            restored=(
                *(f"model.blocks.{i}.{part}" for i in range(31) for part in ("weight", "bias")),
                "lr_scheduler",
                "optimizer.param_groups",
                *(f"{moment}.exp_avg" for moment in moments),
            ),
            reinitialised={
                "optimizer.state.head.weight": "the checkpoint holds no state of it",
                "optimizer.state.head.bias": "the checkpoint holds no state of it",
                "rng": "derived from step and coordinate",
            },
            cast=tuple(
                CastTensor(name=f"model.blocks.{i}.weight", stored="float32", live="bfloat16")
                for i in range(31)
            ),
            skipped=("model.head.bias", "model.head.weight", "scaler"),
            unverified=("digests",),
            notes=("data: 2 workers instead of 4",),
        )
    )
    assert (
        shown
        == """\
loaded step 40 (runs/run-001/step-00000040), saved by 8 rank(s), loaded by 4: 12.3 MB in 0.26 s
  rejected runs/run-001/step-00000050: block 7 differs
  not verified: digests
  model.blocks.*: 62 restored
  lr_scheduler: restored
  optimizer.*: 7 restored
  optimizer.state.head.*: 2 reinitialised (the checkpoint holds no state of it)
  rng: reinitialised (derived from step and coordinate)
  model.blocks.*: 31 cast (float32 -> bfloat16)
  model.head.*: 2 skipped
  scaler: skipped
  data: 2 workers instead of 4"""
    )


def test_a_flat_state_of_many_names_is_one_line() -> None:
    assert "  *: 500 restored" in str(report(restored=tuple(f"t{i}" for i in range(500)))).splitlines()


def test_groups_are_as_fine_as_there_is_room_for() -> None:
    names = [f"model.{part}.{index}" for part in "abc" for index in range(4)]
    assert [group.label for group in grouped(names, most=3, depth=2)] == [
        "model.a.*",
        "model.b.*",
        "model.c.*",
    ]
    assert [group.label for group in grouped(names, most=2, depth=2)] == ["model.*"]
    assert [group.label for group in grouped(["a.b", "a.b.c", "x"], most=9, depth=1)] == ["a.*", "x"]
    assert last_parts(["a.w", "b.w", "b.b", "c.x", "d.y"]) == "w, b, x, ..."


def test_what_ranks_have_for_themselves_is_accounted_for(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with Checkpointer(tmp_path) as checkpointer:
        step = checkpointer.save(TrainState(model=model, per_rank={"mine": 1}), step=1).result(30).path
    whole = load_checkpoint(step, TrainState(model=model, per_rank={"mine": 0}))
    assert whole.restored == ("model.bias", "model.weight", "per_rank.mine", "rng")
    assert (whole.skipped, whole.reinitialised, whole.deviations) == ((), {}, ())
    weights = load_checkpoint(step, TrainState(model=model, rng=False))
    assert weights.restored == ("model.bias", "model.weight")
    assert weights.skipped == ("per_rank.mine", "rng"), "they are stored, and nothing asked for them"
    assert weights.deviations == ("per_rank.mine: skipped", "rng: skipped")


def test_random_numbers_that_are_new_are_not_called_restored(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with Checkpointer(tmp_path) as checkpointer:
        step = checkpointer.save(TrainState(model=model, rng=False), step=1).result(30).path
    report = load_checkpoint(step, TrainState(model=model))
    assert list(report.reinitialised) == ["rng"]
    assert "not saved, derived from step and data coordinate" in report.reinitialised["rng"]
    assert report.restored == ("model.bias", "model.weight")
    assert report.notes == ()
