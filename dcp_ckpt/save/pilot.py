"""The background thread of one rank: brings each staged save from the writer's reply to its verdict.

One save at a time, in order. Talks to other ranks over the channel only, never through a process group. Every
way out resolves the handle, so nobody waits for a save that nobody works on.
"""

from __future__ import annotations

import logging
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from dcp_ckpt.coordination import Channel, error_fields, error_from_fields
from dcp_ckpt.errors import CheckpointError, CoordinationError, SaveFailed
from dcp_ckpt.format.manifest import FragmentSummary
from dcp_ckpt.format.names import AttemptId, StepDir
from dcp_ckpt.policies import SaveCosts
from dcp_ckpt.save.bases import Bases
from dcp_ckpt.save.comparison import Comparison
from dcp_ckpt.save.coordinator import Coordinator
from dcp_ckpt.save.deadlines import CONCLUDE_SECONDS, REPORT_SLACK_SECONDS
from dcp_ckpt.save.handle import CheckpointInfo, SaveHandle
from dcp_ckpt.save.handover import Handover
from dcp_ckpt.save.observer import SaveObserver
from dcp_ckpt.save.record import Report, SaveKeys, Verdict, from_message, to_message
from dcp_ckpt.save.writer_link import WriterLink, describe
from dcp_ckpt.writer.progress import Progress

__all__ = ["Flight", "Pilot"]

log = logging.getLogger(__name__)

_MEASURED_SAVES = 5
"""One slow save says little about the next."""


@dataclass(frozen=True, kw_only=True)
class Flight:
    """One save under way on this rank.

    Args:
        handover: tells what the writer was given, or why it was given nothing; may not have ended yet.
        started, deadline: monotonic times of the call of `save()`, and of when it has failed.
        stall_seconds: how long `save()` held the training thread.
    """

    keys: SaveKeys
    step: int
    attempt: AttemptId
    directory: StepDir
    path: str
    handle: SaveHandle
    handover: Handover
    started: float
    deadline: float
    stall_seconds: float = 0.0
    created_at: str = ""
    metrics: dict[str, object] = field(default_factory=dict)
    tags: tuple[str, ...] = ()


