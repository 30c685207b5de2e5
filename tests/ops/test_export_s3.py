"""Exports from a real S3 server, and to one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcp_ckpt import copy_checkpoint, export
from dcp_ckpt.errors import ConfigError, CorruptCheckpoint, StorageExists
from dcp_ckpt.storage import open_storage
from tests.ops.exports import read_safetensors, same_bits, saved

STEP = "step-00000010"


@pytest.fixture(scope="module")
def model() -> dict[str, torch.Tensor]:
    """Several parts of an upload, and small tensors beside them."""
    torch.manual_seed(0)
    return {"large": torch.randn(2400, 2000)} | {f"small.{n}": torch.randn(10) for n in range(50)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: dict[str, torch.Tensor]) -> Path:
    return Path(saved(tmp_path_factory.mktemp("run"), {"model": model, "lr": 0.5}).partition("@")[0])


def download(url: str, target: Path) -> Path:
    storage = open_storage(url)
    target.mkdir()
    for info in storage.list(""):
        (target / info.key).write_bytes(storage.read(info.key))
    return target


def test_there_and_back(run: Path, model: dict[str, torch.Tensor], s3_prefix: str, tmp_path: Path) -> None:
    copy_checkpoint(run / STEP, f"{s3_prefix}/run/{STEP}")
    export(f"{s3_prefix}/run/{STEP}", tmp_path / "local")
    same_bits(read_safetensors(tmp_path / "local"), model)
    for name, options in (("whole", {}), ("shards", {"max_shard_bytes": 1_000_000})):
        report = export(f"{s3_prefix}/run/{STEP}", f"{s3_prefix}/{name}", **options)  # type: ignore[arg-type]
        assert report.path == f"{s3_prefix}/{name}"
        same_bits(read_safetensors(download(report.path, tmp_path / name)), model)
    report = export(run / STEP, f"{s3_prefix}/files/model.pt", format="torch")
    found = torch.load(download(f"{s3_prefix}/files", tmp_path / "files") / "model.pt", weights_only=True)
    same_bits(found, model)
    export(run / STEP, f"{s3_prefix}/dcp", format="dcp")
    export(f"{s3_prefix}/dcp", tmp_path / "again")
    same_bits(read_safetensors(tmp_path / "again"), model)


def test_nothing_is_replaced_and_damage_leaves_nothing(run: Path, s3_prefix: str) -> None:
    export(run / STEP, f"{s3_prefix}/out", include="model.small.*")
    before = open_storage(f"{s3_prefix}/out").list("")
    with pytest.raises(StorageExists, match="is there already"):
        export(run / STEP, f"{s3_prefix}/out")
    with pytest.raises(ConfigError, match="delete the old ones first"):
        export(run / STEP, f"{s3_prefix}/out", force=True)
    assert open_storage(f"{s3_prefix}/out").list("") == before
    storage = open_storage(f"{s3_prefix}/run")
    for path in (run / STEP).iterdir():
        data = bytearray(path.read_bytes())
        if path.suffix == ".distcp":
            data[11 << 20] ^= 1
        storage.put(f"{STEP}/{path.name}", data)
    with pytest.raises(CorruptCheckpoint, match="block 11 "):
        export(f"{s3_prefix}/run/{STEP}", f"{s3_prefix}/damaged", max_shard_bytes=300)
    assert open_storage(f"{s3_prefix}/damaged").list("") == []
