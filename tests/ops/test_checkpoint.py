"""open_checkpoint: names, values and tensors of a committed checkpoint, every byte checked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dcp_ckpt.errors import CheckpointNotFound, CorruptCheckpoint, FormatTooNew
from dcp_ckpt.format.containers import value_container
from dcp_ckpt.ops.checkpoint import open_checkpoint
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint

DATA_0 = "__0_0.e0001-s000001.distcp"
DATA_1 = "__1_0.e0001-s000001.distcp"
FRAGMENT_1 = "rank-00001.e0001-s000001.json"


@pytest.fixture
def step(tmp_path: Path) -> Path:
    write_tiny_checkpoint(open_storage(tmp_path), step=10)
    return tmp_path / "step-00000010"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_names_and_values(step: Path) -> None:
    with open_checkpoint(step) as checkpoint:
        assert checkpoint.manifest.step == 10
        assert checkpoint.directory == "step-00000010"
        assert checkpoint.keys() == [
            "model.bias", "model.count", "model.empty", "model.weight",
            "optim.betas", "optim.lr", "optim.schedule",
        ]  # fmt: skip
        assert checkpoint.tensors["model.weight"].placements == ["S0"]
        assert checkpoint.read_value("optim.betas") == (0.9, 0.999)
        assert checkpoint.read_value("optim.schedule") == {"epoch": 2, "warm": True}
        assert [checkpoint.read_value("rng.seed", rank=rank) for rank in (0, 1)] == [0, 1]
        weight_mesh = checkpoint.mesh("model.weight")
        assert weight_mesh is not None
        assert weight_mesh.shape == [2]
        assert checkpoint.mesh("model.bias") is None


@pytest.mark.parametrize("shard_dim", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(6, 4), (1, 1), (700, 1000)], ids=str)
def test_tensors_are_put_together_bit_for_bit(
    tmp_path: Path, shape: tuple[int, int], ranks: int, shard_dim: int
) -> None:
    write_tiny_checkpoint(open_storage(tmp_path), step=1, ranks=ranks, shape=shape, shard_dim=shard_dim)
    with open_checkpoint(f"{tmp_path}@1") as checkpoint:
        weight = checkpoint.read_tensor("model.weight")
        assert torch.equal(weight, torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape))
        assert torch.equal(
            checkpoint.read_tensor("model.bias"), torch.tensor([0.5, -1.0, 2.0], dtype=torch.bfloat16)
        )
        assert torch.equal(checkpoint.read_tensor("model.count"), torch.tensor(7))
        assert checkpoint.read_tensor("model.empty").shape == (0, 2)


def test_every_container_is_a_torch_file(step: Path) -> None:
    with open_checkpoint(step) as checkpoint:
        for rank, name in ((0, DATA_0), (1, DATA_1)):
            data = (step / name).read_bytes()
            for chunk in checkpoint.fragment(rank).chunks:
                (step / "one").write_bytes(data[chunk.container_offset :][: chunk.container_bytes])
                loaded = torch.load(step / "one", weights_only=True)
                rows = slice(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]) if chunk.sizes else ...
                assert torch.equal(loaded, checkpoint.read_tensor(chunk.tensor)[rows])
        data = (step / DATA_0).read_bytes()
        for name, value in checkpoint.values.items():
            assert value.container_offset is not None
            found = data[value.container_offset :][: value.container_bytes]
            assert found == value_container(checkpoint.read_value(name))


def test_the_same_checkpoint_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tiny_checkpoint(open_storage(tmp_path / name), step=1)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "step-00000001").iterdir()}
        for name in ("a", "b")
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 5


def test_unknown_names_list_what_exists(step: Path) -> None:
    with open_checkpoint(step) as checkpoint:
        with pytest.raises(CheckpointNotFound, match=r"no tensor 'weight'; there are: model\.bias"):
            checkpoint.read_tensor("weight")
        with pytest.raises(CheckpointNotFound, match=r"no replicated value 'lr'; there are: optim\.betas"):
            checkpoint.read_value("lr")
        with pytest.raises(CheckpointNotFound, match=r"no value of rank 1 'lr'; there are: rng\.seed"):
            checkpoint.read_value("lr", rank=1)
        with pytest.raises(CheckpointNotFound, match="no rank 2; there are: 0, 1"):
            checkpoint.fragment(2)


def test_a_flipped_bit_is_found_by_whoever_reads_its_block(step: Path) -> None:
    flip(step / DATA_1, (step / DATA_1).stat().st_size - 1)
    with open_checkpoint(step) as checkpoint:
        assert checkpoint.read_tensor("model.bias").shape == (3,)
        with pytest.raises(
            CorruptCheckpoint, match=r"block 0 \(bytes 0 to \d+\) differs.*tensor model.weight.*__1_0"
        ):
            checkpoint.read_tensor("model.weight")


def test_a_truncated_or_missing_file_is_corruption(step: Path) -> None:
    (step / DATA_1).write_bytes((step / DATA_1).read_bytes()[:-1])
    with open_checkpoint(step) as checkpoint:
        with pytest.raises(CorruptCheckpoint, match="truncated: 4095 of 4096"):
            checkpoint.read_tensor("model.weight")
        (step / DATA_1).unlink()
        with pytest.raises(CorruptCheckpoint, match="missing"):
            checkpoint.read_tensor("model.weight")


def test_a_fragment_that_differs_from_the_manifest_is_refused(step: Path) -> None:
    flip(step / FRAGMENT_1, 20)
    with open_checkpoint(step) as checkpoint, pytest.raises(CorruptCheckpoint, match="differs"):
        checkpoint.fragment(1)
    (step / FRAGMENT_1).unlink()
    with open_checkpoint(step) as checkpoint, pytest.raises(CorruptCheckpoint, match="missing"):
        checkpoint.read_value("rng.seed", rank=1)


def test_deleted_while_reading_is_not_called_corrupt(step: Path) -> None:
    with open_checkpoint(step) as checkpoint:
        _ = checkpoint.tensors
        shutil.rmtree(step)
        with pytest.raises(CheckpointNotFound, match="deleted while reading"):
            checkpoint.read_tensor("model.weight")


def test_a_manifest_that_is_damaged_or_too_new_is_not_opened(step: Path) -> None:
    manifest = step / "manifest.json"
    good = manifest.read_bytes()
    manifest.write_bytes(good.replace(b"e0001-s000001", b"../../secret1"))
    with pytest.raises(CorruptCheckpoint, match="not an attempt id"):
        open_checkpoint(step)
    manifest.write_bytes(good.replace(b'"format_version":1', b'"format_version":2'))
    with pytest.raises(FormatTooNew, match=r"format version 2.*reads up to 1"):
        open_checkpoint(step)
    manifest.write_bytes(b"")
    with pytest.raises(CorruptCheckpoint):
        open_checkpoint(step)
