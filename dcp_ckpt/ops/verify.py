"""Verify: is every byte of a checkpoint, or of all checkpoints of a run, still what was written?

Reads everything once, block by block, in bounded memory, and reports every problem with what it touches.
Changes nothing and needs no torch. Called by the command line and by users' own maintenance jobs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal

from dcp_ckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    FormatTooNew,
    StorageError,
    StorageNotFound,
    StorageTransient,
)
from dcp_ckpt.format.consistency import chunk_problem
from dcp_ckpt.format.fragment import Fragment
from dcp_ckpt.format.manifest import Manifest
from dcp_ckpt.format.names import MANIFEST, data_file_name, fragment_name
from dcp_ckpt.format.values import decode_value
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.lifecycle.commit import check_layouts
from dcp_ckpt.lifecycle.no_run import not_a_run
from dcp_ckpt.ops.blocks import FileCheck, check_file
from dcp_ckpt.ops.checkpoint import read_fragment, read_manifest
from dcp_ckpt.ops.refs import parse_ref, resolve_ref, split_location
from dcp_ckpt.ops.stock import StockCheckpoint, open_stock_checkpoint
from dcp_ckpt.ops.touched import FileMap, Touched
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.wording import shown_names

__all__ = [
    "Problem",
    "ProblemKind",
    "Skipped",
    "VerifiedCheckpoint",
    "VerifyProgress",
    "VerifyReport",
    "verify",
]

ProblemKind = Literal[
    "manifest",
    "fragment",
    "missing",
    "truncated",
    "trailing",
    "block",
    "container",
    "unreadable",
    "unchecked",
]
"""`unchecked`: nothing is known, since reading was not allowed or the storage did not answer."""

_MOST_NAMES = 10

VerifyProgress = Callable[[int, int], None]
"""Called as `(done_bytes, total_bytes)` of data files, by one thread at a time."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Args:
        path: the file, relative to the run (or to the parent of the checkpoint directory).
        block: number of the damaged 1 MiB block.
        start: first affected byte, if bytes are affected.
        stop: one after the last affected byte.
        tensors: names of the tensors stored there; empty for padding, or when the fragment cannot tell.
        values: names of the replicated values whose copy for stock readers is stored there.
    """

    kind: ProblemKind
    path: str
    message: str
    block: int | None = None
    start: int | None = None
    stop: int | None = None
    tensors: tuple[str, ...] = ()
    values: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = "" if self.block is None else f"block {self.block}, "
        where += "" if self.start is None else f"bytes {self.start} to {self.stop}: "
        touched = [f"tensor {name}" for name in self.tensors]
        touched += [f"value {name}" for name in self.values]
        return f"{self.path}: {where}{self.message}" + (
            f"; touches {shown_names(touched, most=_MOST_NAMES)}" if touched else ""
        )


@dataclass(frozen=True, kw_only=True)
class VerifiedCheckpoint:
    """What was checked of one checkpoint, and everything that is wrong with it.

    Args:
        unverified: what could not be checked; empty for checkpoints of ours.
    """

    directory: str
    step: int | None
    num_files: int
    num_bytes: int
    problems: tuple[Problem, ...]
    unverified: str = ""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A step directory that was not checked, since it is no checkpoint or cannot be read by this version."""

    directory: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The result for one checkpoint or for a whole run."""

    checkpoints: tuple[VerifiedCheckpoint, ...]
    skipped: tuple[Skipped, ...] = ()

    @property
    def problems(self) -> tuple[Problem, ...]:
        return tuple(problem for checked in self.checkpoints for problem in checked.problems)

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def is_damaged(self) -> bool:
        """Something is wrong with what is stored, and not only with reading it."""
        return any(problem.kind != "unchecked" for problem in self.problems)


def verify(target: str | os.PathLike[str], *, progress: VerifyProgress | None = None) -> VerifyReport:
    """Check all bytes of one checkpoint or of every checkpoint of a run. Never stops at the first problem.

    Args:
        target: a reference as in `open_checkpoint`, or the directory or URL of a run. Of a stock DCP
            checkpoint, which has no digests, only sizes and the structure of containers are checked.
        progress: told how far it is; what it raises ends it. A stock checkpoint is not told of.

    Raises:
        CheckpointNotFound: there is no such checkpoint or run.
        FormatTooNew: the one checkpoint asked for was written by a newer version.
        StorageError: the run could not be listed.
    """
    if parse_ref(target) is None:
        root, directory = split_location(os.fspath(target))
        with closing(open_storage(root)) as storage:
            if _exists(storage, f"{directory}/{MANIFEST}"):
                return _report([_verify_directory(storage, directory, progress)])
        stock = open_stock_checkpoint(target)
        if stock is not None:
            with stock:
                return _report([_verify_stock(stock)])
        return _verify_run(target, progress)
    try:
        location = resolve_ref(target)
    except CorruptCheckpoint as error:
        return _report([_unusable(error.path or os.fspath(target), error)])
    with closing(open_storage(location.root)) as storage:
        return _report([_verify_directory(storage, location.directory, progress)])


def _report(checked: list[VerifiedCheckpoint]) -> VerifyReport:
    return VerifyReport(checkpoints=tuple(checked))


def _verify_run(target: str | os.PathLike[str], progress: VerifyProgress | None) -> VerifyReport:
    checked: list[VerifiedCheckpoint] = []
    skipped: list[Skipped] = []
    with closing(open_storage(os.fspath(target))) as storage:
        catalogue = read_catalogue(storage)
        if catalogue.run is None and not catalogue.entries and not catalogue.rejected:
            raise not_a_run(storage, os.fspath(target))
        for rejected in catalogue.rejected:
            if rejected.state == "unreadable" and not rejected.is_too_new:
                checked.append(_unusable(f"{rejected.directory}/{MANIFEST}", rejected.error))
            else:
                skipped.append(Skipped(directory=str(rejected.directory), reason=rejected.reason))
        meter = _Meter(progress, sum(entry.manifest.total_bytes for entry in catalogue.entries))
        for entry in catalogue.entries:
            directory = str(entry.directory)
            try:
                checked.append(_verify_manifest(storage, directory, entry.manifest, meter))
            except CheckpointNotFound as error:
                skipped.append(Skipped(directory=directory, reason=error.message))
    checked.sort(key=lambda one: one.directory)
    return VerifyReport(checkpoints=tuple(checked), skipped=tuple(skipped))


def _verify_directory(
    storage: Storage, directory: str, progress: VerifyProgress | None
) -> VerifiedCheckpoint:
    try:
        manifest = read_manifest(storage, directory)
    except CorruptCheckpoint as error:
        return _unusable(f"{directory}/{MANIFEST}", error)
    return _verify_manifest(storage, directory, manifest, _Meter(progress, manifest.total_bytes))


def _verify_stock(stock: StockCheckpoint) -> VerifiedCheckpoint:
    problems = [
        Problem(kind="container", path=error.path or stock.directory, message=error.message)
        for error in stock.check_structure()
    ]
    return VerifiedCheckpoint(
        directory=stock.directory,
        step=stock.step,
        num_files=1 + stock.num_files,
        num_bytes=0 if problems else stock.num_bytes,
        problems=tuple(problems),
        unverified=stock.unverified,
    )


def _unusable(path: str, error: CheckpointError) -> VerifiedCheckpoint:
    kind: ProblemKind = _kind(error) if isinstance(error, StorageError) else "manifest"
    problem = Problem(kind=kind, path=path, message=error.message)
    directory = path.removesuffix(f"/{MANIFEST}")
    return VerifiedCheckpoint(directory=directory, step=None, num_files=0, num_bytes=0, problems=(problem,))


class _Meter:
    """How far a check is. A file counts as done after its check, however much of it could be read."""

    def __init__(self, progress: VerifyProgress | None, total_bytes: int) -> None:
        self._progress = progress
        self._total_bytes = total_bytes
        self._done_bytes = self._ended_bytes = 0

    def read(self, num_bytes: int) -> None:
        """So many bytes more of the file were checked."""
        self._done_bytes += num_bytes
        self._tell()

    def ended(self, size_bytes: int) -> None:
        """The check of a file of this size is over."""
        self._done_bytes = self._ended_bytes = self._ended_bytes + size_bytes
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)


def _verify_manifest(
    storage: Storage, directory: str, manifest: Manifest, meter: _Meter
) -> VerifiedCheckpoint:
    """Check everything that a valid manifest names.

    Raises:
        CheckpointNotFound: it was deleted meanwhile.
    """
    problems: list[Problem] = []
    fragments: list[Fragment] = []
    for rank in range(manifest.world_size):
        problems.extend(_check_rank(storage, directory, manifest, rank, fragments, meter))
    if len(fragments) == manifest.world_size:
        problems.extend(_check_tables(directory, fragments))
    lost = any(problem.kind == "missing" for problem in problems)
    if lost and not _exists(storage, f"{directory}/{MANIFEST}"):
        raise CheckpointNotFound("deleted while reading", step=manifest.step, path=directory)
    return VerifiedCheckpoint(
        directory=directory,
        step=manifest.step,
        num_files=1 + manifest.world_size + sum(len(ref.file_bytes) for ref in manifest.fragments),
        num_bytes=manifest.total_bytes + sum(ref.size_bytes for ref in manifest.fragments),
        problems=tuple(problems),
    )


def _check_rank(
    storage: Storage,
    directory: str,
    manifest: Manifest,
    rank: int,
    fragments: list[Fragment],
    meter: _Meter,
) -> Iterator[Problem]:
    """Check one rank's fragment, which is added to `fragments`, and its data files."""
    key = f"{directory}/{fragment_name(rank, manifest.attempt_id)}"
    fragment: Fragment | None = None
    try:
        fragment = read_fragment(storage, directory, manifest, rank)
        fragments.append(fragment)
    except StorageNotFound:
        yield Problem(kind="missing", path=key, message="the fragment is missing")
    except StorageError as error:
        yield Problem(kind=_kind(error), path=key, message=error.message)
    except (CorruptCheckpoint, FormatTooNew) as error:
        yield Problem(kind="fragment", path=key, message=error.message)
    for index, size_bytes in enumerate(manifest.fragments[rank].file_bytes):
        name = data_file_name(rank, index, manifest.attempt_id)
        # Without its fragment a file's blocks have no digests, but its size is in the manifest.
        entry = fragment.files[index] if fragment and index < len(fragment.files) else None
        digests = entry.block_digests if entry and entry.size_bytes == size_bytes else ""
        check = check_file(storage, f"{directory}/{name}", size_bytes, digests, checked=meter.read)
        meter.ended(size_bytes)
        yield from _describe(check, FileMap(fragment, index), note="" if entry is None else entry.shared_note)


