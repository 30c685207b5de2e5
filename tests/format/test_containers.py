"""Containers: what torch.load reads is the payload as it is; files beyond 4 GiB are described right."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcp_ckpt.errors import StateError
from dcp_ckpt.format.containers import SLAB_ALIGNMENT_BYTES, tensor_framing, value_container
from dcp_ckpt.format.dtypes import DTYPES

UINT32_MAX = 0xFFFFFFFF


def payload_of(dtype: str, count: int) -> bytes:
    """The bytes of `count` elements; booleans are 0 or 1."""
    size = count * DTYPES[dtype].item_bytes
    return bytes(i % (2 if dtype == "bool" else 251) for i in range(size))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(3, 5), (7,), (), (0, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("weights_only", [True, False])
def test_torch_loads_every_dtype(dtype, sizes, weights_only):
    count = torch.Size(sizes).numel()
    payload = payload_of(dtype, count)
    framing = tensor_framing(dtype, sizes, SLAB_ALIGNMENT_BYTES)
    data = framing.prefix + payload + framing.suffix
    assert len(data) == framing.container_bytes
    tensor = torch.load(io.BytesIO(data), weights_only=weights_only)
    assert tensor.dtype == getattr(torch, dtype)
    assert tuple(tensor.shape) == sizes
    assert tensor.is_contiguous()
    assert not tensor.requires_grad
    assert bytes(tensor.untyped_storage().tolist()) == payload


def test_the_format_knows_the_item_sizes_of_torch():
    for name, info in DTYPES.items():
        assert getattr(torch, name).itemsize == info.item_bytes
    with pytest.raises(StateError, match="qint8"):
        tensor_framing("qint8", (1,), SLAB_ALIGNMENT_BYTES)


@given(
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 2000), max_size=3).map(tuple),
    st.sampled_from([64, 4096]),
)
def test_the_payload_is_aligned_and_the_framing_repeats(dtype, sizes, alignment):
    framing = tensor_framing(dtype, sizes, alignment)
    assert len(framing.prefix) % alignment == 0
    tensor_framing.cache_clear()
    assert tensor_framing(dtype, sizes, alignment) == framing


@pytest.mark.parametrize(
    "size",
    [UINT32_MAX - 5000, UINT32_MAX - 1, UINT32_MAX, UINT32_MAX + 1, 5 << 30],
    ids=["offsets only", "below", "at", "above", "far above"],
)
def test_beyond_4_gib_the_records_are_where_zip64_says(tmp_path, size):
    """In a file of holes: only the framing and a few bytes of payload are written."""
    framing = tensor_framing("uint8", (size,), 4096)
    assert framing.payload_bytes == size
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write(framing.prefix + b"\x01")
        file.seek(len(framing.prefix) + size - 1)
        file.write(b"\x02" + framing.suffix)
    assert path.stat().st_size == framing.container_bytes
    with zipfile.ZipFile(path) as archive:
        names = [info.filename for info in archive.infolist()]
        assert names == ["archive/data.pkl", "archive/byteorder", "archive/data/0", "archive/version"]
        record = archive.getinfo("archive/data/0")
        assert (record.file_size, record.compress_size) == (size, size)
        assert archive.read("archive/version") == b"3\n"
        with archive.open("archive/data/0") as payload:
            assert payload.read(2) == b"\x01\x00"
    tensor = torch.load(path, mmap=True, weights_only=True)
    assert tensor.shape == (size,)
    assert (tensor[0].item(), tensor[1].item(), tensor[-1].item()) == (1, 0, 2)


@pytest.mark.parametrize("value", [0.001, (0.9, 0.999), {"a": [1, None]}, 2**70, "text", b"raw"], ids=repr)
def test_torch_loads_values(value: Any):
    assert torch.load(io.BytesIO(value_container(value)), weights_only=False) == value
