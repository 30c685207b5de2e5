"""Stock DCP directories load like ours: every kind of chunk, and a clear word for whatever cannot be read."""

from __future__ import annotations

import io
import pickle
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt import LoadReport, load_checkpoint
from dcp_ckpt.errors import CheckpointNotFound, CorruptCheckpoint, LoadError, StateMismatch
from dcp_ckpt.format.boxes import Box
from dcp_ckpt.load.fill import fill
from dcp_ckpt.load.read_plan import Target
from dcp_ckpt.load.stock import STOCK_UNVERIFIED, open_stock
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.metered import MeteredStorage

DATA = "__0_0.distcp"


def load(path: Path, state: dict[str, Any]) -> LoadReport:
    report = load_checkpoint(path, state)
    assert report is not None
    return report


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


TENSORS = {
    "matrix": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "scalar": torch.tensor(7),
    "flag": torch.tensor(True),
    "empty": torch.zeros(0, 3),
    "bf16": torch.arange(7).bfloat16(),
    "fp8": torch.arange(9).to(torch.float8_e4m3fn),
    "complex": torch.randn(2, 2, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)),
    "large": torch.arange(300_000, dtype=torch.int64).reshape(3, -1),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "columns": torch.arange(40.0).reshape(4, 10)[:, 2:7:2],
    "expanded": torch.arange(3.0).expand(4, 3),
    "channels_last": torch.arange(48.0).reshape(2, 2, 3, 4).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("per_file", [True, False])
def test_every_kind_of_tensor(tmp_path: Path, per_file: bool) -> None:
    writer = FileSystemWriter(tmp_path / "c", single_file_per_rank=per_file, thread_count=2)
    stock_save({"t": TENSORS}, storage_writer=writer)
    target = {"t": {name: torch.zeros_like(tensor).contiguous() for name, tensor in TENSORS.items()}}
    report = load(tmp_path / "c", target)
    assert [name for name, t in TENSORS.items() if not same_bits(target["t"][name], t)] == []
    assert report.unverified == (STOCK_UNVERIFIED,)
    assert STOCK_UNVERIFIED in str(report)


def write_chunks(
    directory: Path, chunks: dict[tuple[int, ...], torch.Tensor], shape: tuple[int, ...]
) -> None:
    """A stock checkpoint of one tensor `w`, its chunks saved as they are: views with their whole storages."""
    directory.mkdir()
    data = b""
    stored = {}
    listed = []
    for number, (offsets, chunk) in enumerate(chunks.items()):
        buffer = io.BytesIO()
        torch.save(chunk, buffer)
        place = _StorageInfo(DATA, len(data), buffer.tell())
        data += buffer.getvalue()
        stored[MetadataIndex("w", offsets, number)] = place
        listed.append(ChunkStorageMetadata(torch.Size(offsets), chunk.shape))
    (directory / DATA).write_bytes(data)
    first = next(iter(chunks.values()))
    described = TensorStorageMetadata(TensorProperties(first.dtype), torch.Size(shape), listed)
    metadata = Metadata({"w": described}, planner_data={"w": ("w",)}, storage_data=stored)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def test_views_whose_storages_are_larger_and_overlap(tmp_path: Path) -> None:
    storage = torch.arange(60, dtype=torch.int16)
    chunks: dict[tuple[int, ...], torch.Tensor] = {
        (0, 0): storage.as_strided((3, 4), (2, 1), 5),
        (3, 0): storage.as_strided((2, 4), (0, 3), 1),
        (0, 4): storage.as_strided((5, 2), (1, 11), 20),
    }
    write_chunks(tmp_path / "c", chunks, (5, 6))
    whole = torch.zeros(5, 6, dtype=torch.int16)
    for (row, column), chunk in chunks.items():
        whole[row : row + chunk.shape[0], column : column + chunk.shape[1]] = chunk
    target = {"w": torch.zeros_like(whole)}
    load(tmp_path / "c", target)
    assert torch.equal(target["w"], whole)