def _check_tables(directory: str, fragments: Sequence[Fragment]) -> Iterator[Problem]:
    """Whether chunks and values make sense: their bytes may well be those that were written."""
    tensors = {entry.name: entry for fragment in fragments for entry in fragment.tensors}
    whole = True
    for fragment in fragments:
        key = f"{directory}/{fragment_name(fragment.rank, fragment.attempt_id)}"
        for chunk in fragment.chunks:
            entry = tensors.get(chunk.tensor)
            if entry is not None and (wrong := chunk_problem(entry, chunk)):
                whole = False
                yield Problem(kind="fragment", path=key, message=wrong, tensors=(chunk.tensor,))
        for name, value in (*fragment.values.items(), *fragment.per_rank.items()):
            try:
                decode_value(value.value, path=name)
            except CorruptCheckpoint as error:
                yield Problem(kind="fragment", path=key, message=error.message, values=(name,))
    if whole and (wrong := check_layouts(fragments)):
        yield Problem(kind="fragment", path=directory, message=wrong)


def _describe(check: FileCheck, file_map: FileMap, *, note: str) -> Iterator[Problem]:
    """Problems of one data file, in the terms of what is stored in it.

    Args:
        note: who else has the file.
    """
    for problem in _problems_of(check, file_map):
        yield replace(problem, message=problem.message + note)


