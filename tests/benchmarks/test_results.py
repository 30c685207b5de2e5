"""Results of all benchmarks: what misses is found, what is tolerated is said, README shows what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import check, readme
from benchmarks.ratios import OURS, STOCK_SAVE
from benchmarks.results import QUICK_TOLERANCE, TOLERATED, verdicts
from benchmarks.suite import SCRIPTS, merged

ROOT = Path(__file__).resolve().parents[2]


def document(ratio: float | None, *, name: str = "durable", quick: bool = False) -> dict[str, Any]:
    rows = [
        {"metric": name, "system": OURS, "median": ratio},
        {"metric": name, "system": STOCK_SAVE, "median": 1.0},
    ]
    return {"quick": quick, "scripts": {"save_latency": {"rows": rows, "ratios": {name: ratio}}}}


@pytest.mark.parametrize(
    ("ratio", "quick", "holds"),
    [
        (0.69, False, True),
        (0.71, False, False),
        (0.71, True, True),
        (0.71 * QUICK_TOLERANCE, True, False),
        (None, False, False),
    ],
)
def test_what_misses_fails_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ratio: float | None, quick: bool, holds: bool
) -> None:
    found = tmp_path / "result.json"
    found.write_text(json.dumps(document(ratio, quick=quick)))
    assert check.main([str(found)]) == (0 if holds else 1)
    assert ("durable is" in capsys.readouterr().out) is not holds


def test_higher_is_better_where_it_is() -> None:
    (good,) = verdicts(document(0.9, name="of_direct_write"))
    (bad,) = verdicts(document(0.5, name="of_direct_write"))
    assert (good.holds, bad.holds) == (True, False)


def test_what_is_tolerated_names_what_bounds_it() -> None:
    for name, (limit, reason) in TOLERATED.items():
        (verdict,) = verdicts(document(limit * 0.99, name=name))
        assert verdict.holds
        assert verdict.reason == reason


def test_a_script_that_failed_fails_the_check(tmp_path: Path) -> None:
    found = tmp_path / "result.json"
    found.write_text(json.dumps({"quick": True, "scripts": {"s3": {"failed": "exit code 1"}}}))
    assert check.main([str(found)]) == 1


def test_every_script_of_the_suite_is_there_and_no_other() -> None:
    programs = {
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if '"--json"' in path.read_text() or "parse_options(" in path.read_text()
    }
    frames = {"ranked", "scale_report", "suite", "first_save", "memory_ranks", "s3_ranks"}
    assert {script.name for script in SCRIPTS} == programs - frames


def test_the_readme_gets_the_table_of_a_result_between_its_marks() -> None:
    metrics = {"stall_sharded": "dcp.async_save thread", "durable": STOCK_SAVE}
    found = document(0.5)
    found["scripts"]["save_latency"] = {
        "machine": {"world_size": 8, "size_gib": 1.0, "cores": 2, "rounds": 7},
        "rows": [
            {"metric": metric, "system": system, "median": median}
            for metric, stock in metrics.items()
            for system, median in ((OURS, 0.5), (stock, 1.25))
        ],
        "ratios": dict.fromkeys(metrics, 0.4),
    }
    shown = readme.section(found, "some.json")
    text = readme.README.read_text()
    assert readme.marked(readme.replaced(text, shown)) == shown
    assert (
        "| save until durable (fsync and commit for both) | 0.5 s | `dcp.save` 1.25 s | 0.4 | 0.7 |" in shown
    )
    assert "8 ranks, 1 GiB of sharded state, 2 cores, medians of 7 interleaved rounds" in shown
    assert "stall, replicated" not in shown
    assert readme.replaced(text, readme.marked(text)) == text, "nothing else changes"


def test_the_readme_shows_the_newest_full_result() -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("????-??-??.json"))
    newest = json.loads(results[-1].read_text())
    assert readme.marked(readme.README.read_text()) == readme.section(newest, results[-1].name)
    assert newest["scripts"].keys() <= {script.name for script in SCRIPTS}


def test_scripts_that_run_alone_replace_themselves_in_a_result() -> None:
    assert list(merged({"s3": 1, "memory": 2}, {"save_latency": 3, "s3": 4}).items()) == [
        ("save_latency", 3), ("memory", 2), ("s3", 4),
    ]  # fmt: skip