@pytest.mark.parametrize("strides", [(4, 1), (1, 5), (0, 1)])
def test_a_part_of_a_chunk(tmp_path: Path, strides: tuple[int, int]) -> None:
    chunk = torch.arange(40.0).as_strided((5, 4), strides, 3)
    write_chunks(tmp_path / "c", {(0, 0): chunk}, (5, 4))
    source = open_stock(open_storage(tmp_path), "c")
    part = torch.zeros(2, 3)
    fill(source, {"w": Target(local=part, box=Box((2, 1), (2, 3)))}, verify=True, concurrency=1)
    assert torch.equal(part, chunk[2:4, 1:4])


def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    wanted, other = torch.arange(1 << 16), torch.zeros(1 << 21)
    stock_save({"a": other, "b": wanted, "c": other}, checkpoint_id=tmp_path / "c")
    storage = MeteredStorage(open_storage(tmp_path))
    source = open_stock(storage, "c")
    target = torch.zeros_like(wanted)
    fill(source, {"b": Target(local=target, box=Box.whole((1 << 16,)))}, verify=True, concurrency=1)
    assert torch.equal(target, wanted)
    assert storage.count("read_ranges").num_bytes < 1.05 * wanted.nbytes + 20_000


VALUES: dict[str, Any] = {
    "betas": (0.9, 0.999),
    "big": 2**70,
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"ab"),
    "complex": 1 - 2j,
    "counter": (Counter("aab"),),
    "empty": [],
    "frozen": frozenset({1}),
    "none": None,
    "set": {1, 2},
    "text": "\u00e9",
    "tuple": (1, ("a", [2])),
}


def test_values(tmp_path: Path) -> None:
    stock_save({"v": VALUES}, checkpoint_id=tmp_path / "c")
    target = {"v": dict.fromkeys(VALUES)}
    load(tmp_path / "c", target)
    assert target["v"] == VALUES
    assert [type(value) for value in target["v"].values()] == [type(value) for value in VALUES.values()]


def test_tensors_inside_of_values(tmp_path: Path) -> None:
    stock_save({"pair": (1, torch.ones(2))}, checkpoint_id=tmp_path / "c")
    target: dict[str, Any] = {"pair": None}
    load(tmp_path / "c", target)
    assert target["pair"][0] == 1
    assert torch.equal(target["pair"][1], torch.ones(2))


class Custom:
    """A class that only executing a pickle restores."""

    def __init__(self) -> None:
        self.restored = True


def test_a_value_that_only_a_pickle_restores_is_named_and_never_executed(tmp_path: Path) -> None:
    stock_save({"good": 1, "bad": Custom(), "w": torch.ones(2)}, checkpoint_id=tmp_path / "c")
    with pytest.raises(StateMismatch, match=r"bad: cannot be read: it needs .*Custom"):
        load(tmp_path / "c", {"good": 0, "bad": None, "w": torch.zeros(2)})
    target: dict[str, Any] = {"good": 0, "w": torch.zeros(2)}
    report = load(tmp_path / "c", target)
    assert target["good"] == 1
    assert any("bad was not read" in note and "Custom" in note for note in report.notes)


def test_nested_state_with_lists_and_integer_keys(tmp_path: Path) -> None:
    state = {
        "list": [{"x": 1, "t": torch.arange(2)}, {"y": [1, 2]}, {}],
        "by_int": {3: {"a": torch.ones(2)}, 7: 5},
        "empty": {},
        "ordered": OrderedDict(b=1, a=2),
        "deep": {"a": {"b": [torch.zeros(1), 2]}},
    }
    stock_save(state, checkpoint_id=tmp_path / "c")
    target: dict[str, Any] = {
        "list": [{"x": 0, "t": torch.zeros(2, dtype=torch.int64)}, {"y": []}, {}],
        "by_int": {3: {"a": torch.zeros(2)}, 7: 0},
        "empty": {},
        "ordered": OrderedDict(b=0, a=0),
        "deep": {"a": {"b": [torch.ones(1), 0]}},
    }
    load(tmp_path / "c", target)
    assert torch.equal(target["list"][0].pop("t"), torch.arange(2))
    assert target["list"] == [{"x": 1}, {"y": [1, 2]}, {}]
    assert torch.equal(target["by_int"][3]["a"], torch.ones(2))
    assert target["by_int"][7] == 5
    assert target["empty"] == {}
    assert target["ordered"] == OrderedDict(b=1, a=2)
    assert type(target["ordered"]) is OrderedDict
    assert torch.equal(target["deep"]["a"]["b"][0], torch.zeros(1))


