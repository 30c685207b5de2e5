"""A run and the processes that own it, one after the other or side by side: trainers, writers, commands.

They do what the product does, with the product's functions, in the order in which its session, pilot and
command line call them. Owns the ledger of what each of them was told, for the promises to be checked against.
Must not decide in which order things happen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest

from dcp_ckpt.coordination import SoloChannel, error_fields
from dcp_ckpt.errors import CheckpointError, CorruptCheckpoint, LoadError, StorageNotFound
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.epoch import EpochClaim, is_tombstone
from dcp_ckpt.format.fragment import FileEntry, Fragment, decode_fragment
from dcp_ckpt.format.manifest import FragmentSummary
from dcp_ckpt.format.names import (
    DCP_METADATA,
    EPOCHS,
    MANIFEST,
    RUN_JSON,
    AttemptId,
    StepDir,
    data_file_name,
    fragment_name,
    parse_epoch_name,
)
from dcp_ckpt.lifecycle import janitor, prune, sweep
from dcp_ckpt.lifecycle import retract as lifecycle_retract
from dcp_ckpt.lifecycle.catalogue import Catalogue, CheckpointEntry, read_catalogue, step_directories
from dcp_ckpt.lifecycle.epochs import claim_epoch, record_resumed
from dcp_ckpt.lifecycle.janitor import Janitor
from dcp_ckpt.lifecycle.known import KnownRun
from dcp_ckpt.lifecycle.marks import write_mark
from dcp_ckpt.lifecycle.pins import pin, unpin
from dcp_ckpt.lifecycle.recover import recover_older_epochs, recover_run
from dcp_ckpt.lifecycle.runs import RunDocument, ensure_run
from dcp_ckpt.load.choose import choose
from dcp_ckpt.policies import KeepPolicy, LatestN
from dcp_ckpt.save import coordinator
from dcp_ckpt.save.coordinator import Coordinator
from dcp_ckpt.save.record import Report, SaveKeys, Verdict, to_message
from dcp_ckpt.save.step_policy import StepPolicy
from dcp_ckpt.storage.base import Lease, Storage
from dcp_ckpt.storage.listed import listed_once
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.testing.tiny import TINY_RUN_ID, write_tiny_checkpoint
from dcp_ckpt.writer.engine import check_shared_storage, write_attempt
from dcp_ckpt.writer.messages import WriteJob
from tests.model.places import Place
from tests.model.promises import Attempt, Ledger, attempt_in, attempt_of, problem_of, visible_in
from tests.model.stepping import Process, SteppedStorage

__all__ = ["Save", "Trainer", "World", "follow_removals"]

_KEEP = LatestN(2)
_METADATA = b"derived from the manifest"
_RUN = encode_json(
    RunDocument(
        run_id=TINY_RUN_ID,
        number=1,
        name=None,
        created_at="2026-01-01T00:00:00.000000Z",
        config={},
        parent=None,
        host="model",
        git=None,
        versions={},
    )
)


class World:
    """Everything of one history.

    Args:
        place: where the run is; empty.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        if RUN_JSON not in place.objects:
            place.put(RUN_JSON, _RUN)
        self.ledger = Ledger()
        self.processes: dict[str, Process] = {}

    def process(self, name: str) -> Process:
        assert name not in self.processes
        self.processes[name] = Process(self.place, name, is_settled=_is_settled, is_watched=_is_watched)
        return self.processes[name]

    def visible(self) -> dict[Attempt, bytes]:
        """All checkpoints that a reader finds now, with their manifests."""
        return visible_in(self.place)

    def command_recover(self, name: str, *, force: bool = False) -> object:
        """`dcp-ckpt recover`."""
        return recover_run(self.process(name).storage, force=force, wait_seconds=0.0)

    def command_prune(self, name: str, keep: KeepPolicy, *, force: bool = False) -> object:
        """`dcp-ckpt prune`."""
        return prune.prune_run(self.process(name).storage, keep, grace_seconds=0.0, force=force)

    def command_pin(self, name: str, step: int) -> bool:
        """`dcp-ckpt pin`."""
        storage = self.process(name).storage
        entry = read_catalogue(storage).at_step(step)
        if entry is None:
            return False
        pin(storage, entry)
        self.ledger.pinned.add(attempt_in(entry))
        return True

    def command_unpin(self, name: str, step: int) -> None:
        """`dcp-ckpt unpin`."""
        storage = self.process(name).storage
        entry = read_catalogue(storage).at_step(step)
        if entry is not None:
            self.ledger.pinned.discard(attempt_in(entry))
            unpin(storage, entry)

    def leave_foreign_file(self, directory: str, name: str) -> None:
        """Somebody puts a note where we keep our files."""
        self.ledger.foreign[name] = name.encode()
        self.place.put(f"{directory}/{name}", name.encode())

    def damage(self, attempt: Attempt) -> None:
        """The disk loses a byte of a data file."""
        for key, data in self.place.objects.items():
            if key.startswith(f"{attempt.directory}/__") and data:
                self.place.objects[key] = bytes([data[0] ^ 1]) + data[1:]
                self.ledger.damaged.add(attempt)
                return


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

    def attempted(self) -> Attempt:
        return Attempt((self.attempt.epoch, self.step), str(self.directory), str(self.attempt))


