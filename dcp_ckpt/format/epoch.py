"""Epoch documents: the claim of one incarnation of a run, and what it resumed from.

docs/format.md, section 11.
"""

from __future__ import annotations

from dataclasses import dataclass

from dcp_ckpt.errors import LoadError
from dcp_ckpt.format.documents import FORMAT_VERSION, decode_document, encode_json
from dcp_ckpt.format.fields import Count, Identity, Version

__all__ = [
    "EPOCH_FORMAT",
    "RESUMED_FORMAT",
    "TOMBSTONE_FORMAT",
    "TOMBSTONE_MOST_BYTES",
    "EpochClaim",
    "Resumed",
    "Tombstone",
    "decode_epoch",
    "encode_epoch",
    "is_tombstone",
]

EPOCH_FORMAT = "dcp_ckpt.epoch"
RESUMED_FORMAT = "dcp_ckpt.resumed"
TOMBSTONE_FORMAT = "dcp_ckpt.tombstone"
TOMBSTONE_MOST_BYTES = 256
"""No tombstone is longer, and no manifest as short: its ids and digests alone have more bytes."""


@dataclass(frozen=True, kw_only=True)
class EpochClaim:
    """One start of the run; `epoch_id` is random, so a number that came twice is noticed."""

    run_id: Identity
    epoch: Count
    epoch_id: Identity
    world_size: Count
    host: str
    pid: Count
    created_at: str
    purpose: str
    format: str = EPOCH_FORMAT
    format_version: Version = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """From which checkpoint an epoch went on."""

    epoch: Count
    directory: Identity
    resumed_epoch: Count
    step: Count
    format: str = RESUMED_FORMAT
    format_version: Version = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True)
class Tombstone:
    """Closes the name `manifest.json` on an object store before data is deleted."""

    by_epoch: Count
    attempt: Identity
    format: str = TOMBSTONE_FORMAT
    format_version: Version = FORMAT_VERSION


def encode_epoch(document: EpochClaim | Resumed | Tombstone) -> bytes:
    return encode_json(document)


def decode_epoch(data: bytes, *, path: str) -> EpochClaim:
    """Decode an epoch's claim.

    Raises:
        CorruptCheckpoint, FormatTooNew: as `decode_document`.
    """
    return decode_document(data, EpochClaim, format=EPOCH_FORMAT, path=path)


def is_tombstone(data: bytes, *, path: str) -> bool:
    """Whether this stands in the place of a manifest to keep its name taken."""
    if len(data) > TOMBSTONE_MOST_BYTES:
        return False
    try:
        decode_document(data, Tombstone, format=TOMBSTONE_FORMAT, path=path)
    except LoadError:
        return False
    return True
