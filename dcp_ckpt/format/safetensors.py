"""The safetensors format: which dtypes it has, the header of a file, and the index of a sharded model.

Pure, and free of the library of that name, which tests read the files with. From the format's description
(https://huggingface.co/docs/safetensors, `safetensors` 0.8) and, for the index and the names of shards, from
`huggingface_hub.split_torch_state_dict_into_shards`. Called by
`dcp_ckpt.ops.exporting` and `dcp_ckpt.ops.importing`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dcp_ckpt.errors import CorruptCheckpoint
from dcp_ckpt.format.dtypes import dtype_info, shape_problem

__all__ = [
    "INDEX_NAME",
    "MOST_HEADER_BYTES",
    "SAFETENSORS_DTYPES",
    "WHOLE_NAME",
    "SafetensorsHeader",
    "StoredTensor",
    "decode_header",
    "decode_index",
    "header",
    "header_bytes",
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

_TORCH_DTYPES = {stated: name for name, stated in SAFETENSORS_DTYPES.items()}
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


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a file: its dtype as torch calls it, and where its bytes begin in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True, kw_only=True)
class SafetensorsHeader:
    """What the header of one file says.

    Args:
        tensors: in the order of their bytes.
        unknown: name -> dtype, of those that cannot be stored here.
        aliases: further name of a tied tensor -> the name that it has here.
    """

    tensors: tuple[StoredTensor, ...]
    unknown: Mapping[str, str]
    aliases: Mapping[str, str]


def header_bytes(start: bytes) -> int:
    """The length of the header, which the first eight bytes of a file say."""
    return int.from_bytes(start, "little")


def decode_header(text: bytes, *, size_bytes: int, path: str) -> SafetensorsHeader:
    """Read a header and check that its tensors lie in the file, each in a place of its size.

    Args:
        text: what follows the first eight bytes.
        size_bytes: of the file.
        path: named in errors.

    Raises:
        CorruptCheckpoint: it is damaged, or contradicts itself.
    """
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        known: dict[str, Any] = {}
        unknown: dict[str, Any] = {}
        for name, entry in entries.items():
            (known if entry["dtype"] in _TORCH_DTYPES else unknown)[name] = entry
        tensors = [
            _stored(name, entry, 8 + len(text), size_bytes - 8 - len(text)) for name, entry in known.items()
        ]
        aliases = {alias: name for alias, name in metadata.items() if name in known and alias not in entries}
        others = {name: str(entry["dtype"]) for name, entry in unknown.items()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"not a safetensors file: {error}", phase="read", path=path) from error
    tensors.sort(key=lambda tensor: tensor.start)
    return SafetensorsHeader(tensors=tuple(tensors), unknown=others, aliases=aliases)


def decode_index(data: bytes, *, path: str) -> dict[str, str]:
    """Name of each tensor -> its shard, a file beside the index.

    Raises:
        CorruptCheckpoint: it is damaged, or names a file elsewhere.
    """
    try:
        weight_map = dict(json.loads(data)["weight_map"])
        names = [*weight_map.keys(), *weight_map.values()]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CorruptCheckpoint(f"not the index of a model: {error}", phase="read", path=path) from error
    if not all(isinstance(name, str) for name in names):
        raise CorruptCheckpoint("not the index of a model: a name is no text", phase="read", path=path)
    for file in weight_map.values():
        if "/" in file or "\\" in file or "\0" in file or file in ("", ".", ".."):
            raise CorruptCheckpoint(
                f"it names {file!r:.80}, which is not a file beside it", phase="read", path=path
            )
    return weight_map


def _stored(name: str, entry: dict[str, Any], start: int, num_bytes: int) -> StoredTensor:
    """One tensor, checked.

    Args:
        start: where the tensors' bytes begin in the file.
        num_bytes: how many these are.
    """
    dtype = _TORCH_DTYPES[entry["dtype"]]
    shape = tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError(f"{name} has sizes or offsets that are none")
    if problem := shape_problem(dtype, shape):
        raise ValueError(f"{name}: {problem}")
    if last > num_bytes or last - first != dtype_info(dtype).item_bytes * math.prod(shape):
        raise ValueError(f"{name} does not lie in its place: bytes {first} to {last} of {num_bytes}")
    name.encode()
    return StoredTensor(name=name, dtype=dtype, shape=shape, start=start + first)
