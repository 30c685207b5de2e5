"""An epoch of a run with all its parts in this process: two ranks' writers, coordinator, janitor, recovery.

What a Session does, in the same order and with the same parts, without processes and threads, so that it can
be stopped at every single operation. Says what it tells to the outside, as facts that must hold from then on.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from typing import Literal

from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not in its __all__

from dcp_ckpt.closing import Closing
from dcp_ckpt.coordination import StoreChannel, as_checkpoint_error, error_fields
from dcp_ckpt.errors import CheckpointError
from dcp_ckpt.format.epoch import EpochClaim
from dcp_ckpt.format.fragment import FileEntry, decode_fragment
from dcp_ckpt.format.manifest import FragmentSummary
from dcp_ckpt.format.names import AttemptId, StepDir, data_file_name, fragment_name
from dcp_ckpt.lifecycle.catalogue import step_directories
from dcp_ckpt.lifecycle.epochs import claim_epoch, record_resumed
from dcp_ckpt.lifecycle.janitor import Janitor
from dcp_ckpt.lifecycle.known import KnownRun
from dcp_ckpt.lifecycle.marks import write_mark
from dcp_ckpt.lifecycle.recover import recover_older_epochs
from dcp_ckpt.lifecycle.retention import plan_retention
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.policies import KeepPolicy
from dcp_ckpt.save.bases import Bases
from dcp_ckpt.save.coordinator import Coordinator
from dcp_ckpt.save.dcp_metadata import derive_metadata, write_metadata
from dcp_ckpt.save.record import Report, SaveKeys, to_message
from dcp_ckpt.save.reuse import Base, chunk_key
from dcp_ckpt.save.step_policy import StepPolicy
from dcp_ckpt.storage.base import Lease, Storage
from dcp_ckpt.storage.listed import listed_once
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint
from dcp_ckpt.writer.engine import check_shared_storage, write_attempt
from dcp_ckpt.writer.messages import FileSource, Payload, WriteJob

__all__ = ["Fact", "Owner", "Tell", "tell_nobody"]

RANKS = 2
SHAPE = (16, 384)
"""Of the weight: some pages for each rank."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Something that was told to the outside.

    Args:
        kind: `claimed` an epoch; `begun` an attempt; `written`: every rank's part is durable; `committed`,
            `failed`, `unknown`: its outcome; `letting_go`: retention may remove it from now on; `removed`;
            `pinned`.
        directory, attempt: of the checkpoint.
        run_id, epoch: of a claim.
    """

    kind: Literal[
        "claimed", "begun", "written", "committed", "failed", "unknown", "letting_go", "removed", "pinned"
    ]
    directory: str = ""
    attempt: str = ""
    run_id: str = ""
    epoch: int = 0


Tell = Callable[[Fact], None]


def tell_nobody(fact: Fact) -> None:
    """For those who look at the files only."""


class Owner(Closing):
    """Starts at once: claims, recovers, resumes from the latest. `report` says what the recovery did.

    Args:
        storage: the run.
        keep: applied after each commit and by `prune`; files go at once.
        reuse: rank 1's part never changes: after the first save it shares its file, where there are links.
        tell: hears every fact at the moment at which it holds; may be replaced.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        keep: KeepPolicy | None = None,
        reuse: bool = False,
        tell: Tell = tell_nobody,
    ) -> None:
        self._storage = storage
        self._keep = keep
        shares = reuse and storage.capabilities.links
        self._bases = [Bases(storage, rank=rank, world_size=RANKS) for rank in range(RANKS)] if shares else []
        self.tell = tell
        self._lease: Lease | None = None
        self._num_saves = 0
        self._protected: dict[StepDir, str] = {}
        self._threads = ExitStack()
        self.resumed = 0
        try:
            self._start()
        except BaseException:
            self.die()
            raise

    def _start(self) -> None:
        storage = listed_once(self._storage)
        self.claim = claim_epoch(
            storage,
            run_id=ensure_run(storage).run_id,
            world_size=RANKS,
            purpose="train",
            hold=self._hold,
            wait_seconds=0.0,
        )
        self.tell(Fact(kind="claimed", run_id=self.claim.run_id, epoch=self.claim.epoch))
        catalogue, self.report = recover_older_epochs(
            storage, epoch=self.claim.epoch, on_commit=_derive_metadata
        )
        newest = max((entry.step for entry in catalogue.entries), default=-1)
        taken = frozenset(step_directories(storage))
        self._steps = StepPolicy(epoch=self.claim.epoch, floor=newest, taken=taken)
        self._known = KnownRun(self._storage, catalogue)
        self._janitor = Janitor(
            self._storage,
            self._known,
            epoch=self.claim.epoch,
            keep=self._keep,
            grace_seconds=0.0,
            is_in_use=lambda directory: any(bases.is_in_use(directory) for bases in self._bases),
        )
        store = HashStore()
        self._channels = [
            self._threads.enter_context(closing(_channel(rank, store))) for rank in range(RANKS)
        ]
        self._coordinator = Coordinator(
            self._storage, self._channels[0], epoch=self.claim.epoch, max_described_chunks=None
        )
        self._threads.callback(self._coordinator.close)
        if catalogue.latest is not None:
            entry = catalogue.latest
            self.resumed = entry.step
            self._steps.resumed_from(entry.step)
            self._protected[entry.directory] = "resumed from"
            self._janitor.protect(entry.directory, "resumed from")
            record_resumed(self._storage, self.claim.epoch, entry.directory, entry.epoch, entry.step)
            for bases in self._bases:
                bases.resumed_from(entry.directory)

    def save(self, step: int, *, broken_rank: int | None = None) -> str:
        """A whole save, with what follows a commit; returns the outcome.

        Args:
            broken_rank: reports a failure instead of writing.
        """
        refusal = self._steps.refuse(step, in_flight=None)
        assert refusal is None, refusal
        attempt = self._next_attempt()
        directory = self._steps.directory(step)
        self._say("begun", directory, attempt)
        keys = SaveKeys(self._num_saves)
        jobs = self._jobs(step, directory, attempt)
        all_written = True
        for rank, (job, arena) in enumerate(jobs):
            report = self._write(job, arena, is_broken=rank == broken_rank)
            if self._bases and report.summary is not None:
                self._bases[rank].written(attempt, directory, report.summary.ref)
            all_written &= report.error is None
            self._channels[rank].put(keys.report(rank), to_message(report))
        if all_written:
            self._say("written", directory, attempt)
        verdict = self._coordinator.conclude(
            keys, step=step, directory=directory, attempt=attempt, deadline=time.monotonic()
        )
        assert verdict.outcome in ("committed", "failed", "unknown")
        self._say(verdict.outcome, directory, attempt)  # type: ignore[arg-type]  # just narrowed
        if self._bases:
            if verdict.outcome == "committed":
                self._bases[0].committed(attempt, directory)
            self._bases[0].ended(attempt)
        if verdict.outcome == "committed":
            self._after_commit(step, directory, jobs[0][0])
        return verdict.outcome

    @property
    def shared_bytes(self) -> int:
        """Of the newest checkpoint that it committed."""
        return 0 if self._coordinator.committed is None else self._coordinator.committed.shared_bytes

    def save_next(self) -> str:
        """Save the step after the newest one: the same again where that failed. Returns the outcome."""
        return self.save(max(self._steps.floor, 0) + 1)

    def write(self, step: int, *, num_ranks: int = RANKS) -> None:
        """What the first writers do, and nothing after it: the trainer dies before it commits."""
        attempt = self._next_attempt()
        directory = self._steps.directory(step)
        self._say("begun", directory, attempt)
        for job, arena in self._jobs(step, directory, attempt)[:num_ranks]:
            write_attempt(self._storage, job, arena, _watch_nothing)
        if num_ranks == RANKS:
            self._say("written", directory, attempt)

    def mark(self, step: int, kind: Literal["bad", "pin"]) -> None:
        """Mark the checkpoint of a step."""
        entry = self._known.catalogue().at_step(step)
        assert entry is not None
        manifest = entry.manifest
        write_mark(
            self._storage,
            entry.directory,
            kind=kind,
            epoch=manifest.epoch,
            step=step,
            attempt=manifest.attempt,
        )
        self._known.marks_changed()
        if kind == "pin":
            self._say("pinned", entry.directory, manifest.attempt_id)

    def take_back(self) -> None:
        """The first half of a retention pass; what fails waits for the next one."""
        plan = self._let_go()
        with suppress(CheckpointError):
            for directory in self._janitor.take_back():
                self._say("removed", directory, plan[directory])

    def prune(self) -> None:
        """A retention pass: take back, then delete."""
        self.take_back()
        self._janitor.close()

    def die(self) -> None:
        """End like a process that is killed: the lease ends, nothing else is done. Idempotent."""
        self._threads.close()
        if self._lease is not None:
            self._lease.let_run_out()

    def close(self) -> None:
        """End in order. Idempotent."""
        self._threads.close()
        self._janitor.close()
        if self._lease is not None:
            with suppress(CheckpointError):
                self._lease.close()

    def _next_attempt(self) -> AttemptId:
        self._num_saves += 1
        return AttemptId(self.claim.epoch, self._num_saves)

    def _jobs(self, step: int, directory: StepDir, attempt: AttemptId) -> list[tuple[WriteJob, memoryview]]:
        jobs = _jobs(self._storage.url, self.claim, step, directory, attempt)
        if self._bases:
            base = self._bases[1].find(self._bases[0].begin(attempt))
            jobs = [(_digested(job), arena) for job, arena in jobs]
            if base is not None:
                jobs[1] = _sharing(jobs[1][0], base), jobs[1][1]
        return jobs

    def _write(self, job: WriteJob, arena: memoryview, *, is_broken: bool) -> Report:
        try:
            check_shared_storage(self._storage, job.fragment)
            if is_broken:
                raise CheckpointError("broken on purpose")
            ref = write_attempt(self._storage, job, arena, _watch_nothing)
        except CheckpointError as error:
            return Report(error=error_fields(as_checkpoint_error(error, rank=job.fragment.rank)))
        return Report(summary=FragmentSummary.of(job.fragment, ref))

    def _after_commit(self, step: int, directory: StepDir, job: WriteJob) -> None:
        assert self._coordinator.committed is not None
        self._steps.committed(step)
        self._known.committed(directory, self._coordinator.committed)
        fragments = self._coordinator.described(job.fragment)
        assert fragments is not None
        with suppress(CheckpointError):
            write_metadata(self._storage, directory, fragments)
        if self._keep is not None:
            plan = self._let_go()
            self._janitor.tidy()
            left = {entry.directory for entry in self._known.catalogue().entries}
            for gone in plan.keys() - left:
                self._say("removed", gone, plan[gone])

    def _let_go(self) -> dict[StepDir, AttemptId]:
        """Say what retention will remove; the plan is a pure function."""
        entries = {entry.directory: entry for entry in self._known.catalogue().entries}
        candidates = [entry.candidate for entry in entries.values()]
        plan = plan_retention(candidates, self._keep, protected=self._protected)
        found = {
            decision.directory: entries[decision.directory].manifest.attempt_id for decision in plan.removed
        }
        for directory, attempt in found.items():
            self._say("letting_go", directory, attempt)
        return found

    def _say(
        self,
        kind: Literal[
            "begun", "written", "committed", "failed", "unknown", "letting_go", "removed", "pinned"
        ],
        directory: StepDir,
        attempt: AttemptId,
    ) -> None:
        self.tell(Fact(kind=kind, directory=str(directory), attempt=str(attempt)))

    def _hold(self, key: str | None) -> None:
        if self._lease is not None:
            self._lease.close()
            self._lease = None
        if key is not None:
            self._lease = self._storage.hold_lease(key)


