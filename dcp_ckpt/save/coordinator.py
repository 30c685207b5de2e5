"""Rank 0's part of a save: collect every rank's report, commit or refuse, and publish one verdict.

Runs on rank 0's background thread only (docs/format.md, section 8, steps 7 to 11). It decides the outcome for
all ranks; what happens after a commit (`.metadata`, retention) is the caller's.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial

from dcp_ckpt.coordination import MISSING, Channel, as_checkpoint_error, error_fields, error_from_fields
from dcp_ckpt.errors import (
    CheckpointError,
    CommitUnknown,
    Fenced,
    LoadError,
    SaveFailed,
    StorageError,
)
from dcp_ckpt.format.fragment import FileEntry, Fragment, decode_fragment
from dcp_ckpt.format.manifest import FragmentSummary, Manifest, build_manifest, summarize
from dcp_ckpt.format.names import AttemptId, StepDir, data_file_name, fragment_name
from dcp_ckpt.lifecycle.commit import (
    check_layouts,
    check_summaries,
    parts_agree,
    publish_manifest,
    read_fragments,
)
from dcp_ckpt.lifecycle.epochs import require_newest
from dcp_ckpt.lifecycle.retract import retract
from dcp_ckpt.save.deadlines import CONCLUDE_SECONDS, REPORT_SLACK_SECONDS
from dcp_ckpt.save.record import Report, SaveKeys, Verdict, from_messages
from dcp_ckpt.save.watch import Watchdog
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
        self._unbounded = storage
        self._storage = storage
        self._channel = channel
        self._epoch = epoch
        self._watching: Channel | None = None
        self._checked: tuple[tuple[str, str], ...] | None = None
        self._max_described_chunks = max_described_chunks
        self._tables: list[Fragment] | None = None
        self.committed: Manifest | None = None

    def conclude(
        self, keys: SaveKeys, *, step: int, directory: StepDir, attempt: AttemptId, deadline: float
    ) -> Verdict:
        """Wait for all ranks, then commit or refuse.

        Blocks until `deadline` (monotonic seconds) and a little longer: see `dcp_ckpt.save.deadlines`.

        Returns:
            The verdict. It is published by the caller once it has acted on it.
        """
        with Watchdog(partial(self._silent, keys), partial(self._warn, step, attempt)):
            reports, silent = self._collect(keys, deadline + REPORT_SLACK_SECONDS)
        # What came in time gets the rest of the time, and what came late a little.
        last = max(deadline, time.monotonic()) + CONCLUDE_SECONDS
        self._storage = self._unbounded.until(last)
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
            if isinstance(error, StorageError) and error.phase is None:
                # No rank reported it: it was met here, in the commit itself.
                error.rank, error.phase = 0, "commit"
            is_back = retract(self._storage, directory, attempt, epoch=self._epoch, all_done=not silent)
            outcome = "failed" if is_back else "unknown"
            return Verdict(outcome=outcome, error=error_fields(error))
        except Exception as error:
            log.exception("the commit of step %d failed inside", step)
            return Verdict(outcome="unknown", error=error_fields(as_checkpoint_error(error, rank=0)))
        return Verdict(
            outcome="committed", total_bytes=manifest.total_bytes, shared_bytes=manifest.shared_bytes
        )

    def _collect(self, keys: SaveKeys, deadline: float) -> tuple[list[Report], list[int]]:
        wanted = [keys.report(rank) for rank in range(self._channel.world_size)]
        left = max(deadline - time.monotonic(), 0.0)
        found = self._channel.get_many(wanted, timeout_seconds=left)
        reports = from_messages(Report, [message for message in found if message is not MISSING])
        return reports, [rank for rank, message in enumerate(found) if message is MISSING]

    def _silent(self, keys: SaveKeys) -> tuple[int, ...]:
        """The ranks that have not reported; on the watchdog's thread, over a connection of its own."""
        channel = self._watching = self._watching or self._channel.clone()
        ranks = range(channel.world_size)
        present = channel.present([keys.report(rank) for rank in ranks])
        return tuple(rank for rank in ranks if not present[rank])

    def _warn(self, step: int, attempt: AttemptId, silent: tuple[int, ...], seconds: float) -> None:
        if silent:
            log.warning(
                "the save of step %d (attempt %s) waits for rank(s) %s; none has reported for %.0f s",
                step, attempt, ", ".join(map(str, silent)), seconds,
            )  # fmt: skip

    def close(self) -> None:
        """Idempotent."""
        if self._watching is not None:
            self._watching.close()

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
            # What was decided for all of them, every rank reports as the one failure that it is.
            others = {failure.rank for failure in failures if failure.rank is not None} - {first.rank}
            if others:
                first.message += f" (rank(s) {', '.join(map(str, sorted(others)))} failed too)"
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
        problem = (
            _other_attempt(attempt, summaries)
            or check_summaries(summaries)
            or self._layout_problem(directory, attempt, summaries)
        )
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
        """Check whenever the ranks' layouts change that their tables make up tensors and values."""
        layouts = tuple((summary.layout, summary.aliases) for summary in summaries)
        if layouts == self._checked and parts_agree(summaries):
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


def _other_attempt(attempt: AttemptId, summaries: list[FragmentSummary]) -> str | None:
    """Why these are not of the attempt that is being concluded, though they may be of one."""
    others = {summary.rank: summary.attempt for summary in summaries if summary.attempt != str(attempt)}
    told = ", ".join(f"rank {rank} of {other}" for rank, other in others.items())
    return f"attempt {attempt} is under way, and reports came from {told}" if others else None


def _without_digests(fragment: Fragment) -> list[FileEntry]:
    return [replace(file, block_digests="") for file in fragment.files]
