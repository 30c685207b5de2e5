"""A model in safetensors as a source: one file, or the shards that an index names.

Reads headers when it is opened, and ranges of the files later; the library of that name is not needed. Called
by `ops.import_checkpoint`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_ckpt.errors import CorruptCheckpoint, StateMismatch, StorageNotFound
from dcp_ckpt.format.dtypes import dtype_info
from dcp_ckpt.format.fragment import TensorEntry
from dcp_ckpt.format.safetensors import (
    MOST_HEADER_BYTES,
    SafetensorsHeader,
    decode_header,
    decode_index,
    header_bytes,
)
from dcp_ckpt.ops.importing.source import contradiction
from dcp_ckpt.ops.new_state import NewTensor, NewValue
from dcp_ckpt.ops.windows import Window, batches
from dcp_ckpt.storage.base import ByteRange, Storage
from dcp_ckpt.wording import shown_names

if TYPE_CHECKING:
    import torch

__all__ = ["SafetensorsSource", "index_names"]

_LENGTH_BYTES = 8
_READERS = 4


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a tensor's bytes begin."""

    key: str
    offset: int


class SafetensorsSource:
    """All tensors of some files.

    Args:
        storage: holds the files; closed with this object.
        files: their names.
        index: name of each tensor -> its file, where there is an index.

    Raises:
        CorruptCheckpoint: a file is missing or damaged, or they contradict the index.
        StateMismatch: a dtype that cannot be stored here, by name.
    """

    kind = "safetensors"
    values: Sequence[NewValue] = ()
    unverified = "safetensors files have no digests: damage inside of tensors would not be noticed"

    def __init__(
        self, storage: Storage, files: Sequence[str], index: Mapping[str, str] | None = None
    ) -> None:
        self._storage = storage
        self._places: list[_Place] = []
        self.tensors: list[NewTensor] = []
        self.left_out: dict[str, str] = {}
        held: dict[str, str] = {}
        for file in files:
            self._add(file, held)
        if index is not None and (wrong := contradiction(index, held)):
            raise CorruptCheckpoint(wrong, phase="read", path=storage.url)

    def windows(self, numbers: Sequence[int]) -> Iterator[torch.Tensor]:
        entries = [
            TensorEntry(
                path=list(self.tensors[number].path),
                dtype=self.tensors[number].dtype,
                shape=list(self.tensors[number].shape),
                mesh=None,
                placements=[],
                owners=[],
            )
            for number in numbers
        ]
        read_bytes = [0] * len(numbers)
        for batch in batches(entries):
            ranges = []
            for window in batch:
                ranges.append(self._range(numbers[window.number], window, read_bytes))
            yield from self._read(ranges)

    def close(self) -> None:
        self._storage.close()

    def _add(self, file: str, held: dict[str, str]) -> None:
        header = self._header(file)
        unknown = [f"{name} ({stated})" for name, stated in header.unknown.items()]
        if unknown:
            raise StateMismatch(f"{file}: these dtypes cannot be stored: {shown_names(unknown)}")
        for entry in header.tensors:
            if entry.name in held:
                raise CorruptCheckpoint(
                    f"{entry.name} is in {held[entry.name]} and in {file}",
                    phase="read",
                    path=self._storage.url,
                )
            held[entry.name] = file
            aliases = tuple((alias,) for alias, name in header.aliases.items() if name == entry.name)
            self.tensors.append(
                NewTensor(path=(entry.name,), dtype=entry.dtype, shape=entry.shape, aliases=aliases)
            )
            self._places.append(_Place(key=file, offset=entry.start))

    def _header(self, file: str) -> SafetensorsHeader:
        path = f"{self._storage.url}/{file}"
        try:
            size_bytes = self._storage.size(file)
        except StorageNotFound as error:
            raise CorruptCheckpoint("a file of the model is missing", phase="read", path=path) from error
        if size_bytes < _LENGTH_BYTES:
            raise CorruptCheckpoint(f"it has {size_bytes} bytes, and no header", phase="read", path=path)
        length = header_bytes(self._bytes(file, 0, _LENGTH_BYTES))
        if length > min(size_bytes - _LENGTH_BYTES, MOST_HEADER_BYTES):
            raise CorruptCheckpoint("not a safetensors file: no such header", phase="read", path=path)
        text = self._bytes(file, _LENGTH_BYTES, length)
        return decode_header(text, size_bytes=size_bytes, path=path)

    def _bytes(self, file: str, offset: int, num_bytes: int) -> bytes:
        found = bytearray()
        one = ByteRange(key=file, offset=offset, num_bytes=num_bytes)
        self._storage.read_ranges([one], lambda _, data: found.extend(data), concurrency=1)
        return bytes(found)

    def _range(self, number: int, window: Window, read_bytes: list[int]) -> ByteRange:
        """The bytes of a window; those of one tensor follow each other."""
        place = self._places[number]
        num_bytes = window.box.num_elements * dtype_info(self.tensors[number].dtype).item_bytes
        offset = place.offset + read_bytes[window.number]
        read_bytes[window.number] += num_bytes
        return ByteRange(key=place.key, offset=offset, num_bytes=num_bytes)

    def _read(self, ranges: Sequence[ByteRange]) -> list[torch.Tensor]:
        import torch

        found: dict[int, torch.Tensor] = {}
        lock = threading.Lock()

        def consume(index: int, data: memoryview) -> None:
            copy = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            with lock:
                found[index] = copy

        self._storage.read_ranges(ranges, consume, concurrency=_READERS)
        return [found[index] for index in range(len(ranges))]


def index_names(storage: Storage, name: str) -> dict[str, str]:
    """Name of each tensor -> its file, as an index says.

    Raises:
        CorruptCheckpoint: it is no index, or names files outside of its directory.
    """
    return decode_index(storage.read(name), path=f"{storage.url}/{name}")
