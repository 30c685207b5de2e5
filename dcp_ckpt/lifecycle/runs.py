"""Runs: their identity document, their numbers, and which one a start continues (docs/format.md, section 11).

Owns `run.json` and the choice between resuming and starting anew. Knows nothing of ranks and reads no
environment: one process decides (rank 0 under a launcher) and the caller passes the answer on. Called by
`dcp_ckpt.runs`, the checkpointer and the command line.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

from dcp_ckpt.errors import (
    CheckpointNotFound,
    ConfigError,
    CorruptCheckpoint,
    FormatTooNew,
    StorageExists,
    StorageNotFound,
)
from dcp_ckpt.format.documents import FORMAT_VERSION, decode_document, encode_json
from dcp_ckpt.format.fields import Count, Identity, Version
from dcp_ckpt.format.names import EPOCHS, RUN_JSON, parse_epoch_name, parse_run_name, run_name
from dcp_ckpt.lifecycle.epochs import utc_now
from dcp_ckpt.lifecycle.provenance import command_line, git_state, host_name, package_versions
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.base import Storage

__all__ = [
    "RUN_FORMAT",
    "Resume",
    "Run",
    "RunDocument",
    "RunParent",
    "ensure_run",
    "list_runs",
    "open_run",
    "read_run",
]

log = logging.getLogger(__name__)

RUN_FORMAT = "dcp_ckpt.run"
Resume = Literal["auto", "never", "must"] | int


@dataclass(frozen=True, kw_only=True)
class RunParent:
    """The checkpoint of another run that this run began from.

    Args:
        run: the name of a run beside this one, or a path or URL.
        run_id, epoch, step: which run and checkpoint it was, wherever it is moved.
    """

    run: str
    run_id: Identity
    epoch: Count
    step: Count


@dataclass(frozen=True, kw_only=True)
class RunDocument:
    """`run.json`: who this run is and where it comes from. Written once.

    Args:
        number: 0 for a bare directory whose name is not `run-NNN`.
        config: whatever JSON the training program wants to remember.
        git: `{"commit": str, "dirty": bool or None}`, where the start was inside of a git checkout.
        versions: package name -> version.
        command: the program that started it, and its arguments, without the secrets among them.
    """

    run_id: Identity
    number: Count
    name: str | None
    created_at: str
    config: dict[str, Any]
    parent: RunParent | None
    host: str
    git: dict[str, Any] | None
    versions: dict[str, str]
    command: list[str] = field(default_factory=list)
    format: str = RUN_FORMAT
    format_version: Version = FORMAT_VERSION


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as a start sees it.

    Args:
        path: directory or URL; what `Checkpointer` takes.
        number: that of its name `run-NNN`.
        start: which start of the run this is, from 1, counted when it was opened; the epoch itself
            is claimed later.
        is_new: it was created by this call.
        document: `run.json`: the settings it began with (`config`), git commit, versions, command, parent.
    """

    path: str
    number: int
    start: int
    is_new: bool
    document: RunDocument = field(repr=False)

    @property
    def run_id(self) -> str:
        return self.document.run_id

    @property
    def name(self) -> str | None:
        return self.document.name


def read_run(storage: Storage) -> RunDocument | None:
    """The identity of the run at the root of `storage`, or None when there is no `run.json`.

    Raises:
        CorruptCheckpoint, FormatTooNew: it is there and cannot be read.
    """
    return _read(storage, RUN_JSON)


def ensure_run(storage: Storage) -> RunDocument:
    """Read `run.json`, or create a minimal one: for a checkpointer that was given a bare directory.

    Safe to call from several processes at once; all get the same document. Blocks on storage only.

    Raises:
        CorruptCheckpoint, FormatTooNew: it is there and cannot be read.
        StorageError: it could not be written.
    """
    document = read_run(storage)
    if document is not None:
        return document
    number = parse_run_name(storage.url.rstrip("/").rsplit("/", 1)[-1]) or 0
    # Makes the run's own directory too; files are never created in one that is missing.
    storage.make_directory(EPOCHS)
    try:
        return _create(storage, RUN_JSON, number=number, name=None, config={}, parent=None)
    except StorageExists:
        document = read_run(storage)
        assert document is not None, "somebody else has just created it, and nobody deletes it"
        return document


