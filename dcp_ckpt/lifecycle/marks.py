"""Marks: facts learned about a checkpoint after its commit (docs/format.md, section 11).

Owns their names, encoding and meaning. A mark is created exclusively and never rewritten; it is taken back
by another one that names it, so nothing depends on clocks. No load ever needs a mark: what cannot be read
is skipped and logged. Written by `load`; read by the catalogue and before a removal.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from dcp_ckpt.errors import ConfigError, CorruptCheckpoint, FormatTooNew, StorageExists, StorageNotFound
from dcp_ckpt.format.documents import FORMAT_VERSION, decode_document, encode_json
from dcp_ckpt.format.fields import Count, Identity, Version
from dcp_ckpt.format.names import MARKS, StepDir
from dcp_ckpt.lifecycle.epochs import utc_now
from dcp_ckpt.storage.base import Storage

__all__ = [
    "MARK_FORMAT",
    "MARK_KINDS",
    "Mark",
    "MarkKind",
    "active_marks",
    "is_pinned",
    "look_for_pin",
    "read_marks",
    "write_mark",
]

log = logging.getLogger(__name__)

MARK_FORMAT = "dcp_ckpt.mark"
MarkKind = Literal["bad", "pin", "unpin", "suspect", "metrics"]
MARK_KINDS: tuple[MarkKind, ...] = ("bad", "pin", "unpin", "suspect", "metrics")

_NAME = re.compile(r"[a-z]+-([0-9a-f]{32})\.json")

_FIRST_PIN_ID = "0" * 32
"""The id of the first pin of a step directory: whoever removes asks for this name and lists nothing."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One fact about the checkpoint of one attempt.

    Args:
        kind: one of `MARK_KINDS`; a newer version may know more.
        detail: for `metrics` a map name -> typed value, else free (`reason`, ...).
        cancels: ids of the marks that this one takes back.
        id: 32 random hex digits, part of the file's name and not of its content.
    """

    kind: Identity
    epoch: Count
    step: Count
    attempt: Identity
    created_at: str
    detail: dict[str, Any] = field(default_factory=dict)
    cancels: list[str] = field(default_factory=list)
    format: str = MARK_FORMAT
    format_version: Version = FORMAT_VERSION
    id: str = ""


def write_mark(
    storage: Storage,
    directory: StepDir,
    *,
    kind: MarkKind,
    epoch: int,
    step: int,
    attempt: str,
    detail: Mapping[str, Any] | None = None,
    cancels: Iterable[str] = (),
) -> Mark:
    """Record a fact about the checkpoint of `attempt` in `directory`. Durable on return. One rank calls it.

    Args:
        storage: rooted at the run.
        detail: plain JSON types; metrics encoded as typed values.
        cancels: ids of the marks to take back; for an unpin those of all active pins.

    Raises:
        ConfigError: an unknown kind.
        StorageError: it could not be written.
    """
    if kind not in MARK_KINDS:
        raise ConfigError(f"mark kind must be one of {', '.join(MARK_KINDS)}, not {kind!r}")
    mark = Mark(
        kind=kind,
        epoch=epoch,
        step=step,
        attempt=attempt,
        created_at=utc_now(),
        detail=dict(detail or {}),
        cancels=sorted(cancels),
        id=os.urandom(16).hex(),
    )
    document = encode_json({name: value for name, value in asdict(mark).items() if name != "id"})
    storage.make_directory(f"{MARKS}/{directory}")
    if kind == "pin":
        with suppress(StorageExists):
            _create(storage, _key(directory, kind, _FIRST_PIN_ID), document)
            return replace(mark, id=_FIRST_PIN_ID)
    _create(storage, _key(directory, kind, mark.id), document)
    return mark


def _create(storage: Storage, key: str, document: bytes) -> None:
    try:
        storage.create_exclusive(key, document)
    except StorageNotFound:
        # Marks are written beside the owner of a run: a start took our temporary file for a dead process's.
        storage.create_exclusive(key, document)


def _key(directory: StepDir, kind: str, mark_id: str) -> str:
    return f"{MARKS}/{directory}/{kind}-{mark_id}.json"


def look_for_pin(storage: Storage, directory: StepDir) -> bool:
    """Whether a pin stands in a step directory, by one small read where there never was one.

    Raises:
        StorageError: that could not be learned.
    """
    try:
        storage.read(_key(directory, "pin", _FIRST_PIN_ID))
    except StorageNotFound:
        return False
    return is_pinned(read_marks(storage, directory).get(directory, ()))


def read_marks(storage: Storage, directory: StepDir | None = None) -> dict[StepDir, tuple[Mark, ...]]:
    """All marks of a run, or of one step directory, by step directory, oldest first.

    Raises:
        StorageError: the run cannot be listed or read.
    """
    found: dict[StepDir, list[Mark]] = {}
    for info in storage.list(f"{MARKS}/" if directory is None else f"{MARKS}/{directory}/"):
        parts = info.key.split("/")
        marked = StepDir.parse(parts[1]) if len(parts) == 3 else None
        name = _NAME.fullmatch(parts[-1])
        if marked is None or name is None:
            continue
        try:
            mark = decode_document(storage.read(info.key), Mark, format=MARK_FORMAT, path=info.key)
        except (CorruptCheckpoint, FormatTooNew, StorageNotFound) as error:
            log.warning("skipping a mark that cannot be read: %s", error)
            continue
        found.setdefault(marked, []).append(replace(mark, id=name[1]))
    return {
        marked: tuple(sorted(marks, key=lambda mark: (mark.created_at, mark.id)))
        for marked, marks in found.items()
    }


def active_marks(marks: Sequence[Mark], kind: MarkKind) -> tuple[Mark, ...]:
    """The marks of one kind that no other mark takes back, in the order given."""
    cancelled = {mark_id for mark in marks for mark_id in mark.cancels}
    return tuple(mark for mark in marks if mark.kind == kind and mark.id not in cancelled)


def is_pinned(marks: Sequence[Mark]) -> bool:
    """Whether a pin stands that nobody took back."""
    return bool(active_marks(marks, "pin"))