def _problems_of(check: FileCheck, file_map: FileMap) -> Iterator[Problem]:
    size_bytes = check.size_bytes
    if check.found_bytes is None:
        kind: ProblemKind = "missing" if check.error is None else _kind(check.error)
        message = f"the file is {'missing' if check.error is None else f'{kind}: {check.error.message}'}"
        yield _located(kind, check.key, message, None, (0, size_bytes), file_map)
        return
    if check.found_bytes > size_bytes:
        message = f"{check.found_bytes - size_bytes} bytes too many: {check.found_bytes}, not {size_bytes}"
        yield _located("trailing", check.key, message, None, (size_bytes, check.found_bytes), file_map)
    if check.found_bytes < size_bytes:
        message = f"truncated: {check.found_bytes} of {size_bytes} bytes"
        yield _located("truncated", check.key, message, None, (check.lost_from, size_bytes), file_map)
    for bad in check.bad_blocks:
        kind = "block" if bad.error is None else _kind(bad.error)
        message = "differs from its digest" if bad.error is None else f"{kind}: {bad.error.message}"
        yield _located(kind, check.key, message, bad.block, (bad.start, bad.stop), file_map)


def _kind(error: StorageError) -> ProblemKind:
    says_nothing = isinstance(error, StorageTransient) or error.errno in (errno.EACCES, errno.EPERM)
    return "unchecked" if says_nothing else "unreadable"


def _located(
    kind: ProblemKind,
    path: str,
    message: str,
    block: int | None,
    span: tuple[int, int],
    file_map: FileMap,
) -> Problem:
    touched: Touched = file_map.touched(*span)
    return Problem(
        kind=kind,
        path=path,
        message=message,
        block=block,
        start=span[0],
        stop=span[1],
        tensors=touched.tensors,
        values=touched.values,
    )


def _exists(storage: Storage, key: str) -> bool:
    try:
        storage.size(key)
    except StorageNotFound:
        return False
    return True
