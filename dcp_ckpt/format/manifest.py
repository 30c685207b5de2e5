"""The manifest: a deterministic function of the fragments of one attempt (docs/format.md, section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from dcp_ckpt.errors import CorruptCheckpoint
from dcp_ckpt.format.boxes import compress_ranks
from dcp_ckpt.format.consistency import ranks_problem
from dcp_ckpt.format.digests import digest
from dcp_ckpt.format.documents import FORMAT_VERSION, decode_document, decoding, encode_json
from dcp_ckpt.format.fields import Count, Digest, Identity, RankRuns, Version
from dcp_ckpt.format.fragment import CopiesEntry, Fragment, decode_fragment
from dcp_ckpt.format.joining import common_digest
from dcp_ckpt.format.names import AttemptId

__all__ = [
    "MANIFEST_FORMAT",
    "FragmentRef",
    "FragmentSummary",
    "Manifest",
    "build_manifest",
    "decode_listed_fragment",
    "decode_manifest",
    "encode_manifest",
    "require_listed",
    "summarize",
]

MANIFEST_FORMAT = "dcp_ckpt.manifest"


@dataclass(frozen=True, kw_only=True)
class FragmentRef:
    """Size and digest of one rank's fragment, and the sizes of its data files.

    Args:
        shared_bytes: of those that an older checkpoint wrote.
    """

    size_bytes: Count
    digest: Digest
    file_bytes: list[Count]
    shared_bytes: Count = 0

    @classmethod
    def of(cls, fragment: Fragment, data: bytes) -> FragmentRef:
        """The reference to a fragment whose encoded bytes are `data`."""
        file_bytes = [file.size_bytes for file in fragment.files]
        return cls(
            size_bytes=len(data),
            digest=digest(data),
            file_bytes=file_bytes,
            shared_bytes=fragment.shared_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class FragmentSummary:
    """What a commit needs to know of one fragment; small enough to send to the coordinator.

    Args:
        aliases: digest of the fragment's other names of tensors.
        joined: name -> digest of what all parts have in common, of the values that ranks store in parts.
        indexes: whether it describes tensors or holds values.
    """

    run_id: Identity
    epoch: Count
    epoch_id: Identity
    attempt: Identity
    step: Count
    rank: Count
    world_size: Count
    ref: FragmentRef
    layout: Digest
    aliases: Digest
    replicated: Digest
    copies: list[CopiesEntry]
    joined: dict[str, Digest]
    created_at: str | None
    metrics: dict[str, Any]
    tags: list[str]
    indexes: bool

    @classmethod
    def of(cls, fragment: Fragment, ref: FragmentRef) -> FragmentSummary:
        return cls(
            run_id=fragment.run_id,
            epoch=fragment.epoch,
            epoch_id=fragment.epoch_id,
            attempt=fragment.attempt,
            step=fragment.step,
            rank=fragment.rank,
            world_size=fragment.world_size,
            ref=ref,
            layout=fragment.layout,
            aliases=digest(encode_json(fragment.aliases)),
            replicated=fragment.replicated,
            copies=fragment.copies,
            joined={
                name: common_digest(entry)
                for name, entry in fragment.values.items()
                if entry.join is not None
            },
            created_at=fragment.created_at,
            metrics=fragment.metrics,
            tags=fragment.tags,
            indexes=bool(fragment.tensors or fragment.values),
        )

    @property
    def identity(self) -> tuple[str, int, str, str, int, int]:
        return self.run_id, self.epoch, self.epoch_id, self.attempt, self.step, self.world_size


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The commit point of one checkpoint."""

    run_id: Identity
    epoch: Count
    epoch_id: Identity
    attempt: Identity
    step: Count
    world_size: Count
    created_at: str
    metrics: dict[str, Any]
    tags: list[str]
    fragments: list[FragmentRef]
    index: RankRuns
    digest: str
    format: str = MANIFEST_FORMAT
    format_version: Version = FORMAT_VERSION

    @property
    def identity(self) -> tuple[str, int, str, str, int, int]:
        """What all fragments of the attempt have in common; see `FragmentSummary.identity`."""
        return self.run_id, self.epoch, self.epoch_id, self.attempt, self.step, self.world_size

    @property
    def order(self) -> tuple[int, int]:
        """Checkpoints of a run are ordered by (epoch, step)."""
        return self.epoch, self.step

    @property
    def attempt_id(self) -> AttemptId:
        attempt = AttemptId.parse(self.attempt)
        assert attempt is not None, "checked when it was decoded"
        return attempt

    @property
    def total_bytes(self) -> int:
        """Bytes of all data files."""
        return sum(sum(ref.file_bytes) for ref in self.fragments)

    @property
    def shared_bytes(self) -> int:
        """Of those that an older checkpoint wrote."""
        return sum(ref.shared_bytes for ref in self.fragments)

    @property
    def written_bytes(self) -> int:
        """Of those that were written for this checkpoint."""
        return self.total_bytes - self.shared_bytes


