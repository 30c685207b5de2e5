"""`.metadata` of stock DCP checkpoints: the pickle of torch's `Metadata`, read without executing anything.

Owns which names such a file may hold and what they mean here. Must not know storage. The classes are those of
torch 2.13 (`torch/distributed/checkpoint/metadata.py`, `filesystem.py`), of which only the names and fields
are used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dcp_ckpt.errors import CorruptCheckpoint, LoadError
from dcp_ckpt.format.boxes import Box
from dcp_ckpt.format.dtypes import DTYPES, shape_problem
from dcp_ckpt.format.restricted_pickle import ForbiddenGlobal, Record, StandIns, read_pickle

__all__ = [
    "DCP_SAVE_TAG",
    "FlatPath",
    "StockChunk",
    "StockMetadata",
    "StockPlace",
    "StockTensor",
    "decode_stock_metadata",
]

DCP_SAVE_TAG = "dcp.save"
"""The tag of checkpoints of our format whose ranks nobody knows: plain `dcp.save`, an import or an average
made them. Their state is flat, as DCP flattens it."""

FlatPath = tuple[str | int, ...]
"""Where DCP found a leaf in the nested state: dictionary keys as strings, list positions as integers."""


@dataclass(frozen=True, kw_only=True)
class StockPlace:
    """One container: `num_bytes` bytes from `offset` of a file below the checkpoint's directory."""

    file: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class StockChunk:
    """One stored box of a tensor."""

    box: Box
    place: StockPlace


