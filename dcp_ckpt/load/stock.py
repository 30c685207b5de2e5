"""A stock DCP checkpoint as a load sees it: `.metadata`, and payload ranges computed from the containers.

Made by stock `FileSystemWriter` or `FsspecWriter`. Torch-free in what it decides. Nothing of it can be
verified but sizes and the structure of containers, since it holds no digests. Called by the loader, by `ops`
and by `dcp`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dcp_ckpt.errors import CheckpointNotFound, CorruptCheckpoint, LoadError, StorageError, StorageNotFound
from dcp_ckpt.format.boxes import Box, intersect, tiling_problem
from dcp_ckpt.format.digests import digest
from dcp_ckpt.format.fragment import ChunkEntry, TensorEntry
from dcp_ckpt.format.names import DCP_METADATA, MANIFEST
from dcp_ckpt.format.stock_metadata import FlatPath, StockChunk, StockMetadata, decode_stock_metadata
from dcp_ckpt.format.torch_container import ContainerWindows, TensorPlace, locate_tensor
from dcp_ckpt.load.source import Origin, StridedChunk
from dcp_ckpt.load.stock_containers import scan_containers
from dcp_ckpt.load.stock_values import UnreadableValue, decode_container
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.storage.os_errors import is_no_file

if TYPE_CHECKING:
    from dcp_ckpt.state.component import StoredState

__all__ = ["STOCK_UNVERIFIED", "StockSource", "open_stock", "stock_digest"]

STOCK_UNVERIFIED = "stock DCP checkpoint: nothing can be verified but sizes and container structure"

_STEP = re.compile(r"(?:global_?)?(?:step|checkpoint|ckpt)[-_]?([0-9]+)")


def stock_digest(storage: Storage, directory: str) -> str | None:
    """The digest of `.metadata`, so that all ranks read the same one; None when there is none."""
    try:
        return digest(storage.read(f"{directory}/{DCP_METADATA}"))
    except StorageNotFound:
        return None


def open_stock(storage: Storage, directory: str, *, expected_digest: str | None = None) -> StockSource:
    """Read `.metadata` of a stock checkpoint; no other file is touched.

    Raises:
        CheckpointNotFound: there is none.
        CorruptCheckpoint: it is damaged, or is not the expected one.
        LoadError: it names a class that no stock checkpoint needs; nothing was executed.
    """
    key = f"{directory}/{DCP_METADATA}"
    try:
        data = storage.read(key)
    except StorageNotFound as error:
        raise CheckpointNotFound(
            f"not a checkpoint: it has neither a {MANIFEST} nor a {DCP_METADATA}", path=error.path
        ) from error
    found = digest(data)
    if expected_digest is not None and found != expected_digest:
        raise CorruptCheckpoint(
            "the checkpoint was replaced while it was being read, or the ranks see different storage",
            phase="read",
            path=key,
        )
    return StockSource(storage, directory, decode_stock_metadata(data, path=key), seed_material=found)


class StockSource:
    """The tables of one stock checkpoint. Local to a rank; reads headers when they are asked for.

    Args:
        storage: the parent of the checkpoint's directory.
        seed_material: a value that is its own.
    """

    has_digests = False

    def __init__(
        self, storage: Storage, directory: str, metadata: StockMetadata, *, seed_material: str
    ) -> None:
        self.storage = storage
        self.directory = directory
        self.metadata = metadata
        self.tensors: dict[str, TensorEntry] = {
            name: TensorEntry(
                path=list(map(str, metadata.paths[name])),
                dtype=tensor.dtype,
                shape=list(tensor.shape),
                mesh=None,
                placements=[],
                owners=[],
            )
            for name, tensor in metadata.tensors.items()
        }
        self.unreadable: dict[str, str] = {}
        self._seed_material = seed_material
        self._values: dict[str, Any] | None = None
        self._located: dict[tuple[str, int], TensorPlace] = {}
        self._needed_bytes = _needed_bytes(metadata)
        self._files = sorted(self._needed_bytes)
        self._numbers = {name: number for number, name in enumerate(self._files)}
        self._found_bytes: dict[str, int] = {}

    @property
    def flat_paths(self) -> Mapping[str, FlatPath]:
        return self.metadata.paths

    @property
    def step(self) -> int | None:
        """The step that the directory's name states by an unmistakable custom (`step-100`), if it does."""
        match = _STEP.fullmatch(self.directory.lower())
        return int(match[1]) if match else None

    @property
    def origin(self) -> Origin:
        step = self.step
        notes = [] if step is not None else ["a stock checkpoint does not say its step: 0 is assumed"]
        notes += [f"{name} was not read: {reason}" for name, reason in sorted(self.unreadable.items())]
        return Origin(
            step=step or 0, epoch=0, world_size=0, unverified=(STOCK_UNVERIFIED,), notes=tuple(notes)
        )

    @property
    def files(self) -> Sequence[str]:
        """The data files, by their paths in the checkpoint's directory, sorted."""
        return self._files

    def state(self, *, rank: int, world_size: int) -> StoredState:
        import torch

        from dcp_ckpt.state.component import StoredState, StoredTensor

        values = self.values()
        return StoredState(
            tensors={
                name: StoredTensor(
                    path=tuple(entry.path), dtype=getattr(torch, entry.dtype), shape=tuple(entry.shape)
                )
                for name, entry in self.tensors.items()
            },
            values=values,
            value_paths={name: tuple(map(str, self.metadata.paths[name])) for name in values},
            per_rank_of=lambda saved_rank: {},
            step=self.origin.step,
            saved_world_size=0,
            rank=rank,
            world_size=world_size,
            seed_material=f"stock/{self._seed_material}",
        )

    def values(self) -> Mapping[str, Any]:
        """All values that can be read without executing a pickle, decoded; the others are in `unreadable`."""
        if self._values is None:
            names = list(self.metadata.values)
            places = [
                (_what(name, self.metadata.values[name].file), self.metadata.values[name]) for name in names
            ]
            self._require_files(place.file for _, place in places)
            found = scan_containers(self.storage, self.directory, places, _decoded, whole=True)
            self._values = {}
            for name, value in zip(names, found, strict=True):
                if isinstance(value, UnreadableValue):
                    self.unreadable[name] = str(value)
                else:
                    self._values[name] = value
        return self._values

    def chunks(self, wanted: Mapping[str, Box]) -> dict[str, list[tuple[int, ChunkEntry]]]:
        needed = [
            (name, chunk)
            for name, box in wanted.items()
            for chunk in self.metadata.tensors[name].chunks
            if intersect(chunk.box, box)
        ]
        self._require_files(chunk.place.file for _, chunk in needed)
        self._locate(needed)
        by_name: dict[str, list[tuple[int, ChunkEntry]]] = {name: [] for name in wanted}
        for name, chunk in needed:
            by_name[name].append((self._numbers[chunk.place.file], self._entry(name, chunk)))
        return by_name

    def file_key(self, rank: int, file: int) -> str:
        """The key of data file number `rank`; `file` is always 0 here."""
        return f"{self.directory}/{self._files[rank]}"

    def file_note(self, rank: int, file: int) -> str:
        return ""

    def file_bytes(self, rank: int, file: int) -> int:
        return self._needed_bytes[self._files[rank]]

    def found_bytes(self, file: str) -> int:
        """The size of a data file.

        Raises:
            CorruptCheckpoint: it is missing, or shorter than `.metadata` says.
        """
        if file not in self._found_bytes:
            key = f"{self.directory}/{file}"
            try:
                size_bytes = self.storage.size(key)
            except StorageNotFound as error:
                raise self._gone(error) from error
            if size_bytes < self._needed_bytes[file]:
                raise _truncated(key, size_bytes, self._needed_bytes[file])
            self._found_bytes[file] = size_bytes
        return self._found_bytes[file]

    def check_structure(self) -> list[LoadError]:
        """Look at the size of every file and the headers of every container; no payload is read.

        Returns:
            Everything that is wrong: one error for each file, tensor or value.
        """
        problems: list[LoadError] = []
        usable = set()
        for file in self._files:
            try:
                self.found_bytes(file)
                usable.add(file)
            except CorruptCheckpoint as error:
                problems.append(error)
        for name, tensor in self.metadata.tensors.items():
            if problem := tiling_problem(tensor.shape, [chunk.box for chunk in tensor.chunks]):
                problems.append(CorruptCheckpoint(f"{name}: {problem}", phase="read", path=self.directory))
        chunks = [
            (name, chunk)
            for name, tensor in self.metadata.tensors.items()
            for chunk in tensor.chunks
            if chunk.place.file in usable
        ]
        try:
            self._locate(chunks)
        except LoadError:
            for chunk in chunks:
                try:
                    self._locate([chunk])
                except LoadError as error:
                    problems.append(error)
        if usable == set(self._files):
            try:
                self.values()
            except LoadError as error:
                problems.append(error)
        return problems

    def block_digest(self, rank: int, file: int, block: int) -> str:
        raise LoadError(STOCK_UNVERIFIED, path=self.file_key(rank, file))

    def damage(self, error: StorageError, stated: Mapping[str, int]) -> CorruptCheckpoint | None:
        if isinstance(error, StorageNotFound):
            return self._gone(error)
        if is_no_file(error):
            return CorruptCheckpoint(error.message, phase="read", path=error.path)
        for key, size_bytes in stated.items():
            try:
                found_bytes = self.storage.size(key)
            except StorageNotFound as gone:
                return self._gone(gone)
            except StorageError:
                return None
            if found_bytes < size_bytes:
                return _truncated(key, found_bytes, size_bytes)
        return None

    def names(self) -> Iterable[str]:
        return (*self.tensors, *self.metadata.values)

    def _locate(self, chunks: Sequence[tuple[str, StockChunk]]) -> None:
        """Learn from their headers where the payloads of these chunks lie."""
        missing = [
            (name, chunk)
            for name, chunk in chunks
            if (chunk.place.file, chunk.place.offset) not in self._located
        ]
        places = [(_what(name, chunk.place.file), chunk.place) for name, chunk in missing]
        located = scan_containers(self.storage, self.directory, places, locate_tensor)
        for (name, chunk), place in zip(missing, located, strict=True):
            stated = (self.metadata.tensors[name].dtype, chunk.box.sizes)
            if (place.dtype, place.sizes) != stated:
                raise CorruptCheckpoint(
                    f"{name} is {stated[0]} of sizes {list(stated[1])} in {DCP_METADATA}, and {place.dtype} "
                    f"of sizes {list(place.sizes)} in its file",
                    phase="read",
                    path=f"{self.directory}/{chunk.place.file}",
                )
            self._located[chunk.place.file, chunk.place.offset] = place

    def _entry(self, name: str, chunk: StockChunk) -> ChunkEntry:
        place = self._located[chunk.place.file, chunk.place.offset]
        fields: dict[str, Any] = {
            "tensor": name,
            "offsets": list(chunk.box.offsets),
            "sizes": list(chunk.box.sizes),
            "file": 0,
            "payload_offset": chunk.place.offset + place.first_byte,
            "container_offset": chunk.place.offset,
            "container_bytes": chunk.place.num_bytes,
        }
        return ChunkEntry(**fields) if place.is_row_major else StridedChunk(**fields, strides=place.strides)

    def _require_files(self, files: Iterable[str]) -> None:
        for file in sorted(set(files)):
            self.found_bytes(file)

    def _gone(self, error: StorageNotFound) -> CorruptCheckpoint:
        return CorruptCheckpoint("a file of the checkpoint is missing", phase="read", path=error.path)


def _decoded(windows: ContainerWindows) -> Any:
    try:
        return decode_container(windows.read(0, windows.num_bytes), what=windows.what)
    except UnreadableValue as error:
        return error


def _needed_bytes(metadata: StockMetadata) -> dict[str, int]:
    """For each data file, the end of the last container in it."""
    ends: dict[str, int] = {}
    places = [chunk.place for tensor in metadata.tensors.values() for chunk in tensor.chunks]
    for place in (*places, *metadata.values.values()):
        ends[place.file] = max(ends.get(place.file, 0), place.offset + place.num_bytes)
    return ends


def _truncated(key: str, found_bytes: int, size_bytes: int) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"truncated: {found_bytes} of at least {size_bytes} bytes", phase="read", path=key
    )


def _what(name: str, file: str) -> str:
    return f"{name} in {file}"
