"""The fragment: what one rank says of one attempt (docs/format.md, section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from dcp_ckpt.errors import CorruptCheckpoint
from dcp_ckpt.format.boxes import Box
from dcp_ckpt.format.consistency import tables_problem
from dcp_ckpt.format.digests import DIGEST_DIGITS, ReadableBuffer, block_count, digest, digest_of_parts
from dcp_ckpt.format.documents import FORMAT_VERSION, decode_document, encode_json
from dcp_ckpt.format.fields import Count, Digest, Digests, Dims, Identity, RankRuns, Version
from dcp_ckpt.format.names import AttemptId, StepDir

__all__ = [
    "FRAGMENT_FORMAT",
    "ChunkEntry",
    "CopiesEntry",
    "FileEntry",
    "FileOrigin",
    "Fragment",
    "MeshEntry",
    "TensorEntry",
    "ValueEntry",
    "decode_fragment",
    "encode_fragment",
    "layout_digest",
    "payload_digest",
]

FRAGMENT_FORMAT = "dcp_ckpt.fragment"


@dataclass(frozen=True, kw_only=True)
class FileOrigin:
    """The older checkpoint of this run and rank that wrote a shared file, and the file's index there.

    For people: the file itself stands in the checkpoint's own directory.
    """

    directory: Identity
    attempt: Identity
    file: Count


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One data file: its size and the digests of its 1 MiB blocks, concatenated.

    Args:
        origin: of a file that an older checkpoint wrote (docs/format.md, section 14).
    """

    size_bytes: Count
    block_digests: Digests
    origin: FileOrigin | None = None

    def block_digest(self, block: int) -> str:
        return self.block_digests[block * DIGEST_DIGITS : (block + 1) * DIGEST_DIGITS]

    @property
    def shared_note(self) -> str:
        """To be added to a message about the file: who else has it."""
        if self.origin is None:
            return ""
        return f"; {self.origin.directory} wrote the file, and checkpoints since then share it"


@dataclass(frozen=True, kw_only=True)
class MeshEntry:
    """A device mesh; `ranks` is its row-major rank list as runs `[first, count]`."""

    shape: Dims
    ranks: RankRuns
    dim_names: list[str]


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """The global description of one tensor, in the fragment of the lowest rank of its mesh."""

    path: list[str]
    dtype: str
    shape: Dims
    mesh: Count | None
    placements: list[str]
    owners: RankRuns

    @property
    def name(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True, kw_only=True)
class ChunkEntry:
    """One stored box of a tensor; byte offsets count from the start of data file `file`."""

    tensor: str
    offsets: Dims
    sizes: Dims
    file: Count
    payload_offset: Count
    container_offset: Count
    container_bytes: Count

    @property
    def box(self) -> Box:
        return Box(tuple(self.offsets), tuple(self.sizes))


@dataclass(frozen=True, kw_only=True)
class ValueEntry:
    """One typed value (dcp_ckpt.format.values); the container, if any, is in the rank's data file 0.

    Args:
        join: of a value that other ranks may store a part of: how the parts are put together
            (dcp_ckpt.format.joining).
    """

    path: list[str]
    value: Any
    container_offset: Count | None = None
    container_bytes: Count | None = None
    join: str | None = None


@dataclass(frozen=True, kw_only=True)
class CopiesEntry:
    """The digest of what is equal on some ranks and not there on others."""

    ranks: RankRuns
    digest: Digest


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Everything that one rank contributes to one attempt.

    `aliases` has the further paths of tensors that this rank indexes, by name: each is stored once.
    """

    run_id: Identity
    epoch: Count
    epoch_id: Identity
    attempt: Identity
    step: Count
    rank: Count
    world_size: Count
    files: list[FileEntry]
    meshes: list[MeshEntry]
    tensors: list[TensorEntry]
    chunks: list[ChunkEntry]
    layout: Digest
    values: dict[str, ValueEntry]
    per_rank: dict[str, ValueEntry]
    replicated: Digest
    aliases: dict[str, list[list[str]]] = field(default_factory=dict)
    copies: list[CopiesEntry] = field(default_factory=list)
    payload_digests: Digests = ""
    created_at: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    byte_order: str = "little"
    format: str = FRAGMENT_FORMAT
    format_version: Version = FORMAT_VERSION

    @property
    def attempt_id(self) -> AttemptId:
        attempt = AttemptId.parse(self.attempt)
        if attempt is None:
            raise CorruptCheckpoint(f"{self.attempt!r} is not an attempt id", phase="read")
        return attempt

    @property
    def indexed_names(self) -> list[str]:
        """All names of the tensors that it describes."""
        aliases = (".".join(path) for paths in self.aliases.values() for path in paths)
        return [*(entry.name for entry in self.tensors), *aliases]

    @property
    def shared_bytes(self) -> int:
        """Of data files that an older checkpoint wrote."""
        return sum(file.size_bytes for file in self.files if file.origin is not None)


def layout_digest(meshes: list[MeshEntry], tensors: list[TensorEntry], chunks: list[ChunkEntry]) -> str:
    """The digest of one rank's tables; equal layouts need to be checked once."""
    return digest(encode_json([meshes, tensors, chunks]))


def payload_digest(dtype: str, sizes: Sequence[int], payload: Iterable[ReadableBuffer]) -> str:
    """What two chunks of one box have in common exactly when their dtypes and all their bytes are equal.

    Args:
        dtype: torch's name, without `torch.`.
        payload: the chunk's bytes in parts; each is used before the next one is asked for.
    """
    return digest_of_parts(chain([encode_json([dtype, list(sizes)])], payload))


def encode_fragment(fragment: Fragment) -> bytes:
    return encode_json(fragment)


def decode_fragment(data: bytes, *, path: str) -> Fragment:
    """Decode one fragment and check that it is consistent in itself.

    Raises:
        CorruptCheckpoint, FormatTooNew: as `decode_document`.
    """
    fragment = decode_document(data, Fragment, format=FRAGMENT_FORMAT, path=path)
    problem = _problem(fragment)
    if problem:
        raise CorruptCheckpoint(f"fragment is inconsistent: {problem}", phase="read", path=path)
    return fragment


def _problem(fragment: Fragment) -> str | None:
    if AttemptId.parse(fragment.attempt) is None:
        return f"attempt: {fragment.attempt!r} is not an attempt id"
    if fragment.byte_order != "little":
        return f"byte_order: {fragment.byte_order!r:.80} instead of 'little'"
    if fragment.rank >= fragment.world_size:
        return f"rank: {fragment.rank} of {fragment.world_size}"
    for index, file in enumerate(fragment.files):
        if len(file.block_digests) != DIGEST_DIGITS * block_count(file.size_bytes):
            return f"files[{index}].block_digests: not the digests of {file.size_bytes} bytes"
        if file.origin is not None and not _is_older(file.origin, fragment):
            return f"files[{index}].origin: {file.origin.attempt!r:.80} is no older attempt of this run"
    if fragment.payload_digests and len(fragment.payload_digests) != DIGEST_DIGITS * len(fragment.chunks):
        return f"payload_digests: not one for each of {len(fragment.chunks)} chunks"
    if fragment.layout != layout_digest(fragment.meshes, fragment.tensors, fragment.chunks):
        return "layout: its layout digest differs from its tables"
    return tables_problem(fragment)


def _is_older(origin: FileOrigin, fragment: Fragment) -> bool:
    attempt, directory = AttemptId.parse(origin.attempt), StepDir.parse(origin.directory)
    return attempt is not None and directory is not None and attempt < fragment.attempt_id
