"""`dcp-ckpt export`: what it prints, its options, its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dcp_ckpt.cli.export import _SizeType
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint
from tests.cli.commands import as_json, invoke, on_terminal, small_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small_run(tmp_path / "runs")


def test_it_says_what_is_where(run: Path, tmp_path: Path) -> None:
    result = invoke("export", f"{run}@best:loss:min", tmp_path / "model", "--dtype", "bf16")
    assert result.exit_code == 0, result.output
    size = (tmp_path / "model/model.safetensors").stat().st_size
    assert result.stdout.splitlines() == [
        f"exported 4 tensors of step 20 to {tmp_path}/model: 1 file, {size} B",
        "names: without 'model.'",
        "converted: 2 from float32 to bfloat16",
        "left out: 3 not of a model",
    ]
    assert result.stderr == ""
    assert load_file(tmp_path / "model/model.safetensors")["weight"].dtype == torch.bfloat16


def test_json(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    document = as_json("export", f"{run}@20", out, "--format", "dcp", "--exclude", "model.weight")
    assert document.pop("num_bytes") == sum(path.stat().st_size for path in out.iterdir())
    assert document == {
        "path": str(out),
        "format": "dcp",
        "step": 20,
        "files": ["__0_0.distcp", ".metadata"],
        "num_tensors": 3,
        "num_values": 3,
        "prefix": "",
        "converted": {},
        "num_fused": 0,
        "left_out": {"excluded": 1, "of single ranks": 1},
        "unverified": "",
        "notes": [],
    }


def test_options(run: Path, tmp_path: Path) -> None:
    arguments = ("export", f"{run}@20", tmp_path / "m.pt", "--format", "torch")
    globs = ("--include", "model.[bw]*", "--include", "model.count", "--exclude", "*.bias")
    assert invoke(*arguments, *globs, "--strip-prefix", "").exit_code == 0
    assert torch.load(tmp_path / "m.pt", weights_only=True).keys() == {"model.weight", "model.count"}
    assert invoke(*arguments).exit_code == 1
    assert invoke(*arguments, "--force").exit_code == 0
    shards = invoke("export", f"{run}@20", tmp_path / "shards", "--max-shard-size", "0.1KB")
    assert shards.exit_code == 0
    assert len(list((tmp_path / "shards").iterdir())) == 3


def test_exit_codes(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke("export", f"{run}@99", out).exit_code == 3
    assert invoke("export", f"{run}@20", out, "--dtype", "int8").exit_code == 2
    assert invoke("export", f"{run}@20", out, "--max-shard-size", "large").exit_code == 2
    assert invoke("export", f"{run}@20", out, "--format", "onnx").exit_code == 2
    assert invoke("export", f"{run}@20", out, "--include", "nothing").exit_code == 5
    refused = invoke("export", f"{run}@20", out, "--fuse-lora")
    assert refused.exit_code == 5
    assert "no LoRA adapters to fuse" in refused.stderr
    data = run / "step-00000030" / "__0_0.e0001-s000001.distcp"
    data.write_bytes(b"x" + data.read_bytes()[1:])
    damaged = invoke("export", f"{run}@30", out)
    assert (damaged.exit_code, damaged.stdout) == (4, "")
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("4GiB", 4 << 30), ("1.5 mb", 1_500_000), ("700", 700), ("2K", 2000)],
)
def test_sizes(text: str, size: int) -> None:
    assert _SizeType().convert(text, None, None) == size


def test_a_terminal_gets_a_bar_and_stdout_stays_clean(tmp_path: Path) -> None:
    write_tiny_checkpoint(open_storage(tmp_path / "run"), step=1, shape=(700, 1000))
    stdout, shown = on_terminal("export", f"{tmp_path}/run@1", tmp_path / "out", "--json")
    assert stdout.startswith('{"converted":{},')
    assert "MiB" in shown