class Pilot:
    """Owns the thread. `durable_seconds`: how long the newest committed save took to become durable.

    Args:
        channel: a connection of its own.
        link: this rank's writer.
        coordinator: on rank 0, else None.
        bases: learn of what is written and committed; None where nothing is reused.
        after_commit: on rank 0, called after the verdict of a committed save is out.
        observer: told of every outcome.
        timeout_seconds: for how much longer than it should take rank 0's verdict is waited for.
    """

    def __init__(
        self,
        channel: Channel,
        link: WriterLink,
        coordinator: Coordinator | None,
        bases: Bases | None,
        after_commit: Callable[[Flight], None],
        observer: SaveObserver,
        *,
        timeout_seconds: float,
    ) -> None:
        self._channel = channel
        self._link = link
        self._coordinator = coordinator
        self._bases = bases
        self._after_commit = after_commit
        self._observer = observer
        self._patience_seconds = timeout_seconds + REPORT_SLACK_SECONDS + CONCLUDE_SECONDS
        self._forgotten = 0
        self._comparison = Comparison(channel)
        self.durable_seconds: float | None = None
        self._measured: deque[tuple[float, float]] = deque(maxlen=_MEASURED_SAVES)
        self._flights: queue.SimpleQueue[Flight | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="dcp_ckpt-pilot", daemon=True)
        self._thread.start()

    @property
    def costs(self) -> SaveCosts | None:
        """Medians of the newest committed saves; None when there was none."""
        measured = list(self._measured)
        if not measured:
            return None
        stalls, durables = zip(*measured, strict=True)
        return SaveCosts(stall_seconds=statistics.median(stalls), durable_seconds=statistics.median(durables))

    def take(self, flight: Flight) -> None:
        """Accept a save. Does not block."""
        self._flights.put(flight)

    def close(self) -> None:
        """Finish all saves that were taken, and join the thread. Idempotent; bounded by their deadlines."""
        if self._closed:
            return
        self._closed = True
        self._flights.put(None)
        self._thread.join()
        if self._coordinator is not None:
            self._coordinator.close()
        self._channel.close()

    def _run(self) -> None:
        while (flight := self._flights.get()) is not None:
            try:
                self._fly(flight)
            except CheckpointError as error:
                self._resolve(flight, Verdict(outcome="unknown", error=error_fields(error)))
            except Exception as error:
                log.exception("the background thread failed in the save of step %d", flight.step)
                failure = SaveFailed(f"internal error: {error!r}", rank=self._channel.rank, step=flight.step)
                self._resolve(flight, Verdict(outcome="unknown", error=error_fields(failure)))
            finally:
                if self._bases is not None:
                    self._bases.ended(flight.attempt)

    def _fly(self, flight: Flight) -> None:
        flight.handover.wait()
        self._comparison.tell(flight.keys, flight.handover.replicas, failed=flight.handover.error is not None)
        report = self._report(flight)
        self._channel.put(flight.keys.report(self._channel.rank), to_message(report))
        if self._bases is not None and report.summary is not None:
            self._note_written(self._bases, flight, report.summary)
        if self._coordinator is None:
            # Rank 0 decides by its own deadline at the latest, and then has to act on storage. Its death is
            # noticed at once, so the patience here costs nothing.
            verdict = self._await_verdict(flight, flight.deadline + self._patience_seconds)
            self._forget(before=flight.keys.call, verdict=verdict)
            self._resolve(flight, verdict)
            return
        verdict = self._coordinator.conclude(
            flight.keys,
            step=flight.step,
            directory=flight.directory,
            attempt=flight.attempt,
            deadline=flight.deadline,
        )
        self._channel.put(flight.keys.verdict, to_message(verdict))
        self._forget(before=flight.keys.call, verdict=verdict)
        if self._bases is not None and verdict.outcome == "committed":
            # Before anything is tidied: from here on no save begins with an older base.
            self._bases.committed(flight.attempt, flight.directory)
        self._resolve(flight, verdict)
        if verdict.outcome == "committed":
            self._after_commit(flight)

    def _note_written(self, bases: Bases, flight: Flight, summary: FragmentSummary) -> None:
        """What this rank has stored may be shared by later saves."""
        wanted = flight.handover.fragment
        if wanted is not None and wanted.shared_bytes > summary.ref.shared_bytes:
            log.warning(
                "%s could not be shared with older checkpoints: the file system refuses hard links, and rank "
                "%d copied %d bytes", flight.path, self._channel.rank, wanted.shared_bytes,
            )  # fmt: skip
        bases.written(flight.attempt, flight.directory, summary.ref)

    def _forget(self, *, before: int, verdict: Verdict) -> None:
        """Free this rank's messages of earlier calls: whoever reported to this one has read them.

        Each rank its own: rank 0 would ask the store once for each rank of a large world.
        """
        if verdict.outcome != "committed":
            return
        for call in range(self._forgotten + 1, before):
            self._channel.forget(SaveKeys(call).told_by(self._channel.rank))
        self._forgotten = before - 1
        self._comparison.forget(before=before)

    def _report(self, flight: Flight) -> Report:
        """What this rank has to say: its fragment is durable, or why it is not."""
        rank = self._channel.rank
        try:
            # Asked by name: after a failed staging, the job under way may be that of the save after.
            if self._link.is_writing(str(flight.attempt)):
                ref = self._link.wait(
                    str(flight.attempt), deadline=flight.deadline, still=partial(self._warn, flight)
                )
            if flight.handover.error is not None:
                raise flight.handover.error
            assert flight.handover.fragment is not None, "handed over, or failed with an error"
            self._comparison.require_same(
                flight.keys, flight.handover.replicas, step=flight.step, deadline=flight.deadline
            )
            return Report(summary=FragmentSummary.of(flight.handover.fragment, ref))
        except CheckpointError as error:
            error.rank = rank if error.rank is None else error.rank
            error.step = flight.step if error.step is None else error.step
            return Report(error=error_fields(error))

    def _warn(self, flight: Flight, progress: Progress | None, seconds: float) -> None:
        log.warning(
            "the save of step %d does not move: rank %d, attempt %s, %s: %s; nothing for %.0f s",
            flight.step, self._channel.rank, flight.attempt, flight.path, describe(progress), seconds,
        )  # fmt: skip

    def _await_verdict(self, flight: Flight, deadline: float) -> Verdict:
        try:
            message = self._channel.get(
                flight.keys.verdict, timeout_seconds=max(deadline - time.monotonic(), 0.0)
            )
        except TimeoutError as error:
            raise CoordinationError(
                "rank 0 published no verdict in time; whether the checkpoint was committed is not known here",
                rank=self._channel.rank,
                step=flight.step,
                phase="commit",
            ) from error
        return from_message(Verdict, message)

    def _resolve(self, flight: Flight, verdict: Verdict) -> None:
        if flight.handle.outcome != "pending":
            return
        durable_seconds = time.monotonic() - flight.started
        if verdict.error is not None:
            error = error_from_fields(verdict.error)
            if self._channel.rank == 0 or error.rank == self._channel.rank:
                log.error("the save of step %d is not a checkpoint: %s", flight.step, error)
            flight.handle.resolve(verdict.outcome, error=error)
            self._observer.ended(flight.handle)
            return
        info = CheckpointInfo(
            step=flight.step,
            path=flight.path,
            bytes=verdict.total_bytes,
            stall_seconds=flight.stall_seconds + flight.handover.fence_seconds,
            durable_seconds=durable_seconds,
            metrics=flight.metrics,
            tags=flight.tags,
            world_size=self._channel.world_size,
            created_at=flight.created_at,
            shared_bytes=verdict.shared_bytes,
        )
        self.durable_seconds = durable_seconds
        self._measured.append((info.stall_seconds, durable_seconds))
        if self._channel.rank == 0:
            shared = f" ({info.shared_bytes} of them shared)" if info.shared_bytes else ""
            log.info(
                "saved step %d: %d bytes%s, stall %.3f s, durable after %.3f s, %s",
                info.step, info.bytes, shared, info.stall_seconds, info.durable_seconds, info.path,
            )  # fmt: skip
        flight.handle.resolve(verdict.outcome, info=info)
        self._observer.ended(flight.handle)
