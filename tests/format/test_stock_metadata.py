"""`.metadata` of stock checkpoints is read without executing anything, whatever it holds."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt.errors import CheckpointError, CorruptCheckpoint, LoadError
from dcp_ckpt.format.boxes import Box
from dcp_ckpt.format.restricted_pickle import Record, Sealed, read_pickle
from dcp_ckpt.format.stock_metadata import StockMetadata, StockPlace, decode_stock_metadata


def decode(root: Any) -> StockMetadata:
    return decode_stock_metadata(pickle.dumps(root), path="ckpt/.metadata")


def metadata(**changes: Any) -> Metadata:
    """A valid description of one tensor `w` in two chunks, and one value `v`."""
    first, second = torch.Size([0, 0]), torch.Size([2, 0])
    chunks = [ChunkStorageMetadata(offsets, torch.Size([2, 3])) for offsets in (first, second)]
    fields: dict[str, Any] = {
        "state_dict_metadata": {
            "w": TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([4, 3]), chunks),
            "v": BytesStorageMetadata(),
        },
        "planner_data": {"w": ("w",), "v": ("v",)},
        "storage_data": {
            MetadataIndex("w", first, 0): _StorageInfo("__0_0.distcp", 0, 900),
            MetadataIndex("w", second, 1): _StorageInfo("__1_0.distcp", 64, 900),
            MetadataIndex("v"): _StorageInfo("__0_0.distcp", 900, 500),
        },
    }
    return Metadata(**fields | changes)


def test_tables_of_a_valid_file() -> None:
    found = decode(metadata())
    tensor = found.tensors["w"]
    assert (tensor.dtype, tensor.shape) == ("bfloat16", (4, 3))
    assert [chunk.box for chunk in tensor.chunks] == [Box((0, 0), (2, 3)), Box((2, 0), (2, 3))]
    assert tensor.chunks[1].place == StockPlace(file="__1_0.distcp", offset=64, num_bytes=900)
    assert found.values == {"v": StockPlace(file="__0_0.distcp", offset=900, num_bytes=500)}


def test_a_file_that_stock_dcp_wrote(tmp_path: Path) -> None:
    state = {"a": {"w": torch.ones(2, 3), "n": 5}, "groups": [{"lr": 0.1}, {"lr": torch.zeros(())}]}
    stock_save(state, checkpoint_id=tmp_path)
    found = decode_stock_metadata((tmp_path / ".metadata").read_bytes(), path="x")
    assert set(found.tensors) == {"a.w", "groups.1.lr"}
    assert found.paths["groups.1.lr"] == ("groups", 1, "lr")
    assert found.paths["groups.0.lr"] == ("groups", 0, "lr")
    assert found.values["a.n"].file == "__0_0.distcp"


def test_reading_needs_no_torch() -> None:
    code = "import sys, dcp_ckpt.format.stock_metadata, dcp_ckpt.load.stock; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


PLACES: dict[str, Callable[[Any], Any]] = {
    "the root": lambda bomb: bomb,
    "planner_data": lambda bomb: metadata(planner_data=bomb),
    "storage_meta": lambda bomb: metadata(storage_meta=bomb),
    "a key": lambda bomb: metadata(state_dict_metadata={bomb: BytesStorageMetadata()}),
    "a chunk": lambda bomb: metadata(storage_data={MetadataIndex("w"): bomb}),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_hostile_pickle_is_refused_by_name_and_executes_nothing(tmp_path: Path, place: str) -> None:
    victim = tmp_path / "made-by-the-pickle"
    data = pickle.dumps(PLACES[place](Bomb(victim)))
    with pytest.raises(LoadError, match=r"posix\.mkdir.*nothing of it was executed"):
        decode_stock_metadata(data, path="ckpt/.metadata")
    assert not victim.exists()
    pickle.loads(data)
    assert victim.exists(), "the pickle does no harm, so that it was not executed says nothing"


@pytest.mark.parametrize(
    "name", ["builtins.eval", "torch.load", "os.system", "torch.distributed.checkpoint.metadata.os"]
)
def test_only_listed_names_are_allowed(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    data = f"c{module}\n{attribute}\n(S'1'\ntR.".encode()
    with pytest.raises(LoadError, match=name):
        decode_stock_metadata(data, path="x")


def test_getattr_is_a_stand_in() -> None:
    # Some versions of Python pickle members of enumerations by getattr(class, name).
    data = b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\nMetadata\nS'mro'\ntR."
    with pytest.raises(CorruptCheckpoint, match="no Metadata object"):
        decode_stock_metadata(data, path="x")


def test_a_pickle_cannot_change_the_classes_that_stand_in() -> None:
    class StandIn(metaclass=Sealed):
        field = 0

    # BUILD on a class, with a state for its attributes.
    data = b"cm\nC\n(N(dS'field'\nI1\nstb."
    with pytest.raises(CorruptCheckpoint, match="cannot be changed by a pickle"):
        read_pickle(data, {("m", "C"): StandIn}, path="x")
    assert StandIn.field == 0
    with pytest.raises(CorruptCheckpoint):
        read_pickle(data, {("m", "C"): Record}, path="x")
    assert callable(Record.field)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x80\x04\x95", pickle.dumps(metadata())[:-9]])
def test_damaged_bytes_are_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptCheckpoint, match="not a valid pickle"):
        decode_stock_metadata(data, path="x")


def test_every_prefix_and_every_flipped_byte_is_refused_or_read() -> None:
    data = pickle.dumps(metadata())
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 0x15
        for hurt in (data[:position], bytes(flipped)):
            with contextlib.suppress(CheckpointError):  # any other error fails the test
                decode_stock_metadata(hurt, path="x")


@pytest.mark.parametrize("name", ["../w", "/etc/passwd", "a/../../w", "", ".", "a//b", "a\0b"])
def test_files_outside_of_the_checkpoint_are_refused(name: str) -> None:
    stored = metadata().storage_data | {MetadataIndex("v"): _StorageInfo(name, 0, 10)}
    with pytest.raises(CorruptCheckpoint, match="v is stored in"):
        decode(metadata(storage_data=stored))


def test_contradictions_are_corrupt() -> None:
    with pytest.raises(CorruptCheckpoint, match="does not say where v is stored"):
        decode(metadata(storage_data={k: v for k, v in metadata().storage_data.items() if k.fqn != "v"}))
    with pytest.raises(CorruptCheckpoint, match="has no storage_data"):
        decode(metadata(storage_data=None))
    negative = metadata().storage_data | {MetadataIndex("v"): _StorageInfo("f", -1, 10)}
    with pytest.raises(CorruptCheckpoint, match="v: -1 is no size or offset"):
        decode(metadata(storage_data=negative))


def test_extensions_are_refused_by_name() -> None:
    stored = metadata().storage_data | {MetadataIndex("v"): _StorageInfo("f", 0, 10, ["stream.zstd"])}
    with pytest.raises(LoadError, match=r"stream\.zstd"):
        decode(metadata(storage_data=stored))
