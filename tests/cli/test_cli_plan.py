"""`dcp-ckpt plan`: a table for people, exact numbers for programs, on a machine without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint
from tests.cli.commands import as_json, invoke, small_run


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    write_tiny_checkpoint(open_storage(run), step=10, shape=(1024, 1024))
    return run / "step-00000010"


def test_golden(step: Path) -> None:
    result = invoke("plan", step, "--world-size", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "step-00000010: step 10, 4.0 MiB of tensors, saved on 2 ranks, to load on 2 (dp=2)",
        "ranks  needed   read     reads  fragments    memory",
        "0      2.0 MiB  2.0 MiB  2      2 (3.0 KiB)  6.0 MiB",
        "1      2.0 MiB  2.0 MiB  2      2 (3.0 KiB)  6.0 MiB",
        "in all: 4.0 MiB needed, 4.1 MiB read (1.01x), 9 requests",
    ]


def test_equal_ranks_share_a_row(step: Path) -> None:
    lines = invoke("plan", step, "--world-size", "1", "--mesh", "dp=1").stdout.splitlines()
    assert lines[0].endswith("to load on 1 (dp=1)")
    assert lines[2].split()[0] == "0"
    ranks = [line.split()[0] for line in invoke("plan", step, "--world-size", "16").stdout.splitlines()[2:-1]]
    assert ranks[0] == "0-2"
    assert len(ranks) < 16


def test_json(step: Path) -> None:
    document = as_json("plan", step, "--world-size", "3")
    assert sorted(document) == [
        "directory", "mesh", "needed_bytes", "num_partial", "num_requests", "ranks", "read_amplification",
        "read_bytes", "step", "stored_world_size", "tensor_bytes", "world_size",
    ]  # fmt: skip
    assert sorted(document["ranks"][0]) == [
        "fragment_bytes", "memory_bytes", "needed_bytes", "num_fragments", "num_reads", "num_requests",
        "rank", "read_bytes",
    ]  # fmt: skip
    assert document["mesh"] == {"dp": 3}
    assert document["needed_bytes"] == 4 * 1024 * 1024 + 3 * 14
    assert document["read_bytes"] == sum(rank["read_bytes"] for rank in document["ranks"])


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--world-size", "0"],
        ["--world-size", "4", "--mesh", "dp"],
        ["--world-size", "4", "--mesh", "dp=2,dp=2"],
        ["--world-size", "4", "--mesh", "dp=0"],
        ["--world-size", "4", "--mesh", "dp=3"],
        ["--world-size", "4", "--mesh", "dp=2,tp=2"],
    ],
    ids=" ".join,
)
def test_what_is_no_world_is_exit_2(step: Path, options: list[str]) -> None:
    result = invoke("plan", step, *options)
    assert (result.exit_code, result.stdout) == (2, "")


def test_what_is_no_checkpoint_is_exit_3(tmp_path: Path) -> None:
    assert invoke("plan", tmp_path / "none", "--world-size", "2").exit_code == 3
    assert list(tmp_path.iterdir()) == []


LIGHT = """
import runpy, sys
sys.argv = ["dcp-ckpt", *sys.argv[1:]]
try:
    runpy.run_module("dcp_ckpt", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
found = sorted({"torch", "numpy", "rich", "fsspec"} & set(sys.modules))
assert not found, found
"""


@pytest.mark.parametrize("command", ["plan", "copy", "prune", "pin", "unpin"])
def test_commands_run_without_torch_numpy_and_rich(tmp_path: Path, command: str) -> None:
    run = small_run(tmp_path)
    arguments = {
        "plan": [f"{run}@10", "--world-size", "2"],
        "copy": [f"{run}@10", str(tmp_path / "backup")],
        "prune": [str(run), "--keep-last", "1", "--dry-run"],
    }.get(command, [f"{run}@10"])
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, command, *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout
