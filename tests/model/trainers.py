"""Trainers of the model: one start of a training, with its writer processes.

They do what the product does, with the product's functions, in the order in which its session, pilot and
loader call them. Must not decide in which order things happen among processes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from dcp_ckpt.coordination import SoloChannel, error_fields
from dcp_ckpt.errors import CheckpointError, CorruptCheckpoint, LoadError, StorageNotFound
from dcp_ckpt.format.digests import digest
from dcp_ckpt.format.epoch import EpochClaim
from dcp_ckpt.format.fragment import FileEntry, FileOrigin, Fragment, decode_fragment
from dcp_ckpt.format.manifest import FragmentSummary
from dcp_ckpt.format.names import (
    DCP_METADATA,
    EPOCHS,
    AttemptId,
    StepDir,
    data_file_name,
    fragment_name,
    parse_epoch_name,
)
from dcp_ckpt.lifecycle.catalogue import Catalogue, CheckpointEntry, step_directories
from dcp_ckpt.lifecycle.epochs import claim_epoch, record_resumed
from dcp_ckpt.lifecycle.janitor import Janitor
from dcp_ckpt.lifecycle.known import KnownRun
from dcp_ckpt.lifecycle.marks import write_mark
from dcp_ckpt.lifecycle.recover import recover_older_epochs
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.load.choose import choose
from dcp_ckpt.policies import KeepPolicy, LatestN
from dcp_ckpt.save.bases import Bases
from dcp_ckpt.save.coordinator import Coordinator
from dcp_ckpt.save.record import Report, SaveKeys, Verdict, to_message
from dcp_ckpt.save.step_policy import StepPolicy
from dcp_ckpt.storage.base import Lease, Storage
from dcp_ckpt.storage.listed import listed_once
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint
from dcp_ckpt.writer.engine import check_shared_storage, write_attempt
from dcp_ckpt.writer.messages import FileSource, WriteJob
from tests.model.promises import Attempt, attempt_in, problem_of
from tests.model.stepping import Process
from tests.model.world import World

__all__ = ["Save", "Trainer"]

_KEEP = LatestN(2)
_METADATA = b"derived from the manifest"


class ReportChannel(SoloChannel):
    """What the ranks of one trainer tell rank 0; a look at it is a step like any other.

    `claimed`: the epochs that were claimed at the last look.
    """

    def __init__(self, world: World, process: Process, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self.claimed: set[int] = set()
        self._world = world
        self._process = process

    def get_many(self, keys: Sequence[str], *, timeout_seconds: float) -> list[Any]:
        found: list[list[Any]] = []

        def look() -> str:
            names = [key.rpartition("/")[2] for key in self._world.place.objects if key.startswith(EPOCHS)]
            self.claimed = {epoch for name in names if (epoch := parse_epoch_name(name)) is not None}
            found.append(super(ReportChannel, self).get_many(keys, timeout_seconds=timeout_seconds))
            return repr((found[0], sorted(self.claimed)))

        self._process.storage.at(f"hear {EPOCHS}/", look)
        return found[0]


@dataclass(frozen=True)
class Save:
    """One save under way."""

    keys: SaveKeys
    step: int
    attempt: AttemptId
    directory: StepDir
    base: AttemptId | None = None

    def attempted(self) -> Attempt:
        return Attempt((self.attempt.epoch, self.step), str(self.directory), str(self.attempt))


class Trainer:
    """One start of the training: rank 0's process, and one writer process for each rank.

    Args:
        keep: the retention policy.
        reuse: where there are links, the last rank's part never changes: it shares the base's file.
    """

    claim: EpochClaim
    catalogue: Catalogue
    known: KnownRun
    janitor: Janitor
    steps: StepPolicy

    def __init__(
        self,
        world: World,
        name: str,
        *,
        num_ranks: int = 1,
        keep: KeepPolicy | None = _KEEP,
        reuse: bool = False,
    ) -> None:
        self.world = world
        self.name = name
        self.num_ranks = num_ranks
        self.process = world.process(name)
        self.writers = [world.process(f"{name}.{rank}") for rank in range(num_ranks)]
        self.channel = ReportChannel(world, self.process, num_ranks)
        self._keep = keep
        self._reuse = reuse and world.place.capabilities.links
        self._bases = Bases(self.process.storage, rank=0, world_size=num_ranks)
        self._stored: dict[AttemptId, tuple[str, FileEntry]] = {}
        self._leases: list[Lease] = []
        self._calls = 0

    def start(self, *, wait_seconds: float = 0.0) -> None:
        """What a session does before training (dcp_ckpt.save.session)."""
        storage = self.take_over(wait_seconds=wait_seconds)
        try:
            # Before the names of dead attempts become free: an older owner may still be about to seal them.
            taken = frozenset(step_directories(storage))
            self.catalogue, _ = recover_older_epochs(
                storage, epoch=self.claim.epoch, on_commit=_derive_metadata
            )
        except BaseException:
            self._hold(None)
            raise
        steps = [entry.step for entry in self.catalogue.entries]
        steps += [item.directory.step for item in self.catalogue.rejected if item.state == "unreadable"]
        self.steps = StepPolicy(epoch=self.claim.epoch, floor=max(steps, default=-1), taken=taken)
        self.known = KnownRun(self.process.storage, self.catalogue)
        self.keep_only(self._keep)
        self.world.ledger.resumed[self.claim.epoch] = None
        self.coordinator = Coordinator(
            self.process.storage, self.channel, epoch=self.claim.epoch, max_described_chunks=None
        )

    def take_over(self, *, wait_seconds: float = 0.0) -> Storage:
        """Claim the next epoch; returns the storage as it was listed then."""
        storage = listed_once(self.process.storage)
        self.claim = claim_epoch(
            storage,
            run_id=ensure_run(storage).run_id,
            world_size=self.num_ranks,
            purpose="train",
            hold=self._hold,
            wait_seconds=wait_seconds,
        )
        assert self.claim.epoch not in self.world.ledger.claimed, "two owners of one epoch"
        self.world.ledger.claimed.add(self.claim.epoch)
        return storage

    def keep_only(self, keep: KeepPolicy | None) -> None:
        """From now on, with this policy."""
        self.janitor = Janitor(
            self.process.storage,
            self.known,
            epoch=self.claim.epoch,
            keep=keep,
            grace_seconds=0.0,
            is_in_use=self._bases.is_in_use,
        )

    def load(self, which: str | int = "latest") -> int | None:
        """Resume from the best checkpoint that can be read; marks what cannot (dcp_ckpt.load.loader)."""
        candidates = choose(self.known.catalogue(), which, keep=self._keep, url=self.process.storage.url)
        for entry in candidates.entries:
            try:
                _read_all(self.process.storage, entry)
            except (CorruptCheckpoint, LoadError):
                if which != "latest":
                    raise
                self._mark_bad(entry)
                continue
            self._take_as_base(entry)
            self.steps.resumed_from(entry.step)
            self.janitor.protect(entry.directory, "resumed from")
            self.world.ledger.resumed[self.claim.epoch] = attempt_in(entry)
            record_resumed(self.process.storage, self.claim.epoch, entry.directory, entry.epoch, entry.step)
            return entry.step
        return None

    def begin(self, step: int) -> Save:
        """A call of `save()`: which attempt it is, and where it goes."""
        refusal = self.steps.refuse(step, in_flight=None)
        if refusal is not None:
            raise refusal
        self._calls += 1
        attempt = AttemptId(self.claim.epoch, self._calls)
        base = self._bases.begin(attempt) if self._reuse else None
        return Save(SaveKeys(self._calls), step, attempt, self.steps.directory(step), base)

    def write(self, save: Save, rank: int) -> Report:
        """One rank's writer at its job, and what the trainer hears of it if it still lives."""
        storage = self.writers[rank].storage
        fragment, arena = self._job(save, rank)
        source = FileSource()
        if rank == self.num_ranks - 1:
            fragment, source = self._shared(save, fragment, arena)
        job = WriteJob(
            storage_url=storage.url,
            directory=str(save.directory),
            fragment=fragment,
            sources=[source],
            direct_io=False,
        )
        try:
            check_shared_storage(storage, fragment)
            ref = write_attempt(storage, job, memoryview(arena), _tell_nobody)
            report = Report(summary=FragmentSummary.of(fragment, ref))
        except CheckpointError as error:
            report = Report(error=error_fields(error))
        if not self.process.is_dead:
            storage.at("tell", lambda: self.channel.put(save.keys.report(rank), to_message(report)))
        return report

    def fail(self, save: Save, rank: int) -> None:
        """A rank could not stage its part."""
        error = CheckpointError("the model says so", rank=rank, phase="stage")
        self.channel.put(save.keys.report(rank), to_message(Report(error=error_fields(error))))

    def conclude(self, save: Save) -> Verdict:
        """The verdict, and what follows it (dcp_ckpt.save.pilot and session)."""
        try:
            return self._conclude(save)
        finally:
            self._bases.ended(save.attempt)

    def _conclude(self, save: Save) -> Verdict:
        verdict = self.coordinator.conclude(
            save.keys,
            step=save.step,
            directory=save.directory,
            attempt=save.attempt,
            deadline=time.monotonic(),
        )
        was_fenced = self.claim.epoch + 1 in self.channel.claimed
        assert not (was_fenced and verdict.outcome == "committed"), "committed by an owner that was fenced"
        if verdict.outcome == "failed":
            self.world.ledger.failed.add(save.attempted())
        if verdict.outcome == "committed":
            self.world.ledger.committed.add(save.attempted())
            self._bases.committed(save.attempt, save.directory)
            assert self.coordinator.committed is not None
            self.steps.committed(save.step)
            self.known.committed(save.directory, self.coordinator.committed)
            with suppress(CheckpointError):
                _derive_metadata(self.process.storage, save.directory)
            self.janitor.tidy()
        return verdict

    def save(self, step: int) -> Verdict:
        """All of one save, rank after rank."""
        save = self.begin(step)
        for rank in range(self.num_ranks):
            self.write(save, rank)
        return self.conclude(save)

    def close(self) -> None:
        """The clean end."""
        self.janitor.close()
        self._hold(None)

    def die(self, *, with_writers: bool) -> None:
        """The trainer is killed; its writers may go on with what they have."""
        self.process.die()
        if with_writers:
            for writer in self.writers:
                writer.die()

    def _hold(self, key: str | None) -> None:
        while self._leases:
            self._leases.pop().close()
        if key is not None:
            self._leases.append(self.writers[0].storage.hold_lease(key))

    def _mark_bad(self, entry: CheckpointEntry) -> None:
        write_mark(
            self.process.storage,
            entry.directory,
            kind="bad",
            epoch=entry.epoch,
            step=entry.step,
            attempt=entry.manifest.attempt,
        )
        self.known.marks_changed()

    def _take_as_base(self, entry: CheckpointEntry) -> None:
        """What `Bases.resumed_from` does; the reading of what never changes is no step of its own."""
        rank = self.num_ranks - 1
        if entry.manifest.world_size != self.num_ranks:
            return
        attempt = entry.manifest.attempt_id
        key = f"{entry.directory}/{fragment_name(rank, attempt)}"
        fragment = decode_fragment(self.world.place.objects[key], path=key)
        file = f"{entry.directory}/{data_file_name(rank, 0, attempt)}"
        origin = FileOrigin(directory=str(entry.directory), attempt=str(attempt), file=0)
        self._stored[attempt] = file, replace(fragment.files[0], origin=fragment.files[0].origin or origin)
        self._bases.committed(attempt, entry.directory)

    def _shared(self, save: Save, fragment: Fragment, arena: bytes) -> tuple[Fragment, FileSource]:
        """The last rank's job, which shares what it stored in the base."""
        key = f"{save.directory}/{data_file_name(fragment.rank, 0, save.attempt)}"
        if save.base is None:
            origin = FileOrigin(directory=str(save.directory), attempt=str(save.attempt), file=0)
            self._stored[save.attempt] = (
                key,
                FileEntry(size_bytes=len(arena), block_digests=digest(arena), origin=origin),
            )
            return fragment, FileSource()
        base_key, entry = self._stored[save.base]
        self._stored[save.attempt] = key, entry
        return replace(fragment, files=[entry]), FileSource(shared_key=base_key)

    def _job(self, save: Save, rank: int) -> tuple[Fragment, bytes]:
        fragment, data = _parts(self.num_ranks)[rank]
        arena = bytearray(data)
        for chunk in fragment.chunks:
            if chunk.tensor == "model.weight":
                # Bytes of this attempt alone, so that a mixture of two attempts shows.
                own = f"{save.attempt}".encode()
                arena[chunk.payload_offset : chunk.payload_offset + len(own)] = own
        changed = replace(
            fragment,
            run_id=self.claim.run_id,
            epoch=self.claim.epoch,
            epoch_id=self.claim.epoch_id,
            attempt=str(save.attempt),
            step=save.step,
        )
        return changed, bytes(arena)