def summarize(fragment: Fragment, data: bytes) -> FragmentSummary:
    """The summary of a fragment whose encoded bytes are `data`."""
    return FragmentSummary.of(fragment, FragmentRef.of(fragment, data))


def build_manifest(summaries: Sequence[FragmentSummary]) -> Manifest:
    """The manifest of one attempt.

    Args:
        summaries: one per rank, in rank order, of one and the same attempt.

    Raises:
        ValueError: a rank is missing or the summaries are not of one attempt.
    """
    first = summaries[0]
    ranks = [summary.rank for summary in summaries]
    if ranks != list(range(first.world_size)):
        raise ValueError(f"ranks {ranks} are not those of a world of {first.world_size}")
    if any(summary.identity != first.identity for summary in summaries):
        raise ValueError("the fragments are not of one attempt")
    if first.created_at is None:
        raise ValueError("rank 0's fragment has no created_at")
    unsigned = Manifest(
        run_id=first.run_id,
        epoch=first.epoch,
        epoch_id=first.epoch_id,
        attempt=first.attempt,
        step=first.step,
        world_size=first.world_size,
        created_at=first.created_at,
        metrics=first.metrics,
        tags=first.tags,
        fragments=[summary.ref for summary in summaries],
        index=compress_ranks([summary.rank for summary in summaries if summary.indexes]),
        digest="",
    )
    return replace(unsigned, digest=_own_digest(unsigned))


def encode_manifest(manifest: Manifest) -> bytes:
    return encode_json(manifest)


def decode_manifest(data: bytes, *, path: str) -> Manifest:
    """Decode a manifest and check its own digest.

    Raises:
        CorruptCheckpoint: not a manifest, inconsistent, or changed after it was written.
        FormatTooNew: written by a newer version.
    """
    manifest = decode_document(data, Manifest, format=MANIFEST_FORMAT, path=path)
    attempt = AttemptId.parse(manifest.attempt)
    if attempt is None:
        problem = f"attempt: {manifest.attempt!r} is not an attempt id"
    elif attempt.epoch != manifest.epoch:
        problem = f"epoch: attempt {manifest.attempt} is not of epoch {manifest.epoch}"
    elif manifest.world_size != len(manifest.fragments) or not manifest.fragments:
        problem = f"fragments: {len(manifest.fragments)} fragments for a world of {manifest.world_size}"
    elif repeated := ranks_problem(manifest.index, manifest.world_size):
        problem = f"index: {repeated}"
    elif _stated_digest(data, manifest, path=path) != manifest.digest:
        problem = "digest: its own digest does not match: it was changed after it was written"
    else:
        return manifest
    raise CorruptCheckpoint(f"manifest is damaged: {problem}", phase="read", path=path)


def decode_listed_fragment(data: bytes, manifest: Manifest, rank: int, *, path: str) -> Fragment:
    """Decode one rank's fragment after checking its bytes against the manifest: the chain of trust.

    Raises:
        CorruptCheckpoint: its size or digest differs from the manifest's, or it is another rank's or
            attempt's.
        FormatTooNew: it was written by a newer version.
    """
    require_listed(data, manifest, rank, path=path)
    ref = manifest.fragments[rank]
    fragment = decode_fragment(data, path=path)
    listed = FragmentSummary.of(fragment, ref).identity, [file.size_bytes for file in fragment.files]
    if fragment.rank != rank or listed != (manifest.identity, ref.file_bytes):
        raise _wrong_fragment("is that of another rank or attempt", rank, path)
    return fragment


def require_listed(data: bytes, manifest: Manifest, rank: int, *, path: str) -> None:
    """Check the bytes of one rank's fragment against the manifest.

    Raises:
        CorruptCheckpoint: their size or digest differs from the manifest's.
    """
    ref = manifest.fragments[rank]
    if len(data) != ref.size_bytes:
        raise _wrong_fragment(f"has {len(data)} bytes where the manifest says {ref.size_bytes}", rank, path)
    if digest(data) != ref.digest:
        raise _wrong_fragment("differs from its digest in the manifest", rank, path)


def _wrong_fragment(problem: str, rank: int, path: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"the fragment {problem}", rank=rank, phase="read", path=path)


def _own_digest(manifest: Manifest) -> str:
    """Digest of all fields but `digest`."""
    return digest(encode_json({name: field for name, field in vars(manifest).items() if name != "digest"}))


def _stated_digest(data: bytes, manifest: Manifest, *, path: str) -> str:
    """What `data`, decoded to `manifest`, should state: with fields that this version does not know."""
    if encode_json(manifest) == data:
        return _own_digest(manifest)
    with decoding(MANIFEST_FORMAT, path=path):
        unsigned = msgspec.json.decode(data, type=dict[str, Any])
        unsigned.pop("digest", None)
        return digest(encode_json(unsigned))
