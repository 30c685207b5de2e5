"""Pickles of stock checkpoints that somebody made to hurt: nothing of them runs, and memory stays small."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dcp_ckpt.errors import CorruptCheckpoint, LoadError
from dcp_ckpt.format.stock_metadata import decode_stock_metadata
from dcp_ckpt.format.torch_container import ContainerWindows, locate_tensor
from dcp_ckpt.load.stock_values import UnreadableValue, decode_container

PATH = "ckpt/.metadata"


def metadata(
    *,
    size: Any = (4,),
    offset: Any = 0,
    length: Any = 100,
    file: Any = "f.distcp",
    sizes: Any = (4,),
) -> Metadata:
    """One tensor and one value, with hostile parts."""
    chunk = ChunkStorageMetadata(offsets=torch.Size([0]), sizes=sizes)
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.float32), size, [chunk])
    return Metadata(
        state_dict_metadata={"w": tensor, "v": BytesStorageMetadata()},
        planner_data={"w": ("w",), "v": ("v",)},
        storage_data={
            MetadataIndex("w", torch.Size([0])): _StorageInfo(file, offset, length),
            MetadataIndex("v"): _StorageInfo(file, 0, 10),
        },
    )


def decode(data: bytes) -> Any:
    return decode_stock_metadata(data, path=PATH)


def long_string(length: int) -> bytes:
    return b"\x8d" + struct.pack("<Q", length) + b"x"


BOMBS = {
    "a memo of 2^32 places": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a memo of 2^28 places": b"\x80\x02Nr\xff\xff\xff\x0f.",
    "a memo place in decimals": b"Np4294967295\n.",
    "a memo place of many decimals": b"Np" + b"9" * 5000 + b"\n.",
    "bytes of 2^63": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"x.",
    "bytes of 2^40": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "a bytearray of 2^40": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "a string of 2^62": b"\x80\x04" + long_string(2**62) + b".",
    "a frame of 2^62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "a number of 2^31 bytes": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"1.",
    "a number of negative length": b"\x80\x02\x8b" + struct.pack("<i", -1) + b"1.",
    "a number of many decimals": b"I" + b"9" * 100_000 + b"\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "a buffer out of band": b"\x80\x05\x97.",
    "a memo place that is not there": b"\x80\x02j\xff\xff\xff\xff.",
    "a protocol that is not there": b"\x80\xffN.",
    "no end": b"\x80\x04N",
    "an empty stack": b"\x80\x04.",
    "nothing": b"",
    "lists in lists": b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",
    "tuples in tuples": b"\x80\x02)" + b"\x85" * 20_000 + b".",
    "a name that is endless": b"\x80\x02c" + b"a" * 100_000 + b"\nb\n.",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_in_little_memory(data):
    tracemalloc.start()
    try:
        with pytest.raises(LoadError) as caught:
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.path == PATH


class Evil:
    """Pickled as a call of some function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_call_is_made(protocol, tmp_path):
    target = str(tmp_path / "made")
    for evil in (
        Evil(os.mkdir, target),
        Evil(eval, f"__import__('os').mkdir({target!r})"),
        Evil(exec, f"__import__('os').mkdir({target!r})"),
        Evil(subprocess.Popen, ["mkdir", target]),
        Evil(open, target, "w"),
        Evil(map, os.mkdir, [target]),
        Evil(__import__, "antigravity"),
    ):
        for state in (evil, [evil], {"x": evil}):
            with pytest.raises(LoadError, match="nothing of it was executed"):
                decode(pickle.dumps(state, protocol=protocol))
    assert list(tmp_path.iterdir()) == []


def test_building_and_instances_change_no_class_of_ours():
    for data in (
        # A class of ours with a new attribute, by BUILD on the class itself.
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n}X\x04\x00\x00\x00argsK\x01sb.",
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x04\x00\x00\x00argsK\x01s\x86b.",
        b"\x80\x02ccollections\nOrderedDict\nN}X\x05\x00\x00\x00itemsK\x01s\x86b.",
        b"\x80\x04cbuiltins\ngetattr\n(X\x01\x00\x00\x00aX\x09\x00\x00\x00__class__tR.",
    ):
        with pytest.raises(LoadError):
            decode(data)
    assert decode(pickle.dumps(metadata())).tensors["w"].shape == (4,)


HOSTILE_PARTS: list[dict[str, Any]] = [
    {"size": torch.Size([2**62])},
    {"size": (2**70,)},
    {"size": (-1,)},
    {"size": (2**40, 2**40)},
    {"size": (True,)},
    {"size": (1.0,)},
    {"size": "4"},
    {"sizes": (2**70,)},
    {"sizes": (1,) * 100},
    {"offset": 2**63},
    {"offset": -1},
    {"offset": True},
    {"length": 10**5000},
    {"length": "100"},
    {"file": "../f"},
    {"file": "/etc/passwd"},
    {"file": "a\\..\\b"},
    {"file": "a\0b"},
    {"file": "\ud800"},
    {"file": ""},
    {"file": b"f"},
    {"file": "x" * 100_000 + "/.."},
]


def test_hostile_numbers_and_names_are_refused_by_name():
    for changes in HOSTILE_PARTS:
        with pytest.raises(CorruptCheckpoint, match="w") as caught:
            decode(pickle.dumps(metadata(**changes)))
        assert len(str(caught.value)) < 1000


def test_what_is_endless_to_show_is_not_shown():
    """Each level is the one below twice: to print it takes 2^60 steps."""
    endless: Any = ("x",)
    for _ in range(60):
        endless = (endless, endless)
    for changes in ({"size": [endless]}, {"offset": endless}, {"file": endless}, {"length": [endless]}):
        with pytest.raises(CorruptCheckpoint):
            decode(pickle.dumps(metadata(**changes)))


VALID = pickle.dumps(metadata())


@settings(max_examples=300)
@given(
    st.binary(max_size=80)
    | st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4).map(
        lambda changes: bytes(dict(changes).get(index, byte) for index, byte in enumerate(VALID))
    )
    | st.integers(0, len(VALID)).map(lambda end: VALID[:end])
)
def test_fuzzed_metadata_is_read_or_refused(data):
    try:
        found = decode(data)
    except LoadError as error:
        failure: LoadError | None = error
    else:
        failure = None
        assert set(found.paths) == {*found.tensors, *found.values}
    assert failure is None or failure.path == PATH


def containers() -> list[bytes]:
    made = []
    for value in (torch.arange(6.0).reshape(2, 3), {"lr": 0.1, "betas": (0.9, 0.999), "t": torch.ones(2)}):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        made.append(buffer.getvalue())
    return made


@pytest.mark.parametrize("number", [0, 1], ids=["tensor", "value"])
def test_fuzzed_containers_are_read_or_refused(number):
    whole = containers()[number]

    @settings(max_examples=150)
    @given(
        st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=6).map(
            lambda changes: bytes(dict(changes).get(index, byte) for index, byte in enumerate(whole))
        )
        | st.integers(0, len(whole)).map(lambda end: whole[:end])
        | st.binary(max_size=100)
    )
    def check(data: bytes) -> None:
        windows = ContainerWindows(len(data), what="w in f")
        windows.add(0, data)
        # All bytes are here, so it never asks for more.
        with suppress(LoadError):
            locate_tensor(windows)
        with suppress(LoadError, UnreadableValue):
            decode_container(data, what="v in f")

    check()