def _tell_nobody(key: str, *, bytes_done: int, bytes_total: int) -> None:
    """Progress is no part of the protocol."""


def _derive_metadata(storage: Storage, directory: StepDir) -> None:
    storage.put(f"{directory}/{DCP_METADATA}", _METADATA)


@cache
def _parts(num_ranks: int) -> list[tuple[Fragment, bytes]]:
    """What each rank of a tiny training stores: its fragment without digests, and its data file."""
    scratch = MemoryStorage()
    manifest = write_tiny_checkpoint(scratch, step=1, ranks=num_ranks, shape=(4 * num_ranks, 4))
    parts = []
    for rank in range(num_ranks):
        key = f"{StepDir(1)}/{fragment_name(rank, manifest.attempt_id)}"
        fragment = decode_fragment(scratch.read(key), path=key)
        data = scratch.read(f"{StepDir(1)}/{data_file_name(rank, 0, manifest.attempt_id)}")
        blank = [FileEntry(size_bytes=len(data), block_digests="")]
        parts.append((replace(fragment, files=blank), data))
    return parts


def _read_all(storage: Storage, entry: CheckpointEntry) -> None:
    """Read a checkpoint as a load does, in fewer requests."""
    files = {}
    attempt = entry.manifest.attempt_id
    for rank, ref in enumerate(entry.manifest.fragments):
        names = [fragment_name(rank, attempt)]
        names += [data_file_name(rank, index, attempt) for index in range(len(ref.file_bytes))]
        for name in names:
            with suppress(StorageNotFound):
                files[name] = storage.read(f"{entry.directory}/{name}")
    problem = problem_of(entry.manifest, files)
    if problem:
        raise CorruptCheckpoint(problem, path=str(entry.directory))