class Trainer:
    """One start of the training: rank 0's process, and one writer process for each rank.

    Args:
        keep: the retention policy.
    """

    claim: EpochClaim
    catalogue: Catalogue
    known: KnownRun
    janitor: Janitor
    steps: StepPolicy

    def __init__(
        self, world: World, name: str, *, num_ranks: int = 1, keep: KeepPolicy | None = _KEEP
    ) -> None:
        self.world = world
        self.name = name
        self.num_ranks = num_ranks
        self.process = world.process(name)
        self.writers = [world.process(f"{name}.{rank}") for rank in range(num_ranks)]
        self.channel = ReportChannel(world, self.process, num_ranks)
        self._keep = keep
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
        return storage

    def keep_only(self, keep: KeepPolicy | None) -> None:
        """From now on, with this policy."""
        self.janitor = Janitor(
            self.process.storage,
            self.known,
            epoch=self.claim.epoch,
            keep=keep,
            grace_seconds=0.0,
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
        return Save(SaveKeys(self._calls), step, attempt, self.steps.directory(step))

    def write(self, save: Save, rank: int) -> None:
        """One rank's writer at its job, and what the trainer hears of it if it still lives."""
        storage = self.writers[rank].storage
        fragment, arena = self._job(save, rank)
        job = WriteJob(
            storage_url=storage.url, directory=str(save.directory), fragment=fragment, direct_io=False
        )
        try:
            check_shared_storage(storage, fragment)
            ref = write_attempt(storage, job, memoryview(arena), _tell_nobody)
            report = Report(summary=FragmentSummary.of(fragment, ref))
        except CheckpointError as error:
            report = Report(error=error_fields(error))
        if not self.process.is_dead:
            storage.at("tell", lambda: self.channel.put(save.keys.report(rank), to_message(report)))

    def fail(self, save: Save, rank: int) -> None:
        """A rank could not stage its part."""
        error = CheckpointError("the model says so", rank=rank, phase="stage")
        self.channel.put(save.keys.report(rank), to_message(Report(error=error_fields(error))))

    def conclude(self, save: Save) -> Verdict:
        """The verdict, and what follows it (dcp_ckpt.save.pilot and session)."""
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


def follow_removals(patch: pytest.MonkeyPatch, world: Callable[[], World]) -> None:
    """Write into the ledger what owners take back, and what they are in the middle of taking back."""

    def uncommit(storage: SteppedStorage, directory: StepDir, *, epoch: int) -> bool:
        ledger, name = world().ledger, storage.process.name
        data = world().place.objects.get(f"{directory}/{MANIFEST}")
        if data is not None and not is_tombstone(data, path=""):
            ledger.removing[name] = attempt_of(str(directory), data)
        try:
            removed = sweep.uncommit(storage, directory, epoch=epoch)
        except CheckpointError:
            attempt = ledger.removing.get(name)
            if attempt is not None and attempt in world().visible():
                ledger.put_back.add(ledger.removing.pop(name))
            raise
        # Not reached by who died in it, or was fenced and could not put it back.
        attempt = ledger.removing.pop(name, None)
        if removed and attempt is not None:
            ledger.removed.add(attempt)
        return removed

    def retract(
        storage: SteppedStorage, directory: StepDir, attempt: AttemptId, *, epoch: int, all_done: bool
    ) -> bool:
        ledger, name = world().ledger, storage.process.name
        ledger.retracting[name] = Attempt((attempt.epoch, directory.step), str(directory), str(attempt))
        done = lifecycle_retract.retract(storage, directory, attempt, epoch=epoch, all_done=all_done)
        del ledger.retracting[name]
        return done

    patch.setattr(janitor, "uncommit", uncommit)
    patch.setattr(prune, "uncommit", uncommit)
    patch.setattr(coordinator, "retract", retract)


def _is_settled(key: str) -> bool:
    """Nobody deletes or changes the run's identity and the claims."""
    directory, _, name = key.rpartition("/")
    return key == RUN_JSON or (directory == EPOCHS and parse_epoch_name(name) is not None)


def _is_watched(key: str) -> bool:
    """What stands in step directories moves with them, and is swept."""
    return StepDir.parse(key.partition("/")[0]) is not None


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
