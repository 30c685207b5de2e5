"""A data stream writes exactly what it was given, digests every block, and never changes bytes in flight."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from dcp_ckpt.errors import StorageError
from dcp_ckpt.format.digests import BLOCK_BYTES, digest
from dcp_ckpt.save.data_stream import DataStream
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.memory import MemoryStorage


def numbers(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size_bytes", [4096, 8 << 20, (8 << 20) + 4096, 25 << 20])
def test_bytes_gaps_and_digests(tmp_path: Path, size_bytes: int) -> None:
    storage = open_storage(tmp_path)
    payload = numbers(size_bytes - 2048)
    writer = storage.open_writer("f", size_bytes=size_bytes, direct=True)
    with DataStream(writer, size_bytes=size_bytes) as stream:
        stream.put_bytes(b"head")
        stream.pad_to(1000)
        stream.put_payload(payload)
        stream.put_bytes(b"tail")
        entry = stream.finish()
    wanted = b"head".ljust(1000, b"\0") + payload.numpy().tobytes() + b"tail"
    wanted = wanted.ljust(size_bytes, b"\0")
    assert (tmp_path / "f").read_bytes() == wanted
    blocks = range(0, size_bytes, BLOCK_BYTES)
    assert entry.block_digests == "".join(digest(wanted[start : start + BLOCK_BYTES]) for start in blocks)


class Keeping:
    """A writer that sends what it was given only at the end, as an object store may."""

    segment_bytes = 1 << 20

    def __init__(self) -> None:
        self.parts: list[memoryview] = []
        self.sent = b""

    def write_segment(self, offset: int, data: memoryview) -> None:
        self.parts.append(data)

    def finish(self) -> None:
        self.sent = b"".join(self.parts)

    def abort(self) -> None:
        self.parts.clear()


def test_bytes_do_not_change_while_a_store_still_sends_them() -> None:
    payload = numbers(5 << 20)
    writer = Keeping()
    with DataStream(writer, size_bytes=5 << 20) as stream:
        stream.put_payload(payload)
        stream.finish()
    assert writer.sent == payload.numpy().tobytes()


def test_a_stream_that_is_left_early_leaves_nothing() -> None:
    storage = MemoryStorage()
    writer = storage.open_writer("f", size_bytes=8192, direct=False)
    with contextlib.suppress(ZeroDivisionError), DataStream(writer, size_bytes=8192) as stream:
        stream.put_bytes(b"x" * 5000)
        raise ZeroDivisionError
    with pytest.raises(StorageError):
        storage.read("f")
