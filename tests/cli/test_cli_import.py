"""`dcp-ckpt import`: what it prints, its options, its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.commands import as_json, invoke, on_terminal


@pytest.fixture
def src(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(3), "lr": 0.5, "size": torch.Size([3])}, path)
    return path


def test_it_says_what_is_where(src: Path, tmp_path: Path) -> None:
    result = invoke("import", src, tmp_path / "run", "--step", "5", "--prefix", "model.")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"imported 1 tensors and 1 values (torch) to {tmp_path}/run/step-00000005: 8.0 KiB",
        "names: with 'model.'",
        "left out: 1 of a type that is not stored: Size",
        "note: torch.save files have no digests: damage inside of tensors would not be noticed",
    ]
    listed = as_json("list", tmp_path / "run")
    assert [(one["step"], one["tags"]) for one in listed["checkpoints"]] == [(5, ["dcp.save", "import"])]


def test_json_and_exit_codes(src: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    document = as_json("import", src, run, "--step", "5")
    assert document["path"] == f"{run}/step-00000005"
    assert (document["num_tensors"], document["num_values"], document["epoch"]) == (1, 1, 1)
    assert invoke("import", src, run, "--step", "5").exit_code == 1
    assert invoke("import", src, run).exit_code == 2
    assert invoke("import", src, tmp_path, "--step", "5").exit_code == 2
    assert invoke("import", tmp_path / "none", run, "--step", "6").exit_code == 3
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    assert invoke("import", tmp_path / "bad.safetensors", run, "--step", "6").exit_code == 4
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    assert invoke("import", tmp_path / "tensor.pt", run, "--step", "6").exit_code == 5


def test_the_real_command_on_a_terminal(src: Path, tmp_path: Path) -> None:
    torch.save({"large": torch.ones(1 << 20)}, src)
    stdout, shown = on_terminal("import", src, tmp_path / "run", "--step", "5", "--json")
    assert stdout.startswith('{"epoch":1,')
    assert "MiB" in shown
