"""`dcp-ckpt watch`: what is under way, live, and an end by Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from dcp_ckpt.lifecycle.epochs import claim_epoch
from dcp_ckpt.lifecycle.runs import open_run
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint
from tests.cli.commands import as_json, invoke


def run_in_the_middle_of_a_save(base: Path) -> Path:
    """Step 10 is committed; of step 20, rank 0 is done and rank 1 has begun."""
    run = open_run(base)
    storage = open_storage(run.path)
    claim_epoch(
        storage, run_id=run.run_id, world_size=2, purpose="train", hold=lambda key: None, wait_seconds=0.0
    )
    write_tiny_checkpoint(storage, step=10, run_id=run.run_id)
    write_tiny_checkpoint(storage, step=20, save=2, run_id=run.run_id, commit=False)
    (fragment,) = (Path(run.path) / "step-00000020").glob("rank-00001.*.json")
    fragment.unlink()
    return Path(run.path)


def test_once_says_how_it_is(tmp_path: Path) -> None:
    run = run_in_the_middle_of_a_save(tmp_path)
    result = invoke("watch", run, "--once")
    assert result.exit_code == 0, result.output
    headline, save = result.stdout.splitlines()
    assert headline == "epoch 1 (train, 2 ranks): not running; 1 checkpoints, newest step 10"
    assert save.startswith("  saving step 20 (e0001-s000002): 1/2 ranks written, ")
    assert save.endswith("waiting for rank 1")
    (told,) = as_json("watch", run, "--once")["saves"]
    assert [rank["state"] for rank in told["ranks"]] == ["written", "writing"]
    assert all(rank["num_bytes"] == rank["expected_bytes"] > 0 for rank in told["ranks"])
    assert invoke("watch", tmp_path, "--once").exit_code == 3


def test_a_pipe_gets_a_line_for_every_change_until_ctrl_c(tmp_path: Path) -> None:
    run = run_in_the_middle_of_a_save(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "dcp_ckpt", "watch", str(run), "--json", "--every", "0.05"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["latest_step"] == 10
        write_tiny_checkpoint(open_storage(run), step=30, save=3, run_id=_run_id(run))
        assert json.loads(process.stdout.readline())["latest_step"] is not None
        process.send_signal(signal.SIGINT)
        rest, problems = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert problems == ""
    assert all(json.loads(line) for line in rest.splitlines())


def _run_id(run: Path) -> str:
    run_id: str = json.loads((run / "run.json").read_bytes())["run_id"]
    return run_id
