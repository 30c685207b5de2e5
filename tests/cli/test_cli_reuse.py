"""What the commands say of checkpoints that share files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcp_ckpt import CheckpointConfig, Checkpointer
from tests.cli.commands import as_json, invoke

TENSOR_BYTES = 400_000


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three steps; one of four tensors changes each time."""
    state = {f"t{number}": torch.zeros(TENSOR_BYTES // 4) for number in range(4)}
    with Checkpointer(tmp_path, config=CheckpointConfig(reuse=True, keep=None)) as checkpointer:
        for step in (1, 2, 3):
            state["t0"] += 1
            checkpointer.save(state, step=step).result(60)
    return tmp_path


def test_list_tells_what_was_written_from_what_is_there(run: Path) -> None:
    first, *others = as_json("list", run)["checkpoints"]
    assert first["written_bytes"] == first["bytes"] > 4 * TENSOR_BYTES
    for checkpoint in others:
        assert checkpoint["bytes"] - checkpoint["written_bytes"] == first["bytes"]
    lines = invoke("list", run).stdout.splitlines()
    assert "bytes    written" in lines[0]


def test_inspect_names_the_checkpoints_that_wrote_the_files(run: Path) -> None:
    found = as_json("inspect", f"{run}@3")
    assert found["shared_with"] == {"step-00000001": found["bytes"] - found["written_bytes"]}
    assert "of step-00000001" in invoke("inspect", f"{run}@3").stdout
    assert as_json("inspect", f"{run}@1")["shared_with"] == {}


def test_prune_says_that_shared_files_may_stay(run: Path) -> None:
    plan = as_json("prune", run, "--keep-last", "1", "--dry-run")
    assert [item["directory"] for item in plan["removed"]] == ["step-00000001", "step-00000002"]
    assert plan["kept"][0]["shared_bytes"] > 4 * TENSOR_BYTES
    assert ", up to " in invoke("prune", run, "--keep-last", "1", "--dry-run").stdout
    as_json("prune", run, "--keep-last", "1")
    assert as_json("verify", run)["ok"]
    left = {path.stat().st_ino: path.stat().st_size for path in run.rglob("*.distcp")}
    assert sum(left.values()) == as_json("list", run)["checkpoints"][0]["bytes"]
