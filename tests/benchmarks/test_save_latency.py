"""The benchmark as a program: it ends in time, gives all that the contract names, and leaves nothing."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ratios import LABELS, MACHINE, OURS, SNAPSHOT, SUCCESSOR, TARGETS
from tests.programs import run_program

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "save_latency.py"
TIMEOUT_SECONDS = 100
OPTIONAL = {SNAPSHOT, SUCCESSOR}
"""Systems of this name, and packages; `make setup` does not install them."""


def run(directory: Path) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(PROGRAM), "--size-gib", "0.005", "--rounds", "1"),
        *("--dir", str(directory / "saves"), "--json", str(directory / "out.json")),
    ]
    run_program(command, directory=directory, timeout_seconds=TIMEOUT_SECONDS)
    found: dict[str, Any] = json.loads((directory / "out.json").read_text())
    return found


@pytest.mark.distributed
def test_a_run_measures_everything_and_leaves_nothing(tmp_path):
    found = run(tmp_path)

    assert list(found) == ["machine", "rows", "ratios"]
    assert list(found["ratios"]) == [target.name for target in TARGETS]
    assert all(math.isfinite(ratio) for ratio in found["ratios"].values())
    rows = {(row["metric"], row["system"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"])
    for row in rows.values():
        failed = row["note"].startswith("failed: ")
        assert failed or (math.isfinite(row["median"]) and math.isfinite(row["mad"]))
        assert row["unit"] in ("s", "bytes", "x", "MiB")
        # Only what is not installed may fail.
        assert not failed or row["system"] in OPTIONAL
    systems = {system for metric, system in rows if metric == "stall_sharded"}
    measured = {metric for metric, system in rows if system in (OURS, MACHINE)}
    assert measured == LABELS.keys()
    assert len(systems - OPTIONAL) == 5
    machine = found["machine"]
    assert (machine["world_size"], machine["rounds"], machine["overlap"]) == (2, 1, "step")
    assert set(machine["rates"]) >= {"memcpy_bytes_per_second", "direct_write_bytes_per_second"}
    missing = {name for name in OPTIONAL if importlib.util.find_spec(name) is None}
    assert set(machine["left_out"]) == missing
    assert not (tmp_path / "saves" / "save_latency").exists()
