"""`dcp-ckpt copy`: what it prints, its exit codes, and a bar for people only."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.commands import as_json, invoke, on_terminal, small_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "runs")


def test_it_says_what_is_where(run: Path, tmp_path: Path) -> None:
    result = invoke("copy", f"{run}@best:loss:min", tmp_path / "backup")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"copied step 20 to {tmp_path}/backup: 5 files, 12.0 KiB, all checked\n"
    assert result.stderr == ""
    assert invoke("verify", tmp_path / "backup").exit_code == 0
    again = invoke("copy", f"{run}@20", tmp_path / "backup")
    assert "12.0 KiB (12.0 KiB of them were there), all checked" in again.stdout


def test_json(run: Path, tmp_path: Path) -> None:
    assert as_json("copy", f"{run}@20", f"{tmp_path}/backup/") == {
        "path": f"{tmp_path}/backup/step-00000020",
        "step": 20,
        "num_files": 5,
        "copied_bytes": 12288,
        "kept_bytes": 0,
        "notes": [],
    }


def test_a_copy_into_another_run_comes_with_a_note(run: Path, tmp_path: Path) -> None:
    other = small_run(tmp_path / "others")
    shutil.rmtree(other / "step-00000020")
    result = invoke("copy", f"{run}@20", f"{other}/")
    assert result.exit_code == 0
    assert f"\nnote: {other} is another run (" in result.stdout
    assert invoke("list", other).stdout.count("belongs to another run") == 1


def test_exit_codes(run: Path, tmp_path: Path) -> None:
    missing = invoke("copy", f"{run}@99", tmp_path / "backup")
    assert (missing.exit_code, missing.stdout) == (3, "")
    taken = invoke("copy", f"{run}@10", run / "step-00000020")
    assert taken.exit_code == 1
    assert "never overwrites" in taken.stderr
    data = run / "step-00000030" / "__0_0.e0001-s000001.distcp"
    data.write_bytes(b"x" + data.read_bytes()[1:])
    damaged = invoke("copy", f"{run}@30", tmp_path / "backup")
    assert damaged.exit_code == 4
    assert "block 0" in damaged.stderr
    assert not (tmp_path / "backup" / "manifest.json").exists()
    assert invoke("copy", f"{run}@10").exit_code == 2


def test_a_terminal_gets_a_bar_and_stdout_stays_clean(run: Path, tmp_path: Path) -> None:
    stdout, shown = on_terminal("copy", f"{run}@20", tmp_path / "backup", "--json")
    assert stdout.startswith('{"copied_bytes":12288,')
    assert "KiB" in shown
