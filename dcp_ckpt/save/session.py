"""One epoch of one Checkpointer on one rank: claimed, recovered, and everything that saves wired together.

The start is docs/format.md, section 9. Owns what lives from the claim to `close`: saver, coordinator and
janitor. Called by the Checkpointer, on the main thread of all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from dcp_ckpt.config import CheckpointConfig
from dcp_ckpt.coordination import Channel, agree, broadcast, raise_first
from dcp_ckpt.errors import CheckpointError
from dcp_ckpt.format.epoch import EpochClaim
from dcp_ckpt.format.names import EPOCHS, StepDir, lease_name
from dcp_ckpt.lifecycle.catalogue import Catalogue, step_directories
from dcp_ckpt.lifecycle.epochs import claim_epoch, record_resumed
from dcp_ckpt.lifecycle.janitor import Janitor
from dcp_ckpt.lifecycle.recover import recover_older_epochs
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.save.coordinator import Coordinator
from dcp_ckpt.save.dcp_metadata import AUTO_MAX_CHUNKS, derive_metadata
from dcp_ckpt.save.pilot import Flight, Pilot
from dcp_ckpt.save.saver import Saver, StepPolicy
from dcp_ckpt.save.staging import Stager
from dcp_ckpt.save.writer_link import WriterLink
from dcp_ckpt.storage.base import Storage

__all__ = ["Session"]

log = logging.getLogger(__name__)


class Session:
    """The epoch that this process owns, or helps to own.

    Args:
        storage: the run.
        link: this rank's writer; closed with the session.
        global_ranks: the group's ranks as device meshes number them.
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
        tag: str,
    ) -> None:
        self._storage = storage
        self._channel = channel
        self._link = link
        self._config = config
        self._steps: StepPolicy | None = None
        self._janitor: Janitor | None = None
        timeout = config.recover_wait_seconds + config.timeout_seconds
        claimed = broadcast(channel, f"{tag}/claim", self._claim, timeout_seconds=timeout)
        self.claim = msgspec.convert(claimed, type=EpochClaim)
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
            raise_first(failures)

    def resumed_from(self, directory: str, *, epoch: int, step: int) -> None:
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

    def close(self) -> None:
        """Finish all saves, join thread and writer, delete what is over its grace period. Idempotent.

        Raises:
            SaveFailed: the writer had to be killed.
        """
        self.saver.close()
        if self._janitor is not None:
            self._janitor.close()

    def _claim(self) -> dict[str, Any]:
        """Rank 0: claim the next epoch and clear up after the ones before."""
        claim = claim_epoch(
            self._storage,
            run_id=ensure_run(self._storage).run_id,
            world_size=self._channel.world_size,
            purpose="train",
            hold=lambda key: self._link.hold_lease(self._storage.url, key),
            wait_seconds=self._config.recover_wait_seconds,
        )
        try:
            catalogue, report = recover_older_epochs(
                self._storage, epoch=claim.epoch, on_commit=self._derive_metadata
            )
            taken = frozenset(step_directories(self._storage))
        except BaseException:
            self._link.hold_lease(self._storage.url, None)
            raise
        for directory in report.committed:
            log.warning("committed %s, which the start before had finished writing", directory)
        self._steps = StepPolicy(epoch=claim.epoch, floor=_newest_step(catalogue), taken=taken)
        self._janitor = Janitor(
            self._storage,
            epoch=claim.epoch,
            keep=self._config.keep,
            grace_seconds=self._config.grace_seconds,
        )
        return asdict(claim)

    def _join(self, global_ranks: Sequence[int]) -> Pilot:
        """Every rank: hold the lease, and make what saves; returns what must be closed if another fails."""
        rank, world_size = self._channel.rank, self._channel.world_size
        if rank != 0:
            key = f"{EPOCHS}/{lease_name(self.claim.epoch)}"
            self._link.hold_lease(self._storage.url, key)
        channel = self._channel.clone()
        coordinator = Coordinator(self._storage, channel, epoch=self.claim.epoch) if rank == 0 else None
        pilot = Pilot(
            channel,
            self._link,
            coordinator,
            self._after_commit,
            timeout_seconds=self._config.timeout_seconds,
        )
        self.saver = Saver(
            url=self._storage.url,
            config=self._config,
            channel=self._channel,
            claim=self.claim,
            steps=self._steps,
            stager=Stager(rank=rank, world_size=world_size, global_ranks=global_ranks),
            link=self._link,
            pilot=pilot,
        )
        return pilot

    def _after_commit(self, flight: Flight) -> None:
        """On rank 0's background thread, after the verdict is out. What fails here fails no save."""
        assert self._steps is not None
        assert self._janitor is not None
        self._steps.committed(flight.step)
        try:
            self._derive_metadata(self._storage, flight.directory)
        except CheckpointError as error:
            log.warning("no .metadata for stock DCP readers in %s: %s", flight.directory, error)
        self._janitor.tidy()

    def _derive_metadata(self, storage: Storage, directory: StepDir) -> None:
        if self._config.dcp_metadata == "never":
            return
        limit = AUTO_MAX_CHUNKS if self._config.dcp_metadata == "auto" else None
        derive_metadata(storage, directory, max_chunks=limit)


def _newest_step(catalogue: Catalogue) -> int:
    """The greatest step that the run holds, readable or not; -1 when there is none."""
    steps = [entry.step for entry in catalogue.entries]
    steps += [rejected.directory.step for rejected in catalogue.rejected if rejected.state == "unreadable"]
    return max(steps, default=-1)
