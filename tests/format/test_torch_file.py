"""A torch.save file of many tensors: what torch and other readers of zip archives see."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import pytest
import torch

from dcp_ckpt.format.torch_file import torch_file_framing

UINT32_MAX = 0xFFFFFFFF


def write(
    path: Path, tensors: Sequence[tuple[Sequence[str], str, tuple[int, ...]]], payloads: Sequence[bytes]
) -> int:
    """A file of these payloads, which may be shorter than stated: the rest are holes. Its stated length."""
    framing = torch_file_framing(tensors)
    with path.open("wb") as file:
        file.write(next(framing))
        for (_, dtype, sizes), payload in zip(tensors, payloads, strict=True):
            num_bytes = torch.Size(sizes).numel() * getattr(torch, dtype).itemsize
            start = file.tell()
            file.write(payload)
            file.seek(start + num_bytes)
            file.write(framing.send(crc32(payload)))
        return file.tell()


def test_lengths_do_not_depend_on_the_crc(tmp_path: Path) -> None:
    tensors = [(["a"], "uint8", (3,)), (["b"], "float32", ()), (["c"], "bool", (0, 2))]
    framing = torch_file_framing(tensors)
    lengths = [len(next(framing))] + [len(framing.send(0)) for _ in tensors]
    assert write(tmp_path / "x", tensors, [b"abc", bytes(4), b""]) == sum(lengths) + 7


def test_payloads_are_aligned_and_their_crc_is_right(tmp_path: Path) -> None:
    tensors = [([f"layer.{n}.ü"], "uint8", (n,)) for n in range(70)]
    write(tmp_path / "x", tensors, [bytes([n]) * n for n in range(70)])
    with zipfile.ZipFile(tmp_path / "x") as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            if "/data/" in info.filename:
                with archive.open(info) as record:
                    assert record._orig_compress_start % 64 == 0  # type: ignore[attr-defined]
    found = torch.load(tmp_path / "x", weights_only=True)
    assert {name: one.tolist() for name, one in found.items()} == {f"layer.{n}.ü": [n] * n for n in range(70)}


@pytest.mark.parametrize("size", [UINT32_MAX - 100, UINT32_MAX, 5 << 30], ids=["below", "at", "above"])
def test_beyond_4_gib(tmp_path: Path, size: int) -> None:
    """In a file of holes: the record itself, and one that starts behind it."""
    tensors = [(["large"], "uint8", (size,)), (["behind"], "int16", (2,))]
    write(tmp_path / "x", tensors, [b"\x01", b"\x02\x00\x03\x00"])
    with zipfile.ZipFile(tmp_path / "x") as archive:
        assert archive.getinfo("archive/data/0").file_size == size
        assert archive.read("archive/data/1") == b"\x02\x00\x03\x00"
    found = torch.load(tmp_path / "x", mmap=True, weights_only=True)
    assert (found["large"].shape, found["large"][0].item(), found["large"][-1].item()) == ((size,), 1, 0)
    assert found["behind"].tolist() == [2, 3]


@pytest.mark.slow
def test_more_records_than_two_bytes_count(tmp_path: Path) -> None:
    tensors = [([str(n)], "uint8", (1,)) for n in range(66_000)]
    write(tmp_path / "x", tensors, [bytes([n % 251]) for n in range(66_000)])
    with zipfile.ZipFile(tmp_path / "x") as archive:
        assert len(archive.infolist()) == 66_003
    found = torch.load(tmp_path / "x", weights_only=True)
    assert found["65999"].item() == 65_999 % 251
