"""Where one tensor of a checkpoint is, found without decoding the tables of all others.

Says nothing about damage: where something is unusual it finds nothing, and the tables are decoded then.
Called by `ops.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dcp_ckpt.errors import CheckpointError
from dcp_ckpt.format.boxes import expand_ranks, tiling_problem
from dcp_ckpt.format.consistency import chunk_problem
from dcp_ckpt.format.fragment import ChunkEntry, FileEntry, TensorEntry
from dcp_ckpt.format.fragment_search import SearchedFragment, search_listed_fragment
from dcp_ckpt.format.manifest import Manifest
from dcp_ckpt.format.names import fragment_name
from dcp_ckpt.storage.base import Storage

__all__ = ["FoundChunk", "FoundTensor", "TensorSearch", "chunks_problem"]


@dataclass(frozen=True, kw_only=True)
class FoundChunk:
    """A chunk, the rank that stored it, and what is known of its file."""

    rank: int
    chunk: ChunkEntry
    file: FileEntry


@dataclass(frozen=True, kw_only=True)
class FoundTensor:
    """A tensor and all of its chunks that have elements."""

    entry: TensorEntry
    chunks: list[FoundChunk]


def chunks_problem(found: FoundTensor) -> str | None:
    """Why these cannot be the chunks of the tensor, or None."""
    problems = (chunk_problem(found.entry, one.chunk) for one in found.chunks)
    return next(filter(None, problems), None) or tiling_problem(
        found.entry.shape, (one.chunk.box for one in found.chunks)
    )


class TensorSearch:
    """Searches in the fragments of one checkpoint, which are read when they are first needed, and kept."""

    def __init__(self, storage: Storage, directory: str, manifest: Manifest) -> None:
        self._storage = storage
        self._directory = directory
        self._manifest = manifest
        self._fragments: dict[int, SearchedFragment] = {}

    def find(self, name: str) -> FoundTensor | None:
        """A tensor by any of its names; None where it is not certain to be all of it."""
        try:
            indexing = self._searched(expand_ranks(self._manifest.index))
            entry = next(filter(None, (fragment.tensor(name) for fragment in indexing)), None)
            if entry is None:
                return None
            chunks = [
                FoundChunk(rank=fragment.rank, chunk=chunk, file=fragment.files[chunk.file])
                for fragment in self._searched(expand_ranks(entry.owners))
                for chunk in fragment.chunks_of(entry.name)
                if chunk.box.num_elements
            ]
        except CheckpointError:
            return None
        found = FoundTensor(entry=entry, chunks=chunks)
        return None if chunks_problem(found) else found

    def _searched(self, ranks: tuple[int, ...]) -> Iterator[SearchedFragment]:
        for rank in ranks:
            if rank not in self._fragments:
                key = f"{self._directory}/{fragment_name(rank, self._manifest.attempt_id)}"
                data = self._storage.read(key)
                found = search_listed_fragment(data, self._manifest, rank, path=key)
                if found is None:
                    return
                self._fragments[rank] = found
            yield self._fragments[rank]
