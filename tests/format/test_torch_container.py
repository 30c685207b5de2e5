"""Where a tensor lies in a `torch.save` file, from headers alone."""

from __future__ import annotations

import io
import struct
import zipfile

import pytest
import torch

from dcp_ckpt.errors import CorruptCheckpoint, LoadError
from dcp_ckpt.format.containers import tensor_framing
from dcp_ckpt.format.dtypes import DTYPES
from dcp_ckpt.format.torch_container import ContainerWindows, MoreBytesNeeded, TensorPlace, locate_tensor


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def locate(data: bytes) -> TensorPlace:
    windows = ContainerWindows(len(data), what="w")
    windows.add(0, data)
    return locate_tensor(windows)


def elements(data: bytes, place: TensorPlace) -> torch.Tensor:
    """The tensor that a place describes, taken from the bytes."""
    content = torch.frombuffer(bytearray(data[place.first_byte :]), dtype=torch.uint8)
    item_bytes = DTYPES[place.dtype].item_bytes
    typed = content[: len(content) // item_bytes * item_bytes].view(getattr(torch, place.dtype))
    return typed.as_strided(place.sizes, place.strides)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def known(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    count = torch.Size(shape).numel() * DTYPES[dtype].item_bytes
    data = torch.arange(count, dtype=torch.uint8)
    if dtype == "bool":
        return (data % 2).bool().reshape(shape)
    return data.view(getattr(torch, dtype)).reshape(shape)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0, 3)])
def test_every_dtype_and_shape(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = known(dtype, shape)
    data = saved(tensor)
    place = locate(data)
    assert (place.dtype, place.sizes) == (dtype, shape)
    assert place.is_row_major
    if tensor.numel():
        assert bits(elements(data, place)) == bits(tensor)


BASE = torch.arange(24.0).reshape(4, 6)
VIEWS = {
    "transposed": BASE.T,
    "column slice of a larger storage": BASE[:, 1:5:2],
    "offset into a larger storage": BASE[2:],
    "overlapping windows": torch.arange(6.0).as_strided((4, 3), (1, 1)),
    "expanded": torch.arange(3.0).expand(4, 3),
    "a parameter": torch.nn.Parameter(BASE[1:, ::3]),
    "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_strided_places(view: str) -> None:
    data = saved(VIEWS[view])
    place = locate(data)
    assert bits(elements(data, place)) == bits(VIEWS[view].detach())
    assert place.is_row_major == VIEWS[view].is_contiguous()


def test_our_own_containers() -> None:
    framing = tensor_framing("bfloat16", (3, 5), 4096)
    data = framing.prefix + bytes(range(30)) + framing.suffix
    place = locate(data)
    assert place == TensorPlace(
        dtype="bfloat16", sizes=(3, 5), strides=(5, 1), first_byte=len(framing.prefix)
    )


def test_storage_alignment_of_the_writer() -> None:
    before = torch.utils.serialization.config.save.storage_alignment
    torch.utils.serialization.config.save.storage_alignment = 4096
    try:
        data = saved(BASE)
    finally:
        torch.utils.serialization.config.save.storage_alignment = before
    place = locate(data)
    assert place.first_byte % 4096 == 0
    assert bits(elements(data, place)) == bits(BASE)


def test_payload_is_never_asked_for() -> None:
    """Given no more than it asks for, the search reads a small part of a large container."""
    data = saved(torch.ones(1 << 20))
    windows = ContainerWindows(len(data), what="w")
    asked = 0
    while True:
        try:
            place = locate_tensor(windows)
            break
        except MoreBytesNeeded as more:
            windows.add(more.start, data[more.start : more.stop])
            asked += more.stop - more.start
    assert place.first_byte > 0
    assert asked < 4096


@pytest.mark.parametrize("size_bytes", [(1 << 32) + 8, (1 << 32) - 8])
def test_containers_around_four_gibibytes(size_bytes: int) -> None:
    """Zip64 headers, from the framing alone: the payload is a hole."""
    framing = tensor_framing("uint8", (size_bytes,), 64)
    windows = ContainerWindows(framing.container_bytes, what="w")
    windows.add(0, framing.prefix)
    windows.add(len(framing.prefix) + framing.payload_bytes, framing.suffix)
    assert locate_tensor(windows).first_byte == len(framing.prefix)


@pytest.mark.parametrize("size", [1 << 20, 1 << 33])
def test_zip64_fields_are_read_where_the_short_ones_are_full(size: int) -> None:
    """A directory as a writer may make it: every field of it in the zip64 extra field."""
    pickled = zipfile.ZipFile(io.BytesIO(saved(torch.zeros(size >> 10, dtype=torch.uint8)))).read(
        "archive/data.pkl"
    )
    names = [b"archive/data.pkl", b"archive/data/0"]
    sizes = [len(pickled), size]
    offsets, position = [], 0
    head = b""
    for name, length in zip(names, sizes, strict=True):
        offsets.append(position)
        header = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 45, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name
        head += header + (pickled if name.endswith(b"pkl") else b"")
        position += len(header) + length
    directory = b""
    for name, length, offset in zip(names, sizes, offsets, strict=True):
        extra = struct.pack("<HHQQQ", 1, 24, length, length, offset)
        full = 0xFFFFFFFF
        directory += struct.pack(
            "<4sHHHHHHIIIHHHHHII", b"PK\1\2", 45, 45, 0, 0, 0, 0, 0, full, full, len(name), len(extra),
            0, 0, 0, 0, full,
        ) + name + extra  # fmt: skip
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(directory), position)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, position + len(directory), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    tail = directory + end64 + locator + end
    windows = ContainerWindows(position + len(tail), what="w")
    windows.add(0, head)
    windows.add(position, tail)
    assert locate_tensor(windows).first_byte == len(head)


def test_what_is_no_container_is_corrupt() -> None:
    data = saved(BASE)
    for hurt, message in (
        (b"", "only 0 bytes"),
        (b"x" * 500, "does not end like one"),
        (data[:-3], "does not end like one"),
        (data[:40] + data[60:], "record|directory|data.pkl"),
        (saved(5), "holds no tensor"),
        (saved({"a": BASE}), "holds no tensor"),
    ):
        with pytest.raises(CorruptCheckpoint, match=message):
            locate(hurt)


def test_compressed_records_are_refused() -> None:
    source = zipfile.ZipFile(io.BytesIO(saved(torch.zeros(4096))))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    with pytest.raises(CorruptCheckpoint, match="compressed"):
        locate(buffer.getvalue())


def test_a_tensor_larger_than_its_storage_is_corrupt() -> None:
    data = bytearray(saved(torch.zeros(4, 4)))
    position = data.index(b"K\x04K\x04\x86")
    data[position + 1] = 9
    with pytest.raises(CorruptCheckpoint, match="does not fit"):
        locate(bytes(data))


def test_odd_tensors_are_refused_by_name() -> None:
    with pytest.raises(LoadError, match="conjugate"):
        locate(saved(torch.ones(2, dtype=torch.complex64).conj()))
    with pytest.raises(LoadError, match=r"not a plain tensor.*_rebuild_sparse_tensor"):
        locate(saved(torch.eye(3).to_sparse()))


def test_flipped_header_bytes_never_escape_as_other_errors() -> None:
    data = saved(torch.ones(2, 2))
    for position in range(len(data)):
        hurt = bytearray(data)
        hurt[position] ^= 0x33
        try:
            locate(bytes(hurt))
        except LoadError:
            continue