def open_run(
    base: str | os.PathLike[str],
    *,
    resume: Resume = "auto",
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    parent: RunParent | None = None,
) -> Run:
    """Choose the run to continue, or create the next one. Under a launcher only rank 0 calls this.

    Two processes that create at the same moment get two numbers.

    Args:
        base: directory or URL that holds the runs.
        resume: "auto": the newest run under `base`, or a new one when there is none; "must": the newest run;
            "never": a new run; an int: the run of that number.
        name: of a new run; a run that is continued keeps its own.
        config: JSON types; recorded in a new run as it is, so leave secrets out.
        parent: where a new run begins from.

    Raises:
        ConfigError: `resume` is none of these.
        CheckpointNotFound: there is no such run; the message lists those that exist.
        StorageError: it could not be listed or written.
    """
    if type(resume) is not int and resume not in ("auto", "never", "must"):
        raise ConfigError(f"resume must be 'auto', 'never', 'must' or a run number, not {resume!r}")
    with closing(open_storage(base)) as storage:
        if resume != "never":
            found = [run for run in _runs(storage, base) if resume in ("auto", "must", run.number)]
            if found:
                _note_name(found[-1], name)
                return found[-1]
            if resume != "auto":
                raise _no_such_run(storage, base, resume)
        return _create_next(storage, base, name=name, config=config, parent=parent)


def list_runs(base: str | os.PathLike[str]) -> tuple[Run, ...]:
    """All runs under `base` in ascending order of number; those whose `run.json` cannot be read are logged.

    Raises:
        StorageError: it could not be listed.
    """
    with closing(open_storage(base)) as storage:
        return tuple(_runs(storage, base))


def _runs(storage: Storage, base: str | os.PathLike[str]) -> list[Run]:
    """All readable runs in ascending order of number."""
    found = []
    for number in _numbers(storage):
        try:
            document = _read(storage, f"{run_name(number)}/{RUN_JSON}")
        except (CorruptCheckpoint, FormatTooNew) as error:
            log.warning("leaving %s out: %s", run_name(number), error)
            continue
        if document is not None:
            found.append(_run(storage, base, number, document, is_new=False))
    return found


def _numbers(storage: Storage) -> list[int]:
    names = [name.removesuffix("/") for name in storage.list_names("") if name.endswith("/")]
    return sorted(number for name in names if (number := parse_run_name(name)) is not None)


def _run(
    storage: Storage, base: str | os.PathLike[str], number: int, document: RunDocument, *, is_new: bool
) -> Run:
    names = storage.list_names(f"{run_name(number)}/{EPOCHS}/")
    epochs = [epoch for name in names if (epoch := parse_epoch_name(name)) is not None]
    path = f"{os.fspath(base).rstrip('/')}/{run_name(number)}"
    return Run(path=path, number=number, start=max(epochs, default=0) + 1, is_new=is_new, document=document)


def _create_next(
    storage: Storage,
    base: str | os.PathLike[str],
    *,
    name: str | None,
    config: Mapping[str, Any] | None,
    parent: RunParent | None,
) -> Run:
    # Directories without a run.json count too: whoever made one may be about to write it.
    number = max(_numbers(storage), default=0) + 1
    while True:
        storage.make_directory(run_name(number))
        key = f"{run_name(number)}/{RUN_JSON}"
        try:
            document = _create(
                storage, key, number=number, name=name, config=dict(config or {}), parent=parent
            )
        except StorageExists:
            number += 1
            continue
        return _run(storage, base, number, document, is_new=True)


def _create(
    storage: Storage,
    key: str,
    *,
    number: int,
    name: str | None,
    config: dict[str, Any],
    parent: RunParent | None,
) -> RunDocument:
    document = RunDocument(
        run_id=os.urandom(16).hex(),
        number=number,
        name=name,
        created_at=utc_now(),
        config=config,
        parent=parent,
        host=host_name(),
        git=git_state(),
        versions=package_versions(),
        command=command_line(),
    )
    try:
        data = encode_json(document)
    except TypeError as error:
        raise ConfigError(f"the config of a run must consist of JSON types: {error}") from error
    storage.require_exclusive_create()
    storage.create_exclusive(key, data)
    return document


def _read(storage: Storage, key: str) -> RunDocument | None:
    try:
        data = storage.read(key)
    except StorageNotFound:
        return None
    return decode_document(data, RunDocument, format=RUN_FORMAT, path=key)


def _note_name(run: Run, name: str | None) -> None:
    if name is not None and name != run.name:
        log.warning("continuing %s, whose name is %r; %r is for new runs only", run.path, run.name, name)


def _no_such_run(storage: Storage, base: str | os.PathLike[str], resume: Resume) -> CheckpointNotFound:
    numbers = ", ".join(str(number) for number in _numbers(storage)) or "none"
    wanted = "no run to resume" if resume == "must" else f"no run {resume}"
    return CheckpointNotFound(f"{wanted}; existing runs: {numbers}", phase="choose", path=os.fspath(base))
