"""One committed checkpoint, opened for reading: by one process, without a model and without a process group.

Owns the way from a name to its bytes: manifest -> fragment -> block, each link checked. Imports torch only
when a tensor is read. Called by the command line and by the other operations.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dcp_ckpt.closing import Closing
from dcp_ckpt.errors import CheckpointNotFound, CorruptCheckpoint, StorageNotFound
from dcp_ckpt.format.boxes import expand_ranks
from dcp_ckpt.format.dtypes import dtype_info
from dcp_ckpt.format.fragment import (
    Fragment,
    MeshEntry,
    TensorEntry,
    ValueEntry,
)
from dcp_ckpt.format.joining import join_values
from dcp_ckpt.format.manifest import Manifest, decode_listed_fragment, decode_manifest
from dcp_ckpt.format.names import MANIFEST, data_file_name, fragment_name
from dcp_ckpt.format.values import decode_value
from dcp_ckpt.load.source import Source
from dcp_ckpt.load.stored import StoredCheckpoint, was_removed
from dcp_ckpt.ops.blocks import read_verified
from dcp_ckpt.ops.one_tensor import FoundChunk, FoundTensor, TensorSearch, chunks_problem
from dcp_ckpt.ops.refs import resolve_ref
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.wording import shown_names

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "open_checkpoint", "read_fragment", "read_manifest"]


def open_checkpoint(ref: str | os.PathLike[str]) -> Checkpoint:
    """Open one committed checkpoint for reading; close it after use, or use it as a context manager.

    Args:
        ref: `RUN@latest`, `RUN@best`, `RUN@STEP`, or the path or URL of a checkpoint directory, which may be
            that of a stock DCP checkpoint.

    Returns:
        The checkpoint; for a stock one, a `StockCheckpoint`, which has no manifest.

    Raises:
        CheckpointNotFound: there is none; the message lists what exists.
        CorruptCheckpoint, FormatTooNew: its manifest cannot be used.
        StorageError: it could not be read.
    """
    try:
        location = resolve_ref(ref)
    except CheckpointNotFound:
        from dcp_ckpt.ops.stock import open_stock_checkpoint  # it is made of this module's classes

        stock = open_stock_checkpoint(ref)
        if stock is None:
            raise
        return stock
    storage = open_storage(location.root)
    try:
        return Checkpoint(storage, location.directory, read_manifest(storage, location.directory))
    except BaseException:
        storage.close()
        raise


class Checkpoint(Closing):
    """A read-only view; fragments are read when they are first needed and kept.

    Args:
        storage: holds the checkpoint; closed with this object.
        directory: the checkpoint's directory in `storage`.
        manifest: already checked.
    """

    unverified = ""
    """What cannot be verified when it is read; empty for checkpoints of ours, of which everything is."""

    def __init__(self, storage: Storage, directory: str, manifest: Manifest) -> None:
        self._storage = storage
        self._fragments: dict[int, Fragment] = {}
        self._search = TensorSearch(storage, directory, manifest)
        self.directory = directory
        self._manifest = manifest

    def close(self) -> None:
        """Release the storage. Idempotent."""
        self._storage.close()

    @property
    def storage(self) -> Storage:
        return self._storage

    @property
    def url(self) -> str:
        """The path or URL of its directory."""
        return f"{self._storage.url.rstrip('/')}/{self.directory}"

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def step(self) -> int | None:
        """The step it was saved at; None where nobody knows."""
        return self.manifest.step

    @property
    def unreadable(self) -> Mapping[str, str]:
        """The values that cannot be read, with the reason: none of checkpoints of ours."""
        return {}

    @property
    def per_rank_names(self) -> list[str]:
        """The names of values of which each rank has its own, as far as rank 0 has them."""
        return sorted(self.fragment(0).per_rank)

    def source(self) -> Source:
        """Its tables as a load sees them, for reading many tensors at a time. Reads the indexing fragments.

        Raises:
            CorruptCheckpoint: a fragment is missing or damaged.
        """
        return StoredCheckpoint(self._storage, self.directory, self.manifest)

    def keys(self) -> list[str]:
        """The names of all tensors and replicated values, sorted; a tied tensor has that of its first use."""
        return sorted({*self.tensors, *self.values})

    @cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """All tensors by name, sorted. Reads the fragments that index tensors."""
        found: dict[str, TensorEntry] = {}
        for rank, name, entry in self._indexed():
            if name in found:
                raise CorruptCheckpoint(
                    f"tensor {name} is described by two ranks", rank=rank, phase="read", path=self.directory
                )
            found[name] = entry
        return dict(sorted(found.items()))

    @cached_property
    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        """The other names of tied tensors, by the name that each is stored under. Reads as `tensors` does."""
        found: dict[str, tuple[str, ...]] = {}
        for rank in expand_ranks(self.manifest.index):
            for name, paths in self.fragment(rank).aliases.items():
                found[name] = tuple(map(".".join, paths))
        return found

    @cached_property
    def values(self) -> Mapping[str, ValueEntry]:
        """Replicated values by name, encoded; put together where ranks store parts. Reads what indexes."""
        ranks = expand_ranks(self.manifest.index)
        try:
            return join_values((rank, self.fragment(rank).values) for rank in ranks)
        except CorruptCheckpoint as error:
            error.path = error.path or self.directory
            raise

    def mesh(self, key: str) -> MeshEntry | None:
        """The device mesh of a tensor, or None when every rank held it whole.

        Raises:
            CheckpointNotFound: no such tensor.
        """
        rank, entry = self._find(key)
        return None if entry.mesh is None else self.fragment(rank).meshes[entry.mesh]

    def read_value(self, key: str, *, rank: int | None = None) -> Any:
        """One value, decoded; tensors inside of it are `TensorRef`s.

        Args:
            rank: for values of one rank only; None for the replicated ones.

        Raises:
            CheckpointNotFound: no such value, or no such rank.
        """
        values = self.values if rank is None else self.fragment(rank).per_rank
        if key not in values:
            whose = "replicated value" if rank is None else f"value of rank {rank}"
            raise self._unknown(f"{whose} {key!r}", values)
        return decode_value(values[key].value, path=key)

    def read_tensor(self, key: str) -> torch.Tensor:
        """One whole tensor on the CPU, put together from all its chunks; every block read is checked.

        Args:
            key: any of its names, where it is tied.

        Memory: the tensor and its largest chunk.

        Raises:
            CheckpointNotFound: no such tensor, or the checkpoint was deleted while reading.
            CorruptCheckpoint: a file is missing or short, a digest differs, or the chunks do not tile it.
        """
        import torch

        # Where the tables are decoded already, they are as quick.
        found = (None if self._fragments else self._search.find(key)) or self._looked_up(key)
        dtype = getattr(torch, dtype_info(found.entry.dtype).name)
        if len(found.chunks) == 1:
            return self._read_chunk(found.chunks[0], dtype)
        result = torch.empty(found.entry.shape, dtype=dtype)
        for one in found.chunks:
            window = tuple(
                slice(offset, offset + size)
                for offset, size in zip(one.chunk.offsets, one.chunk.sizes, strict=True)
            )
            result[window].copy_(self._read_chunk(one, dtype))
        return result

    def fragment(self, rank: int) -> Fragment:
        """What `rank` said of this checkpoint, checked against the manifest.

        Raises:
            CheckpointNotFound: no such rank, or the checkpoint was deleted while reading.
            CorruptCheckpoint: it is missing or differs from what the manifest says.
        """
        if rank not in self._fragments:
            if not 0 <= rank < self.manifest.world_size:
                raise self._unknown(f"rank {rank}", map(str, range(self.manifest.world_size)))
            try:
                self._fragments[rank] = read_fragment(self._storage, self.directory, self.manifest, rank)
            except StorageNotFound as error:
                raise self._missing(fragment_name(rank, self.manifest.attempt_id)) from error
        return self._fragments[rank]

    def _looked_up(self, key: str) -> FoundTensor:
        """A tensor and its chunks, from the decoded tables."""
        _, entry = self._find(key)
        found = FoundTensor(
            entry=entry,
            chunks=[
                FoundChunk(rank=rank, chunk=chunk, file=self.fragment(rank).files[chunk.file])
                for rank in expand_ranks(entry.owners)
                for chunk in self.fragment(rank).chunks
                if chunk.tensor == entry.name and chunk.box.num_elements
            ],
        )
        if problem := chunks_problem(found):
            raise CorruptCheckpoint(f"tensor {key}: {problem}", phase="read", path=self.directory)
        return found

    def _indexed(self) -> Iterator[tuple[int, str, TensorEntry]]:
        for rank in expand_ranks(self.manifest.index):
            for entry in self.fragment(rank).tensors:
                yield rank, entry.name, entry

    def _find(self, key: str) -> tuple[int, TensorEntry]:
        """The tensor and the rank that indexes it; most are in rank 0's fragment, so it stops early."""
        for rank, name, entry in self._indexed():
            if name == key or key in self.aliases.get(name, ()):
                return rank, entry
        raise self._unknown(f"tensor {key!r}", self.tensors)

    def _read_chunk(self, found: FoundChunk, dtype: torch.dtype) -> torch.Tensor:
        import torch

        chunk, entry = found.chunk, found.file
        name = data_file_name(found.rank, chunk.file, self.manifest.attempt_id)
        num_bytes = chunk.box.num_elements * dtype.itemsize
        try:
            data = read_verified(
                self._storage,
                f"{self.directory}/{name}",
                entry,
                offset=chunk.payload_offset,
                num_bytes=num_bytes,
            )
        except StorageNotFound as error:
            missing = self._missing(name)
            missing.message += f"; tensor {chunk.tensor} is read from it{entry.shared_note}"
            raise missing from error
        except CorruptCheckpoint as error:
            error.message += f"; tensor {chunk.tensor} is read from it{entry.shared_note}"
            raise
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(chunk.sizes)

    def _missing(self, name: str) -> CheckpointNotFound | CorruptCheckpoint:
        """A missing file is damage, unless the manifest went first: then the checkpoint was removed."""
        path = f"{self.directory}/{name}"
        if was_removed(self._storage, self.directory):
            return CheckpointNotFound(
                "the checkpoint was deleted while reading", step=self.manifest.step, path=path
            )
        return CorruptCheckpoint("a file of the checkpoint is missing", phase="read", path=path)

    def _unknown(self, what: str, existing: Any) -> CheckpointNotFound:
        shown = shown_names(sorted(existing), most=10) or "none"
        return CheckpointNotFound(
            f"no {what}; there are: {shown}", step=self.manifest.step, path=self.directory
        )


def read_manifest(storage: Storage, directory: str) -> Manifest:
    """The checked manifest of a directory.

    Raises:
        CheckpointNotFound: it has none.
        CorruptCheckpoint, FormatTooNew: as `decode_manifest`.
    """
    key = f"{directory}/{MANIFEST}"
    try:
        return decode_manifest(storage.read(key), path=key)
    except StorageNotFound as error:
        raise CheckpointNotFound("not a checkpoint: it has no manifest", path=directory) from error


def read_fragment(storage: Storage, directory: str, manifest: Manifest, rank: int) -> Fragment:
    """One rank's fragment, checked against the manifest.

    Raises:
        StorageNotFound: it is missing.
        CorruptCheckpoint: its size or digest differs from the manifest's, or it is of another attempt.
        FormatTooNew: it was written by a newer version.
    """
    key = f"{directory}/{fragment_name(rank, manifest.attempt_id)}"
    return decode_listed_fragment(storage.read(key), manifest, rank, path=key)
