"""The safetensors format: which dtypes it has, the header of a file, and the index of a sharded model.

Pure, and free of the library of that name, which tests read the files with. From the format's description
(https://huggingface.co/docs/safetensors, `safetensors` 0.8) and, for the index and the names of shards, from
`huggingface_hub.split_torch_state_dict_into_shards`. Called by `dcp_ckpt.ops.exporting`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence

from dcp_ckpt.format.dtypes import dtype_info

__all__ = [
    "INDEX_NAME",
    "MOST_HEADER_BYTES",
    "SAFETENSORS_DTYPES",
    "WHOLE_NAME",
    "header",
    "is_model_file",
    "model_index",
    "payload_order",
    "shard_name",
]

WHOLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

MOST_HEADER_BYTES = 100_000_000
"""Readers refuse a file with more."""

SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "complex64": "C64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "bool": "BOOL",
}
"""torch's name -> the format's. Those of `format.dtypes` that are missing here cannot be stored in it."""

_ALIGNMENT_BYTES = 8
_MODEL_FILE = re.compile(r"model(-[0-9]+-of-[0-9]+)?\.safetensors|model\.safetensors\.index\.json")


def payload_order(dtypes: Sequence[str]) -> list[int]:
    """The order in which the tensors of one file follow each other: large elements first.

    There are no gaps between them, so each starts at a multiple of its element's size that way.
    """
    return sorted(range(len(dtypes)), key=lambda number: -dtype_info(dtypes[number]).item_bytes)


def header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], aliases: Mapping[str, str] | None = None
) -> bytes:
    """What a file begins with; the tensors' bytes follow without gaps.

    Args:
        tensors: name, dtype and sizes of each, in the order of their bytes.
        aliases: further name of a tied tensor -> the name that it has here; only told, as by
            `safetensors.torch.save_model`.
    """
    # Every loader of transformers asks for the format: that the tensors are those of torch.
    entries: dict[str, object] = {"__metadata__": {**(aliases or {}), "format": "pt"}}
    end = 0
    for name, dtype, sizes in tensors:
        start, end = end, end + dtype_info(dtype).item_bytes * math.prod(sizes)
        entries[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(sizes),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def shard_name(number: int, count: int) -> str:
    """The name of shard `number`, from 1, of `count`."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def is_model_file(name: str) -> bool:
    """Whether loaders take a file of this name for a part of a model, so that it must not be left over."""
    return _MODEL_FILE.fullmatch(name) is not None


def model_index(files: Mapping[str, str], total_bytes: int) -> bytes:
    """The index of a sharded model.

    Args:
        files: name of each tensor -> name of its shard.
        total_bytes: of all tensors.
    """
    index = {"metadata": {"total_size": total_bytes}, "weight_map": files}
    return (json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
