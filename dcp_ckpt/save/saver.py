"""The saver: one call of `save()`, from rank 0's decision to the job in the writer's hands.

Runs on the main thread of every rank; with `overlap="step"` its end, from the copy of parameters and moments
on, on the fence's. What comes after is the pilot's. In a steady save it copies payload and sends two small
messages: no plan, no collective, no storage access.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dcp_ckpt.config import CheckpointConfig
from dcp_ckpt.coordination import Channel, as_checkpoint_error, error_fields, error_from_fields
from dcp_ckpt.errors import CheckpointError, CoordinationError, Fenced
from dcp_ckpt.format.epoch import EpochClaim
from dcp_ckpt.format.names import AttemptId, StepDir
from dcp_ckpt.lifecycle.epochs import utc_now
from dcp_ckpt.policies import SaveCosts
from dcp_ckpt.save.bases import Bases
from dcp_ckpt.save.deadlines import WRITER_END_SECONDS, take_back_seconds
from dcp_ckpt.save.fence import Fence
from dcp_ckpt.save.final_save import FinalSave, plan_final_save
from dcp_ckpt.save.handle import SaveHandle
from dcp_ckpt.save.handover import Handover
from dcp_ckpt.save.observer import SaveObserver
from dcp_ckpt.save.own_fragment import own_fragment
from dcp_ckpt.save.pilot import Flight, Pilot
from dcp_ckpt.save.record import Record, SaveKeys, from_message, to_message
from dcp_ckpt.save.reuse import Base
from dcp_ckpt.save.space import Space
from dcp_ckpt.save.staging import Staged, Stager, capture
from dcp_ckpt.save.step_policy import StepPolicy
from dcp_ckpt.save.writer_link import WriterLink
from dcp_ckpt.state.component import Component
from dcp_ckpt.writer.messages import WriteJob

__all__ = ["Saver"]

log = logging.getLogger(__name__)

_FENCE_PATIENCE_SECONDS = 60.0
"""How long a step waits for copies that make no progress; then the save fails and the step goes on."""


class Saver:
    """Owns staging, the writer and the background thread of one rank, for one epoch.

    Args:
        url: the run directory, as `open_storage` takes it.
        claim: the epoch, the same on all ranks.
        steps, space: on rank 0, else None.
        bases: what saves may share files with; None: every save writes everything.
        stager, link, pilot: owned from now on.
        observer: told of what happens; not owned.
    """

    def __init__(
        self,
        *,
        url: str,
        config: CheckpointConfig,
        channel: Channel,
        claim: EpochClaim,
        steps: StepPolicy | None,
        space: Space | None,
        bases: Bases | None,
        stager: Stager,
        link: WriterLink,
        pilot: Pilot,
        observer: SaveObserver,
    ) -> None:
        self._url = url
        self._config = config
        self._channel = channel
        self._claim = claim
        self._steps = steps
        self._space = space
        self._bases = bases
        self._stager = stager
        self._link = link
        self._pilot = pilot
        self._observer = observer
        self._fence = Fence(rank=channel.rank)
        self._calls = 0
        self._handles: list[SaveHandle] = []

    @property
    def last(self) -> SaveHandle | None:
        """The handle of the newest call that was not skipped."""
        return self._handles[-1] if self._handles else None

    def save(
        self,
        components: Callable[[], Sequence[Component]],
        *,
        step: int,
        metrics: Mapping[str, Any],
        tags: Sequence[str],
    ) -> SaveHandle:
        """One save; see `Checkpointer.save`."""
        started = time.monotonic()
        self._calls += 1
        keys = SaveKeys(self._calls)
        record = self._agree(keys, step)
        handle = SaveHandle(step)
        if record.decision == "skip":
            log.warning("skipping the save of step %d: the one before is still under way", step)
            handle.resolve("skipped")
            self._observer.skipped(step)
            return handle
        self._observer.begun(step)
        self._handles = [*filter(self._still_matters, self._handles), handle]
        directory = StepDir.parse(record.directory)
        assert directory is not None, "made by rank 0 from a StepDir"
        # Ranks come to the call at different times, and leave the record at nearly the same one.
        deadline = time.monotonic() + self._config.timeout_seconds
        flight = Flight(
            keys=keys,
            step=step,
            attempt=AttemptId(self._claim.epoch, self._calls),
            directory=directory,
            path=f"{self._url}/{directory}",
            handle=handle,
            handover=self._handover(step, deadline),
            started=started,
            deadline=deadline,
            created_at=record.created_at,
            metrics=dict(metrics),
            tags=tuple(tags),
        )
        try:
            self._require_same_step(step, record)
            if record.error is not None:
                raise error_from_fields(record.error)
            self._observer.before_save(step)
            base = None if self._bases is None else self._bases.find(AttemptId.parse(record.base))
            self._stage(flight, components(), base)
        except BaseException as error:
            # Raising here would leave the other ranks in the next collective without us: the failure travels
            # with the verdict instead, and surfaces on all ranks at the same call. An interrupt is told, too,
            # and then goes on.
            log.debug("staging of step %d failed", step, exc_info=True)
            flight.handover.give_up(as_checkpoint_error(error, rank=self._channel.rank))
            self._fence.release_if_idle()
            if not isinstance(error, Exception):
                raise
        finally:
            self._pilot.take(replace(flight, stall_seconds=time.monotonic() - started))
        return handle

    def _still_matters(self, handle: SaveHandle) -> bool:
        """Whether a later call has to know of this save: it is under way, or failed and nobody was told."""
        if handle.outcome == "pending":
            return True
        return self._config.on_failure == "raise" and not handle.failure_seen

    def fence(self) -> None:
        """Wait until the newest save has copied what it copies late; see `Checkpointer.fence`."""
        self._fence.wait()

    @property
    def costs(self) -> SaveCosts | None:
        """What saves took lately on this rank, without loads; None until one was committed."""
        return self._pilot.costs

    def wait(self, timeout_seconds: float | None) -> None:
        """Wait for the newest save; failures are left in its handle.

        Raises:
            TimeoutError: it is still under way.
        """
        if self.last is not None and not self.last.wait_done(timeout_seconds):
            raise TimeoutError(
                f"the save of step {self.last.step} is still under way after {timeout_seconds} s"
            )

    def wait_for(self, step: int, *, timeout_seconds: float) -> None:
        """Wait for the outcome of the save of a step, if it is the one under way."""
        if self.last is not None and self.last.step == step:
            self.last.wait_done(timeout_seconds)

    def wait_idle(self) -> None:
        """Wait until the arena is free: the bytes of the save before are durable, or given up.

        Raises:
            SaveFailed: that took too long.
        """
        # In this order: what is still being copied has not been given to the writer yet.
        self._fence.wait_idle(timeout_seconds=self._config.timeout_seconds)
        self._link.wait_idle(timeout_seconds=self._config.timeout_seconds)

    @property
    def untold(self) -> SaveHandle | None:
        """The newest failed save of which the caller was not told, if it matters still."""
        if self.last is not None and not self.last.failure_seen:
            return self.last
        untold = [handle for handle in self._handles if not handle.failure_seen]
        return untold[-1] if untold and self._config.on_failure == "raise" else None

    @property
    def is_fenced(self) -> bool:
        """Whether the newest save met a newer start of this run."""
        return self.last is not None and isinstance(self.last.error, Fenced)

    def final_save(self, step: int, *, deadline: float, why: str) -> FinalSave:
        """Rank 0: whether to save once more before `deadline` (monotonic seconds), as training stops.

        Blocks while a save is in flight, for as long as there is time for another one after it.
        """
        last, save_seconds = self.last, self._pilot.durable_seconds
        if last is not None and last.step != step:
            last.wait_done(max(deadline - time.monotonic() - (save_seconds or 0.0), 0.0))
        plan = plan_final_save(
            step=step,
            in_flight=last.step if last is not None and last.outcome == "pending" else None,
            committed=last.step if last is not None and last.outcome == "committed" else None,
            is_fenced=self.is_fenced,
            seconds_left=deadline - time.monotonic(),
            save_seconds=save_seconds,
        )
        log.warning("stopping at step %d (%s): %s", step, why, plan.reason)
        return plan

    def close(self) -> None:
        """Finish all saves, end the threads and the writer. Idempotent.

        Raises:
            SaveFailed: the writer had to be killed.
        """
        self._fence.close(timeout_seconds=self._config.timeout_seconds)
        self._pilot.close()
        try:
            self._link.close(timeout_seconds=max(self._config.timeout_seconds, WRITER_END_SECONDS))
        finally:
            self._stager.close()

    def _agree(self, keys: SaveKeys, step: int) -> Record:
        """Rank 0 decides about this call; all ranks learn it here: what it raises, all of them raise."""
        if self._channel.rank == 0:
            record = self._decide(step)
            self._channel.put(keys.record, to_message(record))
        else:
            record = self._read_record(keys, step)
        if record.decision == "raise":
            assert record.error is not None
            for handle in self._handles:
                handle.mark_failure_seen()
            raise error_from_fields(record.error)
        return record

    def _decide(self, step: int) -> Record:
        assert self._steps is not None, "rank 0 knows the steps"
        busy = self.last if self.last is not None and self.last.outcome == "pending" else None
        refusal = self._steps.refuse(step, in_flight=busy.step if busy else None) or self._untold_failure()
        if refusal is not None:
            return Record(step=step, decision="raise", error=error_fields(refusal))
        if busy and self._config.when_busy == "skip":
            return Record(step=step, decision="skip")
        obstacle = self._obstacle(step)
        base = None
        if obstacle is None and self._bases is not None:
            base = self._bases.begin(AttemptId(self._claim.epoch, self._calls))
        return Record(
            step=step,
            decision="save" if obstacle is None else "fail",
            directory=str(self._steps.directory(step)),
            created_at=utc_now(),
            base="" if base is None else str(base),
            error=None if obstacle is None else error_fields(obstacle),
        )

    def _obstacle(self, step: int) -> CheckpointError | None:
        """Why a save of this step cannot succeed, where that is known before anything is copied."""
        if self.last is not None and self.is_fenced:
            return self.last.error
        return None if self._space is None else self._space.shortage(step, self.last)

    def _untold_failure(self) -> CheckpointError | None:
        if self._config.on_failure != "raise":
            return None
        untold = [handle.error for handle in self._handles if handle.error and not handle.failure_seen]
        return untold[0] if untold else None

    def _read_record(self, keys: SaveKeys, step: int) -> Record:
        timeout = self._config.timeout_seconds
        try:
            return from_message(Record, self._channel.get(keys.record, timeout_seconds=timeout))
        except TimeoutError as error:
            raise CoordinationError(
                f"rank 0 did not call save() within {timeout:.0f} s of this rank's call for step {step}; "
                "all ranks must call it for the same steps",
                rank=self._channel.rank,
                step=step,
                phase="stage",
            ) from error

    def _require_same_step(self, step: int, record: Record) -> None:
        if step != record.step:
            raise CoordinationError(
                f"rank {self._channel.rank} called save(step={step}) "
                f"where rank 0 called save(step={record.step})",
                rank=self._channel.rank,
                step=record.step,
                phase="stage",
            )

    def _handover(self, step: int, deadline: float) -> Handover:
        return Handover(
            rank=self._channel.rank,
            step=step,
            deadline=deadline,
            patience_seconds=_FENCE_PATIENCE_SECONDS,
        )

    def _stage(self, flight: Flight, components: Sequence[Component], base: Base | None) -> None:
        """Copy what has to be copied now, and see to it that the rest follows."""
        self.wait_idle()
        captured = capture(components)
        staged = self._stager.stage(captured, overlap=self._config.overlap == "step", base=base)
        if staged.rest:
            self._fence.start(flight.handover, partial(self._hand_over, flight, staged), captured.optimizers)
        else:
            self._hand_over(flight, staged)

    def _hand_over(self, flight: Flight, staged: Staged) -> None:
        """Copy the rest and give the save to the writer. On the fence's thread when there is a rest.

        Every way out ends the hand-over; only interrupts go on.
        """
        try:
            late_samples = staged.rest.run(flight.handover.go_on)
            if not flight.handover.mark_copied():
                return
            replicas = staged.replicas(late_samples)
            fragment = own_fragment(
                staged,
                replicas,
                self._claim,
                flight.attempt,
                rank=self._channel.rank,
                world_size=self._channel.world_size,
                step=flight.step,
                created_at=flight.created_at,
                metrics=flight.metrics,
                tags=flight.tags,
            )
            job = WriteJob(
                storage_url=self._url,
                directory=str(flight.directory),
                fragment=fragment,
                sources=[source for _, source in staged.files],
                payloads=staged.payloads,
                direct_io=True,
                deadline=flight.deadline - take_back_seconds(self._config.timeout_seconds),
            )
            self._link.submit(job, staged.arena.descriptor)
            flight.handle.mark_staged()
            self._observer.staged(flight.step, seconds=time.monotonic() - flight.started)
            flight.handover.finish(fragment, replicas)
        except BaseException as error:
            log.debug("staging of step %d failed", flight.step, exc_info=True)
            flight.handover.fail(as_checkpoint_error(error, rank=self._channel.rank))
            if not isinstance(error, Exception):
                raise
