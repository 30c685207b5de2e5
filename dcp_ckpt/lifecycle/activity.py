"""Activity: which saves of a run are under way, from what its writers leave on storage.

A view of one moment that changes nothing, made by reading alone: fragments, data files and their sizes, the
lease of the newest epoch. Called by the command line.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from dcp_ckpt.errors import StorageNotFound
from dcp_ckpt.format.documents import decode_document
from dcp_ckpt.format.epoch import EPOCH_FORMAT, EpochClaim
from dcp_ckpt.format.names import (
    EPOCHS,
    AttemptId,
    epoch_name,
    lease_name,
    parse_data_file_name,
    parse_epoch_name,
    parse_fragment_name,
)
from dcp_ckpt.lifecycle.catalogue import Catalogue, RejectedStep, read_catalogue
from dcp_ckpt.lifecycle.no_run import not_a_run
from dcp_ckpt.storage.base import Storage

__all__ = ["RankActivity", "RunActivity", "SaveActivity", "read_activity"]


@dataclass(frozen=True, kw_only=True)
class RankActivity:
    """What one rank has on storage of a save.

    Args:
        state: `written`: all of its bytes are durable; `writing`: it has begun; `waiting`: nothing is there.
        num_bytes: of its data files so far; an object store shows a file when it is whole.
        expected_bytes: what it wrote for the newest checkpoint of as many ranks; None without one.
    """

    rank: int
    state: Literal["waiting", "writing", "written"]
    num_bytes: int
    expected_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class SaveActivity:
    """One save without a manifest, of the newest epoch."""

    directory: str
    step: int
    attempt: str
    ranks: tuple[RankActivity, ...]

    @property
    def num_written(self) -> int:
        return sum(rank.state == "written" for rank in self.ranks)

    @property
    def num_bytes(self) -> int:
        return sum(rank.num_bytes for rank in self.ranks)

    @property
    def expected_bytes(self) -> int | None:
        parts = [rank.expected_bytes for rank in self.ranks if rank.expected_bytes is not None]
        return sum(parts) if len(parts) == len(self.ranks) else None


@dataclass(frozen=True, kw_only=True)
class RunActivity:
    """A run at one moment.

    Args:
        epoch: the newest; 0 when nobody has started yet.
        is_live: its writers hold the lease.
        latest_step: of the newest checkpoint that is not bad.
        saves: those under way, or left behind if nobody is live; in order of step.
    """

    epoch: int
    world_size: int
    purpose: str
    is_live: bool
    num_checkpoints: int
    latest_step: int | None
    saves: tuple[SaveActivity, ...]


def read_activity(storage: Storage) -> RunActivity:
    """Look at the run at the root of `storage`. Local to the process that calls it; blocks on storage.

    Raises:
        CheckpointNotFound: it is no run.
        StorageError: it could not be read.
    """
    catalogue = read_catalogue(storage)
    if catalogue.run is None and not catalogue.entries and not catalogue.rejected:
        raise not_a_run(storage, storage.url)
    names = storage.list_names(f"{EPOCHS}/")
    epoch = max((number for name in names if (number := parse_epoch_name(name)) is not None), default=0)
    claim = _claim(storage, epoch) if epoch else None
    newest = max((entry.manifest.order for entry in catalogue.entries), default=(0, -1))
    saves = [
        save
        for rejected in catalogue.rejected
        # What is not newer than the newest commit is not under way: it failed, or retention removes it.
        if claim is not None and rejected.is_absent and (epoch, rejected.directory.step) > newest
        if (save := _save(storage, rejected, claim, catalogue)) is not None
    ]
    latest = catalogue.latest
    return RunActivity(
        epoch=epoch,
        world_size=claim.world_size if claim else 0,
        purpose=claim.purpose if claim else "",
        is_live=bool(epoch) and storage.lease_is_held(f"{EPOCHS}/{lease_name(epoch)}"),
        num_checkpoints=len(catalogue.entries),
        latest_step=latest.step if latest else None,
        saves=tuple(saves),
    )


def _claim(storage: Storage, epoch: int) -> EpochClaim:
    key = f"{EPOCHS}/{epoch_name(epoch)}"
    return decode_document(storage.read(key), EpochClaim, format=EPOCH_FORMAT, path=key)


def _save(
    storage: Storage, rejected: RejectedStep, claim: EpochClaim, catalogue: Catalogue
) -> SaveActivity | None:
    """The newest attempt of the epoch in a step directory; None without one."""
    written: dict[AttemptId, set[int]] = defaultdict(set)
    sizes: dict[AttemptId, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    try:
        files = list(storage.list(f"{rejected.directory}/"))
    except StorageNotFound:
        return None
    for info in files:
        name = info.key.rpartition("/")[2]
        if (fragment := parse_fragment_name(name)) is not None:
            written[fragment[1]].add(fragment[0])
        elif (data := parse_data_file_name(name)) is not None:
            sizes[data[2]][data[0]] += info.size_bytes
    own = [attempt for attempt in {*written, *sizes} if attempt.epoch == claim.epoch]
    if not own:
        return None
    newest = max(own, key=lambda attempt: attempt.save)
    expected = _expected_bytes(catalogue, claim.world_size)
    return SaveActivity(
        directory=str(rejected.directory),
        step=rejected.directory.step,
        attempt=str(newest),
        ranks=tuple(
            RankActivity(
                rank=rank,
                state="written"
                if rank in written[newest]
                else "writing"
                if rank in sizes[newest]
                else "waiting",
                num_bytes=sizes[newest].get(rank, 0),
                expected_bytes=expected[rank] if expected else None,
            )
            for rank in range(claim.world_size)
        ),
    )


def _expected_bytes(catalogue: Catalogue, world_size: int) -> list[int] | None:
    """What each rank stored for the newest checkpoint of as many ranks."""
    for entry in reversed(catalogue.entries):
        if entry.manifest.world_size == world_size:
            return [sum(ref.file_bytes) for ref in entry.manifest.fragments]
    return None
