"""Marks: facts learned about a checkpoint after its commit (docs/format.md, section 11).

Owns their names, encoding and meaning. A mark is created exclusively and never rewritten, and no load ever needs
one: what cannot be read is skipped and logged. Written by the checkpointer, `load` and the
command line; read by the catalogue.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from dcp_ckpt.errors import ConfigError, CorruptCheckpoint, FormatTooNew, StorageNotFound
from dcp_ckpt.format.documents import FORMAT_VERSION, decode_document, encode_json
from dcp_ckpt.format.names import MARKS, StepDir
from dcp_ckpt.storage.base import Storage

__all__ = ["MARK_FORMAT", "MARK_KINDS", "Mark", "MarkKind", "is_bad", "is_pinned", "read_marks", "write_mark"]

log = logging.getLogger(__name__)

MARK_FORMAT = "dcp_ckpt.mark"
MarkKind = Literal["bad", "pin", "unpin", "suspect", "metrics"]
MARK_KINDS: tuple[MarkKind, ...] = ("bad", "pin", "unpin", "suspect", "metrics")

_NAME = re.compile(r"([a-z]+)-([0-9a-f]{16})\.json")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One fact about the checkpoint of one attempt.

    Args:
        kind: one of `MARK_KINDS`; a newer version may know more.
        detail: for `metrics` a map name -> typed value, else free (`reason`, ...).
    """

    kind: str
    epoch: int
    step: int
    attempt: str
    created_at: str
    detail: dict[str, Any] = field(default_factory=dict)
    format: str = MARK_FORMAT
    format_version: int = FORMAT_VERSION


def write_mark(
    storage: Storage,
    directory: StepDir,
    *,
    kind: MarkKind,
    epoch: int,
    step: int,
    attempt: str,
    detail: Mapping[str, Any] | None = None,
) -> Mark:
    """Record a fact about the checkpoint of `attempt` in `directory`. Durable on return. One rank calls it.

    Args:
        storage: rooted at the run.
        detail: plain JSON types; metrics encoded as typed values.

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
        created_at=datetime.now(UTC).isoformat(timespec="microseconds"),
        detail=dict(detail or {}),
    )
    name = f"{kind}-{secrets.token_hex(8)}.json"
    storage.make_directory(f"{MARKS}/{directory}")
    storage.create_exclusive(f"{MARKS}/{directory}/{name}", encode_json(mark))
    return mark


def read_marks(storage: Storage) -> dict[StepDir, tuple[Mark, ...]]:
    """All marks of a run by step directory, oldest first.

    Raises:
        StorageError: the run cannot be listed or read.
    """
    found: dict[StepDir, list[Mark]] = {}
    for info in storage.list(f"{MARKS}/"):
        parts = info.key.split("/")
        directory = StepDir.parse(parts[1]) if len(parts) == 3 else None
        if directory is None or not _NAME.fullmatch(parts[2]):
            continue
        try:
            mark = decode_document(storage.read(info.key), Mark, format=MARK_FORMAT, path=info.key)
        except (CorruptCheckpoint, FormatTooNew, StorageNotFound) as error:
            log.warning("skipping a mark that cannot be read: %s", error)
            continue
        found.setdefault(directory, []).append(mark)
    return {directory: tuple(sorted(marks, key=_age)) for directory, marks in found.items()}


def is_bad(marks: Sequence[Mark]) -> bool:
    """Whether the checkpoint is known to be damaged. There is no mark that takes this back."""
    return any(mark.kind == "bad" for mark in marks)


def is_pinned(marks: Sequence[Mark]) -> bool:
    """Whether the newest of the marks `pin` and `unpin` is a pin."""
    pins = sorted((mark for mark in marks if mark.kind in ("pin", "unpin")), key=_age)
    return bool(pins) and pins[-1].kind == "pin"


def _age(mark: Mark) -> tuple[str, bool]:
    # Of a pin and an unpin at the same moment the pin wins: keeping too much loses nothing.
    return mark.created_at, mark.kind == "pin"
