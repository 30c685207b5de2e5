"""`dcp-ckpt average`: what it prints, its options, its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import as_json, invoke, on_terminal, small_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "runs")


def test_it_says_what_is_where(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs/run-002"
    result = invoke("average", run, "--last", "2", "--weights", "1,3", "--out", out, "--step", "0")
    assert result.exit_code == 0, result.output
    first, *rows, told, newest, optimizer, ranks = result.stdout.splitlines()
    assert first.split() == ["checkpoint", "step", "weight"]
    assert [row.split() for row in rows] == [
        [f"{run}/step-00000040", "40", "0.25"],
        [f"{run}/step-00000050", "50", "0.75"],
    ]
    assert told == f"averaged 3 tensors to {out}/step-00000000: 4.0 KiB"
    assert newest == f"copied from {run}/step-00000050: 1 tensor (not floating), 0 values"
    assert (optimizer, ranks) == ("left out: 3 of an optimizer", "left out: 1 of single ranks")


def test_json_and_exit_codes(run: Path, tmp_path: Path) -> None:
    refs, out = (f"{run}@10", f"{run}@20"), ("--out", tmp_path / "out")
    document = as_json("average", *refs, *out, "--step", "5")
    assert (document["path"], document["num_averaged"]) == (f"{tmp_path}/out/step-00000005", 3)
    assert [source["weight"] for source in document["sources"]] == [0.5, 0.5]
    assert invoke("average", *refs, *out, "--step", "5").exit_code == 1
    assert invoke("average", *refs, *out, "--step", "6", "--weights", "1").exit_code == 2
    assert invoke("average", *refs, *out, "--step", "6", "--weights", "a,b").exit_code == 2
    assert invoke("average", *out, "--step", "6").exit_code == 2
    assert invoke("average", run, *out, "--step", "6", "--last", "9").exit_code == 3
    data = run / "step-00000010" / "__0_0.e0001-s000001.distcp"
    data.write_bytes(b"x" + data.read_bytes()[1:])
    assert invoke("average", *refs, *out, "--step", "6").exit_code == 4
    as_json("import", f"{run}@20", tmp_path / "other", "--step", "1", "--prefix", "other")
    assert invoke("average", refs[1], f"{tmp_path}/other@1", *out, "--step", "6").exit_code == 5


def test_the_real_command_on_a_terminal(run: Path, tmp_path: Path) -> None:
    stdout, _ = on_terminal("average", f"{run}@20", "--out", tmp_path / "out", "--step", "5", "--json")
    assert stdout.startswith('{"epoch":1,')
