"""`torch.save` containers of others: where in the file a tensor's bytes lie, found from headers alone.

Owns the zip archive and the pickle of one tensor inside of it. Pure: it is given windows of the container's
bytes, says which further ones it needs, and never needs payload. Nothing is unpickled but stand-ins. Written
against torch 2.13 (`torch/serialization.py`, `caffe2/serialize/inline_container.cc`) and the zip
specification; the containers of `dcp_ckpt.format.containers` are read as well.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from dcp_ckpt.errors import CorruptCheckpoint, LoadError
from dcp_ckpt.format.dtypes import DTYPES, MOST_DIMENSIONS
from dcp_ckpt.format.restricted_pickle import ForbiddenGlobal, Record, StandIns, read_pickle

__all__ = ["ContainerWindows", "MoreBytesNeeded", "TensorPlace", "locate_tensor", "read_value_pickle"]

_UINT16_MAX = 0xFFFF
_UINT32_MAX = 0xFFFFFFFF
_END_BYTES = 22
_LOCATOR_BYTES = 20
_END64_BYTES = 56


class MoreBytesNeeded(Exception):
    """Bytes `start` to `stop` of the container are needed to go on."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__(f"bytes {start} to {stop}")
        self.start = start
        self.stop = stop


class ContainerWindows:
    """The parts of one container that were read so far.

    Args:
        num_bytes: the container's whole length.
        what: the tensor or value and the file, for messages.
    """

    def __init__(self, num_bytes: int, *, what: str) -> None:
        self.num_bytes = num_bytes
        self.what = what
        self._windows: list[tuple[int, bytes]] = []

    def add(self, start: int, data: bytes) -> None:
        self._windows.append((start, data))

    def read(self, start: int, num_bytes: int) -> bytes:
        """`num_bytes` bytes from `start`.

        Raises:
            MoreBytesNeeded: they are not here.
            CorruptCheckpoint: they lie outside of the container.
        """
        stop = start + num_bytes
        if start < 0 or stop > self.num_bytes:
            raise self.damaged(f"a record at byte {start} lies outside of its {self.num_bytes} bytes")
        for first, data in self._windows:
            if first <= start and stop <= first + len(data):
                return data[start - first : stop - first]
        raise MoreBytesNeeded(start, stop)

    def damaged(self, problem: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self.what} is not a valid container: {problem}", phase="read")


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """A stored tensor: a strided view of raw bytes in the container.

    Args:
        first_byte: of the first element, from the container's start.
        strides: in elements.
    """

    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    first_byte: int

    @property
    def is_row_major(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True, kw_only=True)
class _ZipRecord:
    header_offset: int
    num_bytes: int
    is_compressed: bool


class _Rebuild(Record):
    pass


class _RebuildTyped(Record):
    pass


class _Parameter(Record):
    pass


class _Storage(Record):
    pass


_UNTYPED = "untyped"
_STAND_INS: StandIns = {
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _RebuildTyped,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch.storage", "UntypedStorage"): _UNTYPED,
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch", info.storage_class): name for name, info in DTYPES.items() if info.storage_class},
    **{("torch", name): name for name in DTYPES},
}


def locate_tensor(windows: ContainerWindows) -> TensorPlace:
    """Find the one tensor of a container.

    Raises:
        MoreBytesNeeded: read these, add them, and call again.
        CorruptCheckpoint: not a valid container of a tensor.
        LoadError: a tensor of a kind that is not plain bytes.
    """
    archive = _Archive(windows)
    byteorder = archive.find("byteorder")
    if byteorder is not None and archive.content(byteorder) != b"little":
        raise LoadError(f"{windows.what} is big-endian, which cannot be read here", phase="read")
    dtype, storage, numbers, extra = _tensor_of(windows, archive.content(archive.require("data.pkl")))
    offset, sizes, strides = numbers
    if extra:
        raise LoadError(
            f"{windows.what} is stored as a conjugate or negative view; save it materialised", phase="read"
        )
    record = archive.require(f"data/{storage}")
    item_bytes = DTYPES[dtype].item_bytes
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if all(sizes) and (last + 1) * item_bytes > record.num_bytes:
        raise windows.damaged(f"a tensor of sizes {sizes} does not fit into {record.num_bytes} bytes")
    first_byte = archive.content_start(record) + offset * item_bytes
    return TensorPlace(dtype=dtype, sizes=sizes, strides=strides, first_byte=first_byte)


def read_value_pickle(windows: ContainerWindows) -> bytes:
    """The pickle stream of a container that holds a Python value.

    Raises:
        MoreBytesNeeded, CorruptCheckpoint: as `locate_tensor`.
    """
    archive = _Archive(windows)
    return archive.content(archive.require("data.pkl"))


