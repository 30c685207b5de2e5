"""Claims at the same moment: a command that spares whoever lives also spares one that has just started."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dcp_ckpt.closing import Closing
from dcp_ckpt.errors import ConfigError
from dcp_ckpt.lifecycle.command_epoch import command_epoch
from dcp_ckpt.lifecycle.epochs import claim_epoch, require_newest
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.storage.base import Lease
from dcp_ckpt.storage.forwarding import ForwardingStorage
from dcp_ckpt.storage.memory import MemoryStorage


class Trainer:
    """A training that has claimed its epoch and lives."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._leases: list[Lease] = []
        self.epoch = claim_epoch(
            storage,
            run_id=ensure_run(storage).run_id,
            world_size=1,
            purpose="train",
            hold=self._hold,
            wait_seconds=0.0,
        ).epoch

    def end(self) -> None:
        self._hold(None)

    def _hold(self, key: str | None) -> None:
        while self._leases:
            self._leases.pop().close()
        if key is not None:
            self._leases.append(self._storage.hold_lease(key))


class StartingMeanwhile(ForwardingStorage):
    """A training starts right after somebody has seen that nobody lives."""

    trainer: Trainer | None = None

    def lease_is_held(self, key: str) -> bool:
        is_held = super().lease_is_held(key)
        if self.trainer is None:
            self.trainer = Trainer(self._inner)
        return is_held


class StickyLeases(ForwardingStorage):
    """Leases cannot be given up."""

    def hold_lease(self, key: str) -> Lease:
        return Sticky(super().hold_lease(key))


class Sticky(Closing):
    def __init__(self, lease: Lease) -> None:
        self._lease = lease

    def let_run_out(self) -> None:
        self._lease.let_run_out()

    def close(self) -> None:
        self._lease.close()
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_command_that_is_done_does_not_fail_for_its_lease(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = StickyLeases(open_storage(tmp_path))
    with command_epoch(storage, purpose="prune", force=False, wait_seconds=0.0) as claim:
        assert claim.epoch == 1
    assert "could not be given up" in caplog.text
    with (
        pytest.raises(ConfigError, match="what the command met"),
        command_epoch(storage, purpose="prune", force=False, wait_seconds=0.0),
    ):
        raise ConfigError("what the command met")


@pytest.mark.parametrize("kind", ["files", "store"])
def test_a_training_that_starts_between_the_look_and_the_claim_is_spared(tmp_path: Path, kind: str) -> None:
    storage = StartingMeanwhile(open_storage(tmp_path) if kind == "files" else MemoryStorage())
    # Its lease file stays, so there is something to look at.
    Trainer(storage).end()
    with (
        pytest.raises(ConfigError, match="still live"),
        command_epoch(storage, purpose="prune", force=False, wait_seconds=0.0),
    ):
        pass
    assert storage.trainer is not None
    require_newest(storage, storage.trainer.epoch)
    storage.trainer.end()
