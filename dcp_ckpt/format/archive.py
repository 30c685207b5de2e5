"""Zip archives as `torch.save` writes them: stored, records in order, payloads laid in by somebody else.

Pure bytes, free of torch: what stands around the payloads. Zip64 fields appear where a size, an offset or the
number of records needs them. Called by `format.containers` and `format.torch_file`.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, replace
from zlib import crc32

__all__ = ["ArchiveWriter"]

_UINT16_MAX = 0xFFFF
_UINT32_MAX = 0xFFFFFFFF
_ROOT = "archive"
_UTF8_NAME = 0x0800
_CRC_FOLLOWS = 0x0008


@dataclass(frozen=True, kw_only=True)
class _Record:
    name: bytes
    flags: int
    crc: int
    size_bytes: int
    header_offset: int


class ArchiveWriter:
    """Makes the bytes of one archive, in pieces: `take` gives those up to the next payload."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._records: list[_Record] = []
        self._position = 0

    def add(self, name: str, data: bytes) -> None:
        """A whole record."""
        self._header(name, crc32(data), len(data), b"")
        self._write(data)

    def reserve(self, name: str, size_bytes: int, alignment_bytes: int, *, crc_follows: bool = False) -> None:
        """The head of a record whose `size_bytes` bytes follow from elsewhere.

        Args:
            alignment_bytes: those bytes start at a multiple of this, counted from the archive's start.
            crc_follows: `describe` gives their CRC-32 once they are known; else it is left at zero, which
                torch accepts and others do not.
        """
        fixed = 30 + len(f"{_ROOT}/{name}") + (20 if size_bytes >= _UINT32_MAX else 0)
        padding = -(self._position + fixed + 4) % alignment_bytes
        flags = _UTF8_NAME | (_CRC_FOLLOWS if crc_follows else 0)
        self._header(name, 0, size_bytes, b"FB" + struct.pack("<H", padding) + b"Z" * padding, flags=flags)
        self._position += size_bytes

    def describe(self, crc: int) -> None:
        """The CRC-32 of the record that was reserved last; stands right behind its bytes."""
        record = self._records[-1] = replace(self._records[-1], crc=crc)
        sizes = "QQ" if record.size_bytes >= _UINT32_MAX else "II"
        self._write(struct.pack(f"<II{sizes}", 0x08074B50, crc, record.size_bytes, record.size_bytes))

    def finish(self) -> None:
        """The directory of all records, which ends the archive."""
        directory_offset = self._position
        for record in self._records:
            self._write(_central_entry(record))
        directory_bytes = self._position - directory_offset
        count = len(self._records)
        if directory_offset >= _UINT32_MAX or count >= _UINT16_MAX:
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
                "<IHHHHIIH", 0x06054B50, 0, 0, min(count, _UINT16_MAX), min(count, _UINT16_MAX),
                directory_bytes, min(directory_offset, _UINT32_MAX), 0,
            )
        )  # fmt: skip

    def take(self) -> bytes:
        """What was written since the last call."""
        data = self._buffer.getvalue()
        self._buffer = io.BytesIO()
        return data

    def _header(self, name: str, crc: int, size_bytes: int, extra: bytes, *, flags: int = _UTF8_NAME) -> None:
        path = f"{_ROOT}/{name}".encode()
        shown = size_bytes
        if size_bytes >= _UINT32_MAX:
            extra = struct.pack("<HHQQ", 1, 16, size_bytes, size_bytes) + extra
            shown = _UINT32_MAX
        self._records.append(
            _Record(name=path, flags=flags, crc=crc, size_bytes=size_bytes, header_offset=self._position)
        )
        self._write(
            struct.pack(
                "<IHHHHHIIIHH", 0x04034B50, 45 if shown == _UINT32_MAX else 20, flags, 0, 0, 0,
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
            "<IHHHHHHIIIHHHHHII", 0x02014B50, version, version, record.flags, 0, 0, 0, record.crc,
            shown_size, shown_size, len(record.name), len(extra), 0, 0, 0, 0, shown_offset,
        )
        + record.name
        + extra
    )  # fmt: skip