class _Archive:
    """The records of one container."""

    def __init__(self, windows: ContainerWindows) -> None:
        self._windows = windows
        self._records = self._directory()
        roots = {name.partition("/")[0] for name in self._records if name.endswith("/data.pkl")}
        if len(roots) != 1:
            raise windows.damaged("it holds no data.pkl")
        self._root = roots.pop()

    def find(self, name: str) -> _ZipRecord | None:
        return self._records.get(f"{self._root}/{name}")

    def require(self, name: str) -> _ZipRecord:
        record = self.find(name)
        if record is None:
            raise self._windows.damaged(f"it holds no {name}")
        return record

    def content(self, record: _ZipRecord) -> bytes:
        return self._windows.read(self.content_start(record), record.num_bytes)

    def content_start(self, record: _ZipRecord) -> int:
        """Where a record's bytes begin; its local header may be padded, so it has to be looked at."""
        if record.is_compressed:
            raise self._windows.damaged("a record is compressed")
        header = self._windows.read(record.header_offset, 30)
        if header[:4] != b"PK\x03\x04":
            raise self._windows.damaged(f"there is no record at byte {record.header_offset}")
        name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
        start: int = record.header_offset + 30 + name_bytes + extra_bytes
        if start + record.num_bytes > self._windows.num_bytes:
            raise self._windows.damaged(f"the record at byte {record.header_offset} is cut off")
        return start

    def _directory(self) -> dict[str, _ZipRecord]:
        count, num_bytes, offset = self._end_record()
        data = self._windows.read(offset, num_bytes)
        records: dict[str, _ZipRecord] = {}
        position = 0
        for _ in range(count):
            if data[position : position + 4] != b"PK\x01\x02" or position + 46 > len(data):
                raise self._windows.damaged("its directory is damaged")
            method, size, name_bytes, extra_bytes, comment_bytes, header_offset = _central_fields(
                data, position
            )
            names_end = position + 46 + name_bytes
            name = data[position + 46 : names_end].decode("utf-8", errors="replace")
            extra = data[names_end : names_end + extra_bytes]
            size, header_offset = _widened(data, position, extra, size, header_offset)
            records[name] = _ZipRecord(
                header_offset=header_offset, num_bytes=size, is_compressed=bool(method)
            )
            position = names_end + extra_bytes + comment_bytes
        return records

    def _end_record(self) -> tuple[int, int, int]:
        """Number of records, and length and offset of the directory."""
        windows = self._windows
        position = windows.num_bytes - _END_BYTES
        if position < 0:
            raise windows.damaged(f"it has only {windows.num_bytes} bytes")
        end = windows.read(position, _END_BYTES)
        if end[:4] != b"PK\x05\x06":
            raise windows.damaged("it does not end like one; torch.save writes zip archives")
        count, num_bytes, offset = struct.unpack_from("<HII", end, 10)
        if count != _UINT16_MAX and _UINT32_MAX not in (num_bytes, offset):
            return count, num_bytes, offset
        locator = windows.read(position - _LOCATOR_BYTES, _LOCATOR_BYTES)
        if locator[:4] != b"PK\x06\x07":
            raise windows.damaged("its zip64 locator is missing")
        (end64_offset,) = struct.unpack_from("<Q", locator, 8)
        end64 = windows.read(end64_offset, _END64_BYTES)
        if end64[:4] != b"PK\x06\x06":
            raise windows.damaged("its zip64 end record is missing")
        count, num_bytes, offset = struct.unpack_from("<QQQ", end64, 32)
        return count, num_bytes, offset


def _central_fields(data: bytes, position: int) -> tuple[int, int, int, int, int, int]:
    (method,) = struct.unpack_from("<H", data, position + 10)
    size, name_bytes, extra_bytes, comment_bytes = struct.unpack_from("<IHHH", data, position + 24)
    (header_offset,) = struct.unpack_from("<I", data, position + 42)
    return method, size, name_bytes, extra_bytes, comment_bytes, header_offset


def _widened(data: bytes, position: int, extra: bytes, size: int, header_offset: int) -> tuple[int, int]:
    """Size and header offset with what the zip64 extra field says in their place."""
    (compressed,) = struct.unpack_from("<I", data, position + 20)
    field = 0
    while field + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, field)
        if kind == 1:
            wide = list(struct.unpack_from(f"<{min(length, len(extra) - field - 4) // 8}Q", extra, field + 4))
            if size == _UINT32_MAX and wide:
                size = wide.pop(0)
            if compressed == _UINT32_MAX and wide:
                wide.pop(0)
            if header_offset == _UINT32_MAX and wide:
                header_offset = wide.pop(0)
        field += 4 + length
    return size, header_offset


def _tensor_of(
    windows: ContainerWindows, data: bytes
) -> tuple[str, str, tuple[int, tuple[int, ...], tuple[int, ...]], Any]:
    """Dtype, name of the storage, (offset, sizes, strides), and what is odd about the tensor."""
    try:
        root = read_pickle(data, _STAND_INS, path=windows.what, resolve_reference=_storage)
    except ForbiddenGlobal as error:
        raise LoadError(
            f"{windows.what} is not a plain tensor: it needs {error.name}; nothing was executed", phase="read"
        ) from error
    if isinstance(root, _Parameter) and root.args:
        root = root.args[0]
    args = root.args if isinstance(root, (_Rebuild, _RebuildTyped)) else ()
    is_typed = isinstance(root, _RebuildTyped)
    if len(args) < (7 if is_typed else 6) or not isinstance(args[0], _Storage):
        raise windows.damaged("it holds no tensor")
    token, key, _ = args[0].args
    dtype = args[6] if is_typed else token
    numbers = args[1], args[2], args[3]
    is_described = isinstance(dtype, str) and dtype in DTYPES and _are_counts((args[1],))
    if not is_described or not all(map(_are_counts, numbers[1:])):
        raise windows.damaged("its tensor has no dtype, sizes or strides")
    if len(numbers[1]) != len(numbers[2]):
        raise windows.damaged("its tensor has not as many strides as sizes")
    odd = args[7:] if is_typed else args[6:]
    return dtype, key, (numbers[0], tuple(numbers[1]), tuple(numbers[2])), any(odd)


def _are_counts(numbers: Any) -> bool:
    return (
        isinstance(numbers, (tuple, list))
        and len(numbers) <= MOST_DIMENSIONS
        and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
    )


def _storage(reference: Any) -> _Storage:
    """What a persistent id stands for: ("storage", type, name, device, number of elements)."""
    if isinstance(reference, tuple) and len(reference) == 5 and reference[0] == "storage":
        _, token, key, _, count = reference
        if isinstance(token, str) and isinstance(key, str) and type(count) is int:
            return _Storage(token, key, count)
    raise ValueError("a reference to something that is no storage")