def _watch_nothing(key: str, *, bytes_done: int, bytes_total: int) -> None:
    """The writers' progress, which nobody here waits for."""


def _channel(rank: int, store: HashStore) -> StoreChannel:
    return StoreChannel(store, rank, RANKS, host_ranks=tuple(range(RANKS)), close_seconds=0.0)


def _derive_metadata(storage: Storage, directory: StepDir) -> None:
    derive_metadata(storage, directory, max_chunks=None)


def _digested(job: WriteJob) -> WriteJob:
    """The same, with payloads digested. The type is left out: what rank 1 has is equal bytes or is not."""
    return replace(job, payloads=[Payload(dtype="uint8") for _ in job.fragment.chunks])


def _sharing(job: WriteJob, base: Base) -> WriteJob:
    """The same, with the base's file instead of an equal one."""
    return replace(
        job,
        fragment=replace(job.fragment, files=list(base.files)),
        sources=[FileSource(shared_key=key) for key in base.keys],
        payloads=[
            replace(payload, digest=base.chunks[chunk_key(chunk)].digest)
            for chunk, payload in zip(job.fragment.chunks, job.payloads, strict=True)
        ],
    )


def _jobs(
    url: str, claim: EpochClaim, step: int, directory: StepDir, attempt: AttemptId
) -> list[tuple[WriteJob, memoryview]]:
    """What the ranks' writers are given: the tiny checkpoint, taken apart again."""
    scratch = MemoryStorage()
    write_tiny_checkpoint(
        scratch,
        step=step,
        ranks=RANKS,
        epoch=attempt.epoch,
        save=attempt.save,
        shape=SHAPE,
        run_id=claim.run_id,
        directory=directory,
        commit=False,
    )
    jobs = []
    for rank in range(RANKS):
        key = f"{directory}/{fragment_name(rank, attempt)}"
        fragment = decode_fragment(scratch.read(key), path=key)
        data = scratch.read(f"{directory}/{data_file_name(rank, 0, attempt)}")
        fragment = replace(
            fragment,
            epoch_id=claim.epoch_id,
            files=[FileEntry(size_bytes=len(data), block_digests="")],
        )
        # Pages of its own, as the arena has: direct writes want aligned memory.
        arena = mmap.mmap(-1, len(data))
        arena[:] = data
        job = WriteJob(
            storage_url=url,
            directory=str(directory),
            fragment=fragment,
            sources=[FileSource()],
            direct_io=True,
        )
        jobs.append((job, memoryview(arena)))
    return jobs
