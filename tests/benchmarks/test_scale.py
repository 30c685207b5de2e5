"""The benchmarks of scale, made small: they compare what they read, and give all that is asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import catalog_scale, planning_scale
from benchmarks.measure import Samples
from benchmarks.ratios import METADATA, SCALE_LABELS, SCALE_TARGETS
from benchmarks.scale_report import parse_options, report


def run(main: Any, directory: Path) -> dict[str, Any]:
    main(["--quick", "--rounds", "1", "--dir", str(directory), "--json", str(directory / "out.json")])
    found: dict[str, Any] = json.loads((directory / "out.json").read_text())
    assert list(found) == ["machine", "rows", "ratios"]
    assert all(math.isfinite(row["median"]) and row["label"] for row in found["rows"])
    assert [path.name for path in directory.iterdir()] == ["out.json"]
    return found


def test_planning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning_scale, "SIZES", {"1k": 8, "4k": 16, "16k": 32})
    monkeypatch.setattr(planning_scale, "NUM_TENSORS", 5)
    monkeypatch.setattr(planning_scale, "QUICK_STOCK_RANKS", 4)
    found = run(planning_scale.main, tmp_path)
    assert list(found["ratios"]) == ["planning_1k", "planning_4k", "planning_16k", "resume_bytes_16k"]
    medians = {(row["metric"], row["system"]): row["median"] for row in found["rows"]}
    # Eight times as many ranks as were measured.
    assert medians["resume_bytes_16k", METADATA] > 32 * 5 * 100


@pytest.mark.slow
def test_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_scale, "NUM_CHECKPOINTS", 12)
    monkeypatch.setattr(catalog_scale, "QUICK_UNPICKLED", 3)
    found = run(catalog_scale.main, tmp_path)
    assert list(found["ratios"]) == ["list_10000", "cli_help", "cli_list"]


def test_every_target_has_labels_and_its_ratio(tmp_path: Path) -> None:
    assert {metric for target in SCALE_TARGETS for metric, _ in (target.above, *target.also)} <= set(
        SCALE_LABELS
    )
    samples = Samples()
    for target in SCALE_TARGETS:
        samples.values[target.above] = [1.0]
        if target.below is not None:
            samples.values[target.below] = [2.0]
    found = report(samples, parse_options("", arguments=["--dir", str(tmp_path)]), notes={}, settings={})
    ratios = found["ratios"]
    assert ratios == {target.name: 0.5 if target.below else 1.0 for target in SCALE_TARGETS}
