"""The safetensors format as its own library has it: dtypes, limits, the index."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from dcp_ckpt.format.dtypes import DTYPES
from dcp_ckpt.format.safetensors import (
    SAFETENSORS_DTYPES,
    header,
    is_model_file,
    model_index,
    payload_order,
    shard_name,
)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_dtypes_are_those_of_the_library(dtype: str) -> None:
    """The header that it writes is ours, also in its last byte; what it refuses we do not have."""
    tensor = torch.zeros(3, dtype=getattr(torch, dtype))
    if dtype not in SAFETENSORS_DTYPES:
        with pytest.raises(KeyError):
            save({"w": tensor})
        return
    ours = header([("w", dtype, (3,))])
    assert save({"w": tensor}, metadata={"format": "pt"}) == ours + bytes(tensor.nbytes)


def test_names_of_any_characters() -> None:
    tensors: list[tuple[str, str, tuple[int, ...]]] = [('a"\\ü\n', "int32", (1,)), ("日本", "uint8", ())]
    found = load(header(tensors) + b"\x05\x00\x00\x00\x07")
    assert {name: one.item() for name, one in found.items()} == {'a"\\ü\n': 5, "日本": 7}


def test_large_elements_come_first() -> None:
    dtypes = ["uint8", "float32", "int64", "bool", "bfloat16", "float64"]
    assert [dtypes[number] for number in payload_order(dtypes)] == [
        "int64", "float64", "float32", "bfloat16", "uint8", "bool",
    ]  # fmt: skip


def test_the_index() -> None:
    index: dict[str, Any] = json.loads(model_index({"b": shard_name(2, 2), "a": shard_name(1, 2)}, 12))
    assert index == {
        "metadata": {"total_size": 12},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }


def test_what_loaders_take_for_a_part_of_a_model() -> None:
    own = (
        "model.safetensors",
        shard_name(1, 3),
        shard_name(100_000, 100_001),
        "model.safetensors.index.json",
    )
    assert all(map(is_model_file, own))
    assert not any(map(is_model_file, ("config.json", "my-model.safetensors", "model.safetensors.bak")))
