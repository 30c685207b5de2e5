"""What a save need not write: which files of an older checkpoint it shares, and what it writes beside them.

Pure (docs/format.md, section 14). `Base` says what the older checkpoint has, `choose_shared` which of its
files are worth a link. Whether a chunk is unchanged is found out by staging. Called by `save.bases` and
`save.staging`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dcp_ckpt.format.digests import DIGEST_DIGITS
from dcp_ckpt.format.fragment import ChunkEntry, FileEntry, FileOrigin, Fragment
from dcp_ckpt.format.names import AttemptId, StepDir, data_file_name

__all__ = ["Base", "ChunkKey", "Split", "StoredChunk", "choose_shared", "chunk_key"]

_LEAST_SHARED_BYTES = 64 << 10
"""Less is sooner written than linked: a link costs a name and two syncs."""

_LEAST_SETTLED_BYTES = 256 << 10
"""Less gets no file of its own when it is written again."""

_MOST_SHARED_FILES = 32

ChunkKey = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Tensor, offsets and sizes."""


@dataclass(frozen=True)
class StoredChunk:
    """One chunk of a base: where it is, and the digest of its payload."""

    entry: ChunkEntry
    digest: str


@dataclass(frozen=True, kw_only=True)
class Base:
    """What one rank stored in an older checkpoint.

    Args:
        files: with their origin, whether they were written for it or shared.
        keys: of those files in the run.
    """

    attempt: AttemptId
    directory: StepDir
    files: tuple[FileEntry, ...]
    keys: tuple[str, ...]
    chunks: Mapping[ChunkKey, StoredChunk]

    @classmethod
    def of(cls, directory: StepDir, fragment: Fragment) -> Base:
        """The base that a fragment describes; without payload digests nothing of it can be shared."""
        attempt = fragment.attempt_id
        digests = fragment.payload_digests
        digest_at = range(0, len(digests), DIGEST_DIGITS)
        return cls(
            attempt=attempt,
            directory=directory,
            files=tuple(
                replace(file, origin=file.origin or _origin(directory, attempt, index))
                for index, file in enumerate(fragment.files)
            ),
            keys=tuple(
                f"{directory}/{data_file_name(fragment.rank, index, attempt)}"
                for index in range(len(fragment.files))
            ),
            chunks={
                chunk_key(chunk): StoredChunk(chunk, digests[start : start + DIGEST_DIGITS])
                for chunk, start in zip(fragment.chunks, digest_at, strict=bool(digests))
            },
        )


@dataclass(frozen=True, kw_only=True)
class Split:
    """What becomes of the chunks of one save, by their numbers.

    Args:
        fresh: changed, or not known to be unchanged; written.
        settled: unchanged, in files of the base that are mostly out of date; written, into one file.
        shared: the base's files that get a name more; the rest of the chunks is in them.
    """

    fresh: tuple[int, ...]
    settled: tuple[int, ...]
    shared: tuple[int, ...]


def chunk_key(chunk: ChunkEntry) -> ChunkKey:
    return chunk.tensor, tuple(chunk.offsets), tuple(chunk.sizes)


def choose_shared(num_chunks: int, unchanged: Mapping[int, StoredChunk], file_bytes: Sequence[int]) -> Split:
    """Decide which files of the base to share.

    A file is shared when at least half of it is used, so that what is kept on disk for a checkpoint is at
    most about twice what is in it. When there are many, those of which the least is used become one.

    Args:
        num_chunks: of the save.
        unchanged: where the base has them.
        file_bytes: of the base's files.
    """
    used: dict[int, int] = {}
    for stored in unchanged.values():
        used[stored.entry.file] = used.get(stored.entry.file, 0) + stored.entry.container_bytes
    worthy = [
        file
        for file, num_bytes in used.items()
        if num_bytes >= _LEAST_SHARED_BYTES and 2 * num_bytes >= file_bytes[file]
    ]
    if len(worthy) > _MOST_SHARED_FILES:
        worthy = sorted(worthy, key=lambda file: (-used[file], file))[: _MOST_SHARED_FILES // 2]
    shared = frozenset(worthy)
    settled = [number for number in sorted(unchanged) if unchanged[number].entry.file not in shared]
    if sum(unchanged[number].entry.container_bytes for number in settled) < _LEAST_SETTLED_BYTES:
        settled = []
    left_out = {number for number, stored in unchanged.items() if stored.entry.file in shared}.union(settled)
    return Split(
        fresh=tuple(number for number in range(num_chunks) if number not in left_out),
        settled=tuple(settled),
        shared=tuple(sorted(shared)),
    )


def _origin(directory: StepDir, attempt: AttemptId, file: int) -> FileOrigin:
    return FileOrigin(directory=str(directory), attempt=str(attempt), file=file)
