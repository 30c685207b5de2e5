"""Rank 0's part of a save: collect every rank's report, commit or refuse, and publish one verdict.

Runs on rank 0's background thread only (docs/format.md, section 8, steps 7 to 11). It decides the outcome for
all ranks; what happens after a commit (`.metadata`, retention) is the caller's.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import replace

from dcp_ckpt.coordination import MISSING, Channel, as_checkpoint_error, error_fields, error_from_fields
from dcp_ckpt.errors import (
    CheckpointError,
    CommitUnknown,
    Fenced,
    LoadError,
    SaveFailed,
    StorageError,
    StorageUnsuitable,
)
from dcp_ckpt.format.epoch import is_tombstone
from dcp_ckpt.format.fragment import FileEntry, Fragment, decode_fragment
from dcp_ckpt.format.manifest import FragmentSummary, Manifest, build_manifest, decode_manifest, summarize
from dcp_ckpt.format.names import MANIFEST, AttemptId, StepDir, data_file_name, fragment_name
from dcp_ckpt.lifecycle.commit import check_layouts, check_summaries, publish_manifest, read_fragments
from dcp_ckpt.lifecycle.epochs import require_newest
from dcp_ckpt.save.record import Report, SaveKeys, Verdict, from_message
from dcp_ckpt.storage.base import Storage

__all__ = ["Coordinator"]

log = logging.getLogger(__name__)


class Coordinator:
    """Commits the attempts of one epoch; `committed` is the newest manifest that it published.

    Args:
        max_described_chunks: tables with more chunks are not kept in memory; None keeps them all.
    """

    def __init__(
        self, storage: Storage, channel: Channel, *, epoch: int, max_described_chunks: int | None = -1
    ) -> None:
        self._storage = storage
        self._channel = channel
        self._epoch = epoch
        self._checked: tuple[str, ...] | None = None
        self._max_described_chunks = max_described_chunks
        self._tables: list[Fragment] | None = None
        self.committed: Manifest | None = None

    def conclude(
        self, keys: SaveKeys, *, step: int, directory: StepDir, attempt: AttemptId, deadline: float
    ) -> Verdict:
        """Wait for all ranks, then commit or refuse. Blocks until `deadline` (monotonic seconds) at most.

        Returns:
            The verdict. It is published by the caller once it has acted on it.
        """
        reports, silent = self._collect(keys, deadline)
        for rank in list(silent):
            if (summary := self._published(directory, attempt, rank)) is not None:
                log.warning("rank %d fell silent, but its writer finished step %d", rank, step)
                reports.append(Report(summary=summary))
                silent.remove(rank)
        try:
            self._raise_failures(reports, silent, step)
            summaries = [report.summary for report in reports if report.summary]
            summaries.sort(key=lambda summary: summary.rank)
            manifest = self._commit(directory, attempt, summaries)
        except (CommitUnknown, Fenced) as error:
            # Once fenced, the newer owner decides about what is there: it may be committing this attempt.
            return Verdict(outcome="unknown", error=error_fields(error))
        except CheckpointError as error:
            error.step = step if error.step is None else error.step
            outcome = "failed" if self._retract(directory, attempt, all_done=not silent) else "unknown"
            return Verdict(outcome=outcome, error=error_fields(error))
        except Exception as error:
            log.exception("the commit of step %d failed inside", step)
            return Verdict(outcome="unknown", error=error_fields(as_checkpoint_error(error, rank=0)))
        return Verdict(outcome="committed", total_bytes=manifest.total_bytes)

    def _collect(self, keys: SaveKeys, deadline: float) -> tuple[list[Report], list[int]]:
        wanted = [keys.report(rank) for rank in range(self._channel.world_size)]
        left = max(deadline - time.monotonic(), 0.0)
        found = self._channel.get_many(wanted, timeout_seconds=left)
        reports = [from_message(Report, message) for message in found if message is not MISSING]
        return reports, [rank for rank, message in enumerate(found) if message is MISSING]

    def _published(self, directory: StepDir, attempt: AttemptId, rank: int) -> FragmentSummary | None:
        """What a rank that did not report has on storage: its writer outlives its trainer and finishes."""
        key = f"{directory}/{fragment_name(rank, attempt)}"
        try:
            data = self._storage.read(key)
            fragment = decode_fragment(data, path=key)
            for index, file in enumerate(fragment.files):
                name = data_file_name(rank, index, attempt)
                if self._storage.size(f"{directory}/{name}") != file.size_bytes:
                    return None
        except (StorageError, LoadError) as error:
            log.debug("rank %d published nothing: %s", rank, error)
            return None
        return summarize(fragment, data)

    def _raise_failures(self, reports: list[Report], silent: list[int], step: int) -> None:
        failures = [error_from_fields(report.error) for report in reports if report.error is not None]
        if failures:
            first = failures[0]
            if len(failures) > 1:
                others = ", ".join(str(failure.rank) for failure in failures[1:])
                first.message += f" (rank(s) {others} failed too)"
            raise first
        if silent:
            raise SaveFailed(
                f"rank(s) {', '.join(map(str, silent))} did not finish the save in time: "
                "not called, stuck or dead",
                rank=silent[0],
                step=step,
                phase="write",
            )

    def _commit(self, directory: StepDir, attempt: AttemptId, summaries: list[FragmentSummary]) -> Manifest:
        problem = check_summaries(summaries) or self._layout_problem(directory, attempt, summaries)
        if problem:
            raise SaveFailed(problem, phase="commit", path=str(directory))
        require_newest(self._storage, self._epoch)
        manifest = build_manifest(summaries)
        publish_manifest(self._storage, directory, manifest)
        self.committed = manifest
        return manifest

    def described(self, own: Fragment) -> list[Fragment] | None:
        """All fragments of the newest commit, but for digests and other ranks' values: nothing is read.

        Args:
            own: rank 0's fragment of it.

        Returns:
            None when they have too many chunks.
        """
        if self._tables is None:
            return None
        return [own, *(replace(table, attempt=own.attempt) for table in self._tables[1:])]

    def _layout_problem(
        self, directory: StepDir, attempt: AttemptId, summaries: list[FragmentSummary]
    ) -> str | None:
        """Check whenever the ranks' layouts change that their chunks make up the tensors."""
        layouts = tuple(summary.layout for summary in summaries)
        if layouts == self._checked:
            return None
        fragments = self._read_fragments(directory, attempt, summaries)
        problem = check_layouts(fragments)
        if problem is None:
            self._checked = layouts
            self._tables = self._kept(fragments)
        return problem

    def _kept(self, fragments: list[Fragment]) -> list[Fragment] | None:
        limit = self._max_described_chunks
        if limit is not None and sum(len(fragment.chunks) for fragment in fragments) > limit:
            return None
        return [replace(fragment, files=_without_digests(fragment)) for fragment in fragments]

    def _read_fragments(
        self, directory: StepDir, attempt: AttemptId, summaries: list[FragmentSummary]
    ) -> list[Fragment]:
        """All fragments of an attempt, from storage."""
        sizes = [summary.ref.size_bytes for summary in summaries]
        found = read_fragments(self._storage, directory, attempt, range(len(summaries)), sizes)
        return [fragment for fragment, _ in found]

    def _retract(self, directory: StepDir, attempt: AttemptId, *, all_done: bool) -> bool:
        """Make a failure durable, so that no later start completes what was reported as failed.

        Without rank 0's fragment the attempt can never be committed. The space of the whole attempt is freed
        when no rank works on it any more.

        Returns:
            False when that could not be made sure of: the outcome is unknown then.
        """
        try:
            with suppress(StorageUnsuitable):  # a run that is gone has no other owner
                require_newest(self._storage, self._epoch)
            names = self._storage.list_names(f"{directory}/")
            if MANIFEST in names and self._holds(directory, attempt):
                return False
            self._storage.delete([f"{directory}/{fragment_name(0, attempt)}"])
            if all_done:
                self._storage.delete(f"{directory}/{name}" for name in names if f".{attempt}." in name)
                self._storage.remove_directory(str(directory))
        except (Fenced, StorageError, LoadError) as error:
            log.warning(
                "the failed attempt %s in %s could not be cleared away: %s", attempt, directory, error
            )
            return False
        return True

    def _holds(self, directory: StepDir, attempt: AttemptId) -> bool:
        """Whether the directory's manifest is that of the attempt."""
        key = f"{directory}/{MANIFEST}"
        data = self._storage.read(key)
        return not is_tombstone(data, path=key) and decode_manifest(data, path=key).attempt == str(attempt)


def _without_digests(fragment: Fragment) -> list[FileEntry]:
    return [replace(file, block_digests="") for file in fragment.files]
