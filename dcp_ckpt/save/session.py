"""One epoch of one Checkpointer on one rank: claimed, recovered, and everything that saves wired together.

The start is docs/format.md, section 9. Owns what lives from the claim to `close`: saver, coordinator and
janitor. Called by the Checkpointer, on the main thread of all ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from dcp_ckpt.config import CheckpointConfig
from dcp_ckpt.coordination import Channel, agree, broadcast
from dcp_ckpt.errors import CheckpointError, StorageTransient
from dcp_ckpt.format.documents import converted
from dcp_ckpt.format.epoch import EpochClaim
from dcp_ckpt.format.manifest import Manifest
from dcp_ckpt.format.names import EPOCHS, StepDir, lease_name
from dcp_ckpt.lifecycle.catalogue import Catalogue, step_directories
from dcp_ckpt.lifecycle.epochs import claim_epoch, record_resumed
from dcp_ckpt.lifecycle.janitor import Janitor
from dcp_ckpt.lifecycle.known import KnownRun
from dcp_ckpt.lifecycle.recover import recover_older_epochs
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.lifecycle.suspicion import mark_if_suspect
from dcp_ckpt.save.bases import Bases
from dcp_ckpt.save.coordinator import Coordinator
from dcp_ckpt.save.dcp_metadata import AUTO_MAX_CHUNKS, derive_metadata, write_metadata
from dcp_ckpt.save.deadlines import AFTERWARDS_SECONDS
from dcp_ckpt.save.observer import SaveObserver
from dcp_ckpt.save.pilot import Flight, Pilot
from dcp_ckpt.save.preparation import Room, prepare_saves
from dcp_ckpt.save.saver import Saver
from dcp_ckpt.save.space import Space
from dcp_ckpt.save.staging import Stager, capture
from dcp_ckpt.save.step_policy import StepPolicy
from dcp_ckpt.save.writer_link import WriterLink
from dcp_ckpt.state.component import Captured, Component
from dcp_ckpt.state.generators import undisturbed_streams
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.storage.listed import listed_once

__all__ = ["Session"]

log = logging.getLogger(__name__)


class Session:
    """The epoch that this process owns, or helps to own.

    Args:
        storage: the run.
        link: this rank's writer; closed with the session.
        global_ranks: the group's ranks as device meshes number them.
        observer: told of what happens; not owned.
        tag: unique in the life of the channel.

    Raises:
        CheckpointError: the epoch could not be claimed, on every rank; nothing is held then.
    """

    def __init__(
        self,
        storage: Storage,
        channel: Channel,
        link: WriterLink,
        config: CheckpointConfig,
        *,
        global_ranks: Sequence[int],
        observer: SaveObserver,
        tag: str,
    ) -> None:
        self._storage = storage
        self._channel = channel
        self._link = link
        self._config = config
        self._observer = observer
        self._steps: StepPolicy | None = None
        self._janitor: Janitor | None = None
        self._coordinator: Coordinator | None = None
        self._space: Space | None = None
        self._bases = self._make_bases()
        self.known: KnownRun | None = None
        timeout = config.recover_wait_seconds + config.timeout_seconds
        claimed = broadcast(channel, f"{tag}/claim", self._claim, timeout_seconds=timeout)
        self.claim = converted(EpochClaim, claimed)
        pilot, failures = agree(
            channel,
            f"{tag}/join",
            lambda: self._join(global_ranks),
            timeout_seconds=config.timeout_seconds,
        )
        if failures:
            if pilot is not None:
                pilot.close()
            link.hold_lease(storage.url, None)
            failures.raise_first()

    def resumed_from(self, directory: str, epoch: int, step: int) -> None:
        """Rank 0: steps go on after this one, and it is never removed while this epoch lives.

        Raises:
            StorageError: that could not be written down.
        """
        assert self._steps is not None
        assert self._janitor is not None
        step_dir = StepDir.parse(directory)
        assert step_dir is not None, "it came from the catalogue"
        self._steps.resumed_from(step)
        self._janitor.protect(step_dir, "resumed from")
        record_resumed(self._storage, self._steps.epoch, step_dir, epoch, step)

    def reuse_nothing(self) -> None:
        """All ranks: a load begins, after which saves build on something else, or on nothing."""
        if self._bases is not None:
            self._bases.forget()

    def reuse_from(self, directory: str) -> None:
        """All ranks: the state is that of this checkpoint now; what stays so need not be saved again."""
        step_dir = StepDir.parse(directory)
        if self._bases is not None and step_dir is not None:
            self._bases.resumed_from(step_dir)

    def prepare(self, components: Callable[[], Sequence[Component]], *, tag: str) -> None:
        """All ranks: make sure that a save of this state would find memory and space, and make its arena.

        Args:
            tag: unique in the life of the channel.

        Raises:
            StateError: the state cannot be stored.
            StorageFull: there is too little memory on some host, or no room for one checkpoint on storage.
        """

        def capture_now() -> Captured:
            self.saver.wait_idle()
            with undisturbed_streams():
                return capture(components())

        needed = prepare_saves(
            self._stager,
            capture_now,
            self._look_for_room,
            self._channel,
            keep=self._config.keep,
            tag=tag,
            timeout_seconds=self._config.timeout_seconds,
        )
        if needed is not None and self._space is not None and not self._shares:
            self._space.expect(needed)

    def catalogue(self) -> Catalogue:
        """Rank 0: what is committed now.

        Raises:
            StorageError: it could not be learned.
        """
        assert self.known is not None
        return self.known.catalogue()

    def marks_changed(self) -> None:
        """This process wrote marks: rank 0 reads them anew at the next look."""
        if self.known is not None:
            self.known.marks_changed()

    def prune(self) -> list[str]:
        """Rank 0: apply retention now; the names of the step directories that were taken back.

        Raises:
            CheckpointError: the run could not be read or changed.
        """
        assert self._janitor is not None
        return [str(directory) for directory in self._janitor.take_back()]

    def close(self, *, waits: bool = True) -> None:
        """Finish all saves, join thread and writer, delete what is over its grace period. Idempotent.

        Args:
            waits: wait until the grace period of everything is over; else the next start deletes the rest.

        Raises:
            SaveFailed: the writer had to be killed.
        """
        self.saver.close()
        if self._janitor is not None:
            self._janitor.close(waits=waits)

    def _claim(self) -> dict[str, Any]:
        """Rank 0: claim the next epoch and clear up after the ones before."""
        # From here to the end of the start, an object store is listed once.
        storage = listed_once(self._storage)
        claim = claim_epoch(
            storage,
            run_id=ensure_run(storage).run_id,
            world_size=self._channel.world_size,
            purpose="train",
            hold=lambda key: self._link.hold_lease(self._storage.url, key),
            wait_seconds=self._config.recover_wait_seconds,
        )
        on_commit = None if self._config.dcp_metadata == "never" else self._derive_metadata
        try:
            # Listed before dead attempts are sealed: an older owner that wakes up may seal them, too, and it
            # must not meet ours under their names.
            taken = frozenset(step_directories(storage))
            catalogue, report = recover_older_epochs(storage, epoch=claim.epoch, on_commit=on_commit)
        except BaseException:
            self._link.hold_lease(self._storage.url, None)
            raise
        for directory in report.committed:
            log.warning("committed %s, which the start before had finished writing", directory)
        self._steps = StepPolicy(epoch=claim.epoch, floor=_newest_step(catalogue), taken=taken)
        self.known = KnownRun(self._storage, catalogue)
        for entry in catalogue.entries:
            if str(entry.directory) in report.committed:
                self._judge(entry.directory)
        self._janitor = Janitor(
            self._storage,
            self.known,
            epoch=claim.epoch,
            keep=self._config.keep,
            grace_seconds=self._config.grace_seconds,
            is_in_use=self._is_in_use,
            on_removed=self._observer.removed,
        )
        self._space = Space(self._storage, self._janitor, timeout_seconds=self._config.timeout_seconds)
        return asdict(claim)

    def _join(self, global_ranks: Sequence[int]) -> Pilot:
        """Every rank: hold the lease, and make what saves; returns what must be closed if another fails."""
        rank, world_size = self._channel.rank, self._channel.world_size
        if rank != 0 and self._storage.capabilities.lease_ends_with_holder:
            # Elsewhere holding costs requests all the time: rank 0's writer holds it for all, and the others
            # when their trainer has died while they still work.
            key = f"{EPOCHS}/{lease_name(self.claim.epoch)}"
            self._link.hold_lease(self._storage.url, key)
        channel = self._channel.clone()
        if rank == 0:
            self._coordinator = Coordinator(
                self._storage, channel, epoch=self.claim.epoch, max_described_chunks=self._max_chunks
            )
        self._stager = Stager(
            rank=rank, world_size=world_size, global_ranks=global_ranks, reuse=self._bases is not None
        )
        pilot = Pilot(
            channel,
            self._link,
            self._coordinator,
            self._bases,
            self._after_commit,
            self._observer,
            timeout_seconds=self._config.timeout_seconds,
        )
        self.saver = Saver(
            url=self._storage.url,
            config=self._config,
            channel=self._channel,
            claim=self.claim,
            steps=self._steps,
            space=self._space,
            bases=self._bases,
            stager=self._stager,
            link=self._link,
            pilot=pilot,
            observer=self._observer,
        )
        return pilot

    def _after_commit(self, flight: Flight) -> None:
        """On rank 0's background thread, after the verdict is out. What fails here fails no save."""
        assert self._steps is not None
        assert self._janitor is not None
        assert self._coordinator is not None
        assert self._coordinator.committed is not None
        assert self.known is not None
        assert self._space is not None
        self._steps.committed(flight.step)
        self._space.expect(self._next_bytes(self._coordinator.committed))
        self.known.committed(flight.directory, self._coordinator.committed)
        self._judge(flight.directory)
        is_answering = True
        try:
            own = flight.handover.fragment
            fragments = None if own is None else self._coordinator.described(own)
            if fragments:
                storage = self._storage.until(time.monotonic() + AFTERWARDS_SECONDS)
                write_metadata(storage, flight.directory, fragments)
        except CheckpointError as error:
            log.warning("no .metadata for stock DCP readers in %s: %s", flight.directory, error)
            is_answering = not isinstance(error, StorageTransient)
        if is_answering:  # else the next save would wait for nothing
            self._janitor.tidy()
        self._space.settled(flight.step)

    def _judge(self, directory: StepDir) -> None:
        """Mark a new checkpoint if its metrics make it suspect; before anything is removed for it."""
        assert self.known is not None
        try:
            catalogue = self.known.catalogue()
            entry = next(entry for entry in catalogue.entries if entry.directory == directory)
            mark = mark_if_suspect(self._storage, entry, catalogue, self._config.suspect_when)
        except CheckpointError as error:
            log.warning("whether %s is suspect could not be written down: %s", directory, error)
            return
        if mark is not None:
            self.known.marked(directory, mark)

    def _look_for_room(self) -> Room:
        """Rank 0: what is free, and what retention may free."""
        entries = self.catalogue().entries
        assert self._janitor is not None
        # What a save that shares files takes is not known before it is staged: its writers find out.
        free_bytes = None if self._shares else self._storage.free_bytes()
        return Room(
            path=self._storage.url,
            # A save that needs the room of what was taken back waits for its grace period.
            free_bytes=None if free_bytes is None else free_bytes + self._janitor.waiting_bytes,
            removable_bytes=sum(
                entry.manifest.written_bytes
                for entry in entries
                if not (entry.is_bad or entry.is_pinned or self._janitor.protects(entry.directory))
            ),
        )

    def _make_bases(self) -> Bases | None:
        if not self._config.reuse:
            return None
        if not self._storage.capabilities.links:
            if self._channel.rank == 0:
                log.warning(
                    "reuse has no effect: %s has no hard links; every save writes everything",
                    self._storage.url,
                )
            return None
        return Bases(self._storage, rank=self._channel.rank, world_size=self._channel.world_size)

    def _is_in_use(self, directory: StepDir) -> bool:
        return self._bases is not None and self._bases.is_in_use(directory)

    @property
    def _shares(self) -> bool:
        """Whether the next save is expected to share files."""
        return self._bases is not None and self._bases.has_base

    def _next_bytes(self, committed: Manifest) -> int | None:
        """What the next save is expected to write; None when that is anybody's guess."""
        if self._bases is None or committed.shared_bytes:
            return committed.written_bytes
        return None

    def _derive_metadata(self, storage: Storage, directory: StepDir) -> None:
        derive_metadata(storage, directory, max_chunks=self._max_chunks)

    @property
    def _max_chunks(self) -> int | None:
        """Up to how many chunks `.metadata` is derived; -1: not even without any."""
        return {"never": -1, "auto": AUTO_MAX_CHUNKS, "always": None}[self._config.dcp_metadata]


def _newest_step(catalogue: Catalogue) -> int:
    """The greatest step that the run holds, readable or not; -1 when there is none."""
    steps = [entry.step for entry in catalogue.entries]
    steps += [rejected.directory.step for rejected in catalogue.rejected if rejected.state == "unreadable"]
    return max(steps, default=-1)
