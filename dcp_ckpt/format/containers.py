"""Containers: the bytes that make one chunk's payload a `torch.save` file of its own.

Built by hand and free of torch, so the framing is a pure function of dtype, sizes and alignment that does
not change with the installed torch (docs/format.md, section 4). What torch's reader asks of such
a file was taken from torch 2.13 (`torch/serialization.py`, `caffe2/serialize/inline_container.cc`): the
records `data.pkl`, `byteorder`, `data/0` and `version`; CRCs of payloads are not checked.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from zlib import crc32

from dcp_ckpt.format.dtypes import dtype_info

__all__ = ["SLAB_ALIGNMENT_BYTES", "Framing", "tensor_framing", "value_container"]

SLAB_ALIGNMENT_BYTES = 64

_UINT32_MAX = 0xFFFFFFFF
_ROOT = "archive"


@dataclass(frozen=True)
class Framing:
    """Bytes before and after a payload of `payload_bytes`."""

    prefix: bytes
    payload_bytes: int
    suffix: bytes

    @property
    def container_bytes(self) -> int:
        return len(self.prefix) + self.payload_bytes + len(self.suffix)


@dataclass(frozen=True)
class _Record:
    name: bytes
    crc: int
    size_bytes: int
    header_offset: int


@lru_cache(maxsize=4096)
def tensor_framing(dtype: str, sizes: tuple[int, ...], alignment_bytes: int) -> Framing:
    """The framing of a contiguous tensor.

    Args:
        dtype: torch's name, without `torch.`.
        sizes: the chunk's sizes in elements.
        alignment_bytes: the payload starts at a multiple of this, counted from the container's start.
    """
    payload_bytes = dtype_info(dtype).item_bytes * math.prod(sizes)
    archive = _Archive()
    archive.add("data.pkl", _tensor_pickle(dtype, sizes))
    archive.add("byteorder", b"little")
    archive.reserve("data/0", payload_bytes, alignment_bytes)
    prefix = archive.take()
    archive.add("version", b"3\n")
    archive.finish()
    return Framing(prefix, payload_bytes, archive.take())


def value_container(value: Any) -> bytes:
    """One Python value as a `torch.save` file, for stock readers."""
    archive = _Archive()
    archive.add("data.pkl", pickle.dumps(value, protocol=2))
    archive.add("byteorder", b"little")
    archive.add("version", b"3\n")
    archive.finish()
    return archive.take()


class _Archive:
    """Writes a stored (uncompressed) zip archive whose payload bytes may be left out."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._records: list[_Record] = []
        self._position = 0

    def add(self, name: str, data: bytes) -> None:
        self._header(name, crc32(data), len(data), b"")
        self._write(data)

    def reserve(self, name: str, size_bytes: int, alignment_bytes: int) -> None:
        """A record whose `size_bytes` payload bytes are laid in by somebody else."""
        fixed = 30 + len(f"{_ROOT}/{name}") + (20 if size_bytes >= _UINT32_MAX else 0)
        padding = -(self._position + fixed + 4) % alignment_bytes
        self._header(name, 0, size_bytes, b"FB" + struct.pack("<H", padding) + b"Z" * padding)
        self._position += size_bytes

    def finish(self) -> None:
        directory_offset = self._position
        for record in self._records:
            self._write(_central_entry(record))
        directory_bytes = self._position - directory_offset
        count = len(self._records)
        if directory_offset >= _UINT32_MAX:
            end64_offset = self._position
            self._write(
                struct.pack(
                    "<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count,
                    directory_bytes, directory_offset,
                )
            )  # fmt: skip
            self._write(struct.pack("<IIQI", 0x07064B50, 0, end64_offset, 1))
        self._write(
            struct.pack(
                "<IHHHHIIH", 0x06054B50, 0, 0, count, count,
                directory_bytes, min(directory_offset, _UINT32_MAX), 0,
            )
        )  # fmt: skip

    def take(self) -> bytes:
        """What was written since the last call."""
        data = self._buffer.getvalue()
        self._buffer = io.BytesIO()
        return data

    def _header(self, name: str, crc: int, size_bytes: int, extra: bytes) -> None:
        path = f"{_ROOT}/{name}".encode()
        shown = size_bytes
        if size_bytes >= _UINT32_MAX:
            extra = struct.pack("<HHQQ", 1, 16, size_bytes, size_bytes) + extra
            shown = _UINT32_MAX
        self._records.append(_Record(path, crc, size_bytes, self._position))
        self._write(
            struct.pack(
                "<IHHHHHIIIHH", 0x04034B50, 45 if shown == _UINT32_MAX else 20, 0x0800, 0, 0, 0,
                crc, shown, shown, len(path), len(extra),
            )
        )  # fmt: skip
        self._write(path + extra)

    def _write(self, data: bytes) -> None:
        self._buffer.write(data)
        self._position += len(data)


def _central_entry(record: _Record) -> bytes:
    size, offset = record.size_bytes, record.header_offset
    wide = [value for value in (size, size) if size >= _UINT32_MAX]
    wide += [offset] if offset >= _UINT32_MAX else []
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    version = 45 if wide else 20
    shown_size, shown_offset = min(size, _UINT32_MAX), min(offset, _UINT32_MAX)
    return (
        struct.pack(
            "<IHHHHHHIIIHHHHHII", 0x02014B50, version, version, 0x0800, 0, 0, 0, record.crc,
            shown_size, shown_size, len(record.name), len(extra), 0, 0, 0, 0, shown_offset,
        )
        + record.name
        + extra
    )  # fmt: skip


def _tensor_pickle(dtype: str, sizes: Sequence[int]) -> bytes:
    """The pickle stream of a contiguous tensor, opcode by opcode, as torch.save writes it (protocol 2)."""
    info = dtype_info(dtype)
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    num_elements = math.prod(sizes)
    legacy = info.storage_class is not None
    storage = f"torch\n{info.storage_class}" if legacy else "torch.storage\nUntypedStorage"
    storage_size = num_elements if legacy else num_elements * info.item_bytes
    rebuild = "_rebuild_tensor_v2" if legacy else "_rebuild_tensor_v3"
    parts = [
        pickle.PROTO + b"\x02",
        pickle.GLOBAL + f"torch._utils\n{rebuild}\n".encode(),
        pickle.MARK,
        pickle.MARK + _text("storage"),
        pickle.GLOBAL + f"{storage}\n".encode(),
        _text("0") + _text("cpu") + _integer(storage_size),
        pickle.TUPLE + pickle.BINPERSID,
        _integer(0) + _integers(sizes) + _integers(strides),
        pickle.NEWFALSE,
        pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE,
        b"" if legacy else pickle.GLOBAL + f"torch\n{dtype}\n".encode(),
        pickle.TUPLE + pickle.REDUCE + pickle.STOP,
    ]
    return b"".join(parts)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    encoded = value.to_bytes((value.bit_length() // 8) + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def _integers(values: Sequence[int]) -> bytes:
    return pickle.MARK + b"".join(map(_integer, values)) + pickle.TUPLE