@dataclass(frozen=True, kw_only=True)
class StockTensor:
    """One tensor; chunks without elements are left out."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[StockChunk, ...]


@dataclass(frozen=True, kw_only=True)
class StockMetadata:
    """Everything that `.metadata` says, by DCP's flattened names.

    Args:
        values: the containers of everything that is not a tensor.
        paths: of every tensor and value.
    """

    tensors: Mapping[str, StockTensor]
    values: Mapping[str, StockPlace]
    paths: Mapping[str, FlatPath]


class _Metadata(Record):
    pass


class _TensorMetadata(Record):
    pass


class _BytesMetadata(Record):
    pass


class _Chunk(Record):
    pass


class _Properties(Record):
    pass


class _Index(Record):
    pass


class _Place(Record):
    pass


_MODULE = "torch.distributed.checkpoint.metadata"
_STAND_INS: StandIns = {
    (_MODULE, "Metadata"): _Metadata,
    (_MODULE, "TensorStorageMetadata"): _TensorMetadata,
    (_MODULE, "BytesStorageMetadata"): _BytesMetadata,
    (_MODULE, "ChunkStorageMetadata"): _Chunk,
    (_MODULE, "TensorProperties"): _Properties,
    (_MODULE, "MetadataIndex"): _Index,
    (_MODULE, "StorageMeta"): Record,
    (_MODULE, "_MEM_FORMAT_ENCODING"): Record,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Place,
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): Record,
    ("torch.serialization", "_get_layout"): Record,
    # How some versions of Python pickle the member of an enumeration: getattr(class, name).
    ("builtins", "getattr"): Record,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    # The path that was saved to, in the provenance of every file; never looked at.
    **{
        ("pathlib", name): Record for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
    **{("pathlib._local", name): Record for name in ("PosixPath", "PurePosixPath")},
    **{("torch", name): name for name in DTYPES},
}


def decode_stock_metadata(data: bytes, *, path: str) -> StockMetadata:
    """Read one `.metadata` file.

    Args:
        path: named in errors.

    Raises:
        LoadError: it names a class that no stock checkpoint needs, or was written through an extension.
        CorruptCheckpoint: it is damaged, or contradicts itself.
    """
    try:
        root = read_pickle(data, _STAND_INS, path=path)
        return _read(root)
    except ForbiddenGlobal as error:
        raise LoadError(
            f"this .metadata names {error.name}, which is not part of a stock DCP checkpoint; nothing of it "
            "was executed. If you trust where it comes from, load it with torch.distributed.checkpoint and "
            "save it again",
            phase="read",
            path=path,
        ) from error
    except LoadError as error:
        error.path = error.path or path
        raise


def _read(root: Any) -> StockMetadata:
    if not isinstance(root, _Metadata):
        raise _damaged("it holds no Metadata object")
    described = _mapping(root.field("state_dict_metadata"), "state_dict_metadata")
    places = _places(_mapping(root.field("storage_data"), "storage_data"))
    tensors: dict[str, StockTensor] = {}
    values: dict[str, StockPlace] = {}
    for name, entry in described.items():
        _text(name, "a name")
        if isinstance(entry, _TensorMetadata):
            tensors[name] = _tensor(name, entry, places)
        elif isinstance(entry, _BytesMetadata):
            values[name] = _place_of(name, None, places)
        else:
            raise _damaged(f"{name} is neither a tensor nor bytes")
    planned = root.field("planner_data")
    paths = planned if isinstance(planned, dict) else {}
    return StockMetadata(
        tensors=tensors,
        values=values,
        paths={name: _path(name, paths.get(name)) for name in (*tensors, *values)},
    )


def _places(stored: dict[Any, Any]) -> dict[tuple[str, tuple[int, ...] | None], StockPlace]:
    """Containers by tensor name and offsets, or by name alone for what is not a tensor."""
    places: dict[tuple[str, tuple[int, ...] | None], StockPlace] = {}
    for index, info in stored.items():
        if not isinstance(index, _Index) or not isinstance(info, _Place):
            raise _damaged("storage_data does not map indices to places")
        name, offset = index.field("fqn"), index.field("offset")
        _text(name, "the name of an index")
        if extensions := info.field("transform_descriptors"):
            raise LoadError(
                f"{name} was written through the extension(s) {_listed(extensions)}, "
                "which cannot be read here",
                phase="read",
            )
        place = StockPlace(
            file=_file_name(name, info.field("relative_path")),
            offset=_count(name, info.field("offset")),
            num_bytes=_count(name, info.field("length")),
        )
        places[name, None if offset is None else _counts(name, offset)] = place
    return places


def _tensor(name: str, entry: _TensorMetadata, places: Mapping[Any, StockPlace]) -> StockTensor:
    properties = entry.field("properties")
    state = properties.state if isinstance(properties, _Properties) else None
    dtype = state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) else None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(f"{name} has no dtype")
    shape = _counts(name, entry.field("size"))
    if problem := shape_problem(dtype, shape):
        raise _damaged(f"{name}: {problem}")
    listed = entry.field("chunks")
    if not isinstance(listed, list):
        raise _damaged(f"{name} has no list of chunks")
    chunks = []
    for chunk in listed:
        if not isinstance(chunk, _Chunk):
            raise _damaged(f"{name} lists something that is no chunk")
        box = Box(_counts(name, chunk.field("offsets")), _counts(name, chunk.field("sizes")))
        if not len(box.offsets) == len(box.sizes) == len(shape):
            raise _damaged(f"{name} has {len(shape)} dimensions, and a chunk of it has others")
        if box.num_elements:
            chunks.append(StockChunk(box=box, place=_place_of(name, box.offsets, places)))
    return StockTensor(dtype=dtype, shape=shape, chunks=tuple(chunks))


def _place_of(name: str, offsets: tuple[int, ...] | None, places: Mapping[Any, StockPlace]) -> StockPlace:
    place = places.get((name, offsets))
    if place is None:
        part = "" if offsets is None else f", chunk at {offsets},"
        raise _damaged(f"it does not say where {name}{part} is stored")
    return place


def _path(name: str, planned: Any) -> FlatPath:
    """The path in the nested state; the name alone for a state that was not flattened, or by another rule."""
    if isinstance(planned, (tuple, list)) and all(type(part) in (str, int) for part in planned):
        path = tuple(planned)
        if all(type(part) is str or _is_number(part) for part in path) and ".".join(map(str, path)) == name:
            return path
    return (name,)


def _file_name(name: str, relative: Any) -> str:
    """A file below the checkpoint's directory, and nowhere else."""
    file = _text(relative, f"the file of {name}")
    if not file or "\0" in file or "\\" in file:
        raise _damaged(f"{name} is stored in no file")
    if any(part in ("", ".", "..") for part in file.split("/")):
        raise _damaged(f"{name} is stored in {file!r:.80}, which is outside of the checkpoint")
    return file


def _text(value: Any, what: str) -> str:
    """A string that can be shown, sent and used in a path; a pickle may hold others."""
    if not isinstance(value, str):
        raise _damaged(f"{what} is no string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _damaged(f"{what} is no text") from error
    return value


def _listed(names: Any) -> str:
    """A list of names for a message; what else a pickle may hold there can be endless to show."""
    known = isinstance(names, (list, tuple)) and all(type(name) is str for name in names)
    return ", ".join(names) if known else f"of type {type(names).__name__}"


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _mapping(value: Any, what: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _damaged(f"it has no {what}")
    return value


def _count(name: str, value: Any) -> int:
    if not _is_number(value):
        raise _damaged(f"{name}: {_shown(value)} is no size or offset")
    number: int = value
    return number


def _counts(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise _damaged(f"{name}: {_shown(value)} is no list of sizes or offsets")
    return tuple(_count(name, item) for item in value)


def _shown(value: Any) -> str:
    """For a message: what a pickle holds can be endless to show."""
    is_short = type(value) is str or (type(value) is int and abs(value) < 1 << 64)
    return f"{value!r:.80}" if is_short else f"a {type(value).__name__}"


def _damaged(problem: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f".metadata is damaged: {problem}", phase="read")
