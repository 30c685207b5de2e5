"""What trainer and writer say to each other: small JSON packets over a SOCK_SEQPACKET pair.

Large things travel as file descriptors: the arena (a memfd with the bytes of the data file) and the job
itself (a memfd with its JSON), so a packet always fits the socket buffer and `save()` never blocks on a busy
writer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dcp_ckpt.format.documents import decoder_of, encode_json
from dcp_ckpt.format.fragment import Fragment

__all__ = [
    "MAX_PACKET_BYTES",
    "FileSource",
    "Payload",
    "Probe",
    "Reply",
    "Request",
    "Sight",
    "WriteJob",
    "decode_reply",
    "decode_request",
    "encode",
]

MAX_PACKET_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What rank 0 wrote, for other ranks to find: the probe `key` in what rank 0 calls `storage_url`."""

    key: str
    storage_url: str


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A small object with which a writer tries the storage out.

    Args:
        key: a temporary name with a random token; the content follows from it.
        rank: of this writer, for messages.
        direct_io: as for data.
        stays: for others to find, until `end_probe`; else it is deleted at once.
        sight: what has to be there besides.
    """

    key: str
    rank: int
    direct_io: bool
    stays: bool
    sight: Sight | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One packet to the writer.

    Args:
        kind: `open` (get ready for `storage_url`; the one request without a reply), `probe` (try it out),
            `end_probe` (delete the probe `key`), `lease` (give up the lease held, and hold `key` of
            `storage_url` unless it is empty), or `write` (a job follows as two file descriptors: the arena,
            then the job's JSON).
        probe: what to try.
        failed: with `end_probe`: the start has failed, and leaves nothing.
        job_bytes: length of the job's JSON.
    """

    kind: str
    storage_url: str = ""
    key: str = ""
    probe: Probe | None = None
    failed: bool = False
    job_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """Where one data file comes from: a stretch of the arena, or else a file that an older checkpoint has.

    Args:
        arena_offset: of its first byte.
        shared_key: in the run; then size, digests and origin are in the fragment already.
    """

    arena_offset: int = 0
    shared_key: str = ""


@dataclass(frozen=True, kw_only=True)
class Payload:
    """What the digest of a chunk's payload is, or is made of.

    Args:
        dtype: torch's name, without `torch.`.
        digest: of a chunk in a shared file; empty: to be made from the arena.
    """

    dtype: str
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class WriteJob:
    """One rank's part of one attempt.

    Args:
        storage_url: the run directory.
        directory: the step directory's name.
        fragment: complete but for the digests of what is in the arena; `files` have their sizes.
        sources: one for each of the fragment's files.
        payloads: one for each of its chunks where payloads are digested, else none.
        direct_io: write past the page cache where the storage can.
        deadline: monotonic seconds, the same clock in all processes of a host: a store is asked nothing after
            it. None: no end.
    """

    storage_url: str
    directory: str
    fragment: Fragment
    sources: list[FileSource]
    direct_io: bool
    payloads: list[Payload] = field(default_factory=list)
    deadline: float | None = None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to one request, in order of the requests.

    Args:
        attempt: that of the job, empty for other requests.
        fragment_bytes, digest, file_bytes, shared_bytes: of the published fragment and its data files.
        error_kind, error, path, errno: set when it failed; `error_kind` names a class of dcp_ckpt.errors.
    """

    attempt: str = ""
    fragment_bytes: int = 0
    digest: str = ""
    file_bytes: list[int] = field(default_factory=list)
    shared_bytes: int = 0
    error_kind: str = ""
    error: str = ""
    path: str | None = None
    errno: int | None = None


def encode(packet: Request | Reply) -> bytes:
    return encode_json(packet)


def decode_request(data: bytes) -> Request:
    return decoder_of(Request).decode(data)


def decode_reply(data: bytes) -> Reply:
    return decoder_of(Reply).decode(data)