@pytest.mark.parametrize(
    ("directory", "step"), [("step-00000120", 120), ("global_step7", 7), ("checkpoint-500", 500), ("e3", 0)]
)
def test_the_step_is_that_of_the_directory_or_said_to_be_unknown(
    tmp_path: Path, directory: str, step: int
) -> None:
    stock_save({"a": 1}, checkpoint_id=tmp_path / directory)
    report = load(tmp_path / directory, {"a": 0})
    assert (report.step, report.epoch, report.saved_world_size) == (step, 0, 0)
    assert any("does not say its step" in note for note in report.notes) == (step == 0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    stock_save({"a": torch.arange(100_000), "b": torch.ones(3), "v": 1}, checkpoint_id=tmp_path / "c")
    return tmp_path / "c"


def target() -> dict[str, Any]:
    return {"a": torch.zeros(100_000, dtype=torch.int64), "b": torch.zeros(3), "v": 0}


def test_a_missing_file_is_corrupt_and_named(saved: Path) -> None:
    (saved / DATA).unlink()
    with pytest.raises(CorruptCheckpoint, match=rf"missing.*{DATA}"):
        load(saved, target())


def test_a_short_file_is_corrupt_and_named(saved: Path) -> None:
    data = (saved / DATA).read_bytes()
    (saved / DATA).write_bytes(data[:-100])
    with pytest.raises(CorruptCheckpoint, match=rf"truncated: {len(data) - 100} of at least.*{DATA}"):
        load(saved, target())


def test_a_wrong_container_is_corrupt_and_names_tensor_and_file(saved: Path) -> None:
    metadata = open_stock(open_storage(saved.parent), "c").metadata
    place = metadata.tensors["a"].chunks[0].place
    data = bytearray((saved / DATA).read_bytes())
    end = place.offset + place.num_bytes
    data[end - 700 : end] = bytes(700)
    (saved / DATA).write_bytes(data)
    live = target()
    with pytest.raises(CorruptCheckpoint, match=rf"a in {DATA} is not a valid container"):
        load(saved, live)
    assert live["v"] == 0


def test_a_container_of_another_tensor_is_corrupt(tmp_path: Path) -> None:
    write_chunks(tmp_path / "c", {(0,): torch.zeros(4)}, (4,))
    other = tmp_path / "d"
    write_chunks(other, {(0,): torch.zeros(2, 2)}, (2, 2))
    (tmp_path / "c" / DATA).write_bytes((other / DATA).read_bytes())
    with pytest.raises(
        CorruptCheckpoint, match=r"w is float32 of sizes \[4\] in .metadata, and float32 of sizes"
    ):
        load(tmp_path / "c", {"w": torch.zeros(4)})


def test_a_gap_between_chunks_is_corrupt(tmp_path: Path) -> None:
    write_chunks(tmp_path / "c", {(0,): torch.zeros(4)}, (6,))
    with pytest.raises(
        CorruptCheckpoint, match="w: the stored chunks do not make it up: chunks hold 4 of 6 elements"
    ):
        load(tmp_path / "c", {"w": torch.zeros(6)})


def test_what_does_not_fit_is_reported_before_anything_changes(saved: Path) -> None:
    live = {"a": torch.zeros(5, dtype=torch.int64), "b": torch.zeros(3, dtype=torch.float64), "v": 0, "x": 1}
    with pytest.raises(StateMismatch) as caught:
        load(saved, live)
    assert all(text in str(caught.value) for text in ("a: checkpoint [100000]", "b: checkpoint", "x: "))
    assert live["v"] == 0


def test_a_hostile_metadata_is_a_load_error(saved: Path) -> None:
    (saved / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(LoadError, match=r"os\.system.*nothing of it was executed"):
        load(saved, target())


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with pytest.raises(CheckpointNotFound, match=r"no manifest\.json, nor a \.metadata"):
        load(tmp_path / "c", {"a": 1})
