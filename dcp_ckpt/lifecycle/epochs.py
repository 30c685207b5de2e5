"""Epochs: claiming the run for one incarnation, waiting for the one before, and being fenced by the next.

The protocol is in docs/format.md, section 9. Called on rank 0, by the session, the coordinator and
whatever removes files, and by commands that change a run.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

from dcp_ckpt.errors import (
    ConfigError,
    CorruptCheckpoint,
    Fenced,
    StorageExists,
    StorageNotFound,
    StorageUnsuitable,
)
from dcp_ckpt.format.epoch import EpochClaim, Resumed, encode_epoch
from dcp_ckpt.format.names import (
    EPOCHS,
    AttemptId,
    StepDir,
    epoch_name,
    lease_name,
    parse_epoch_name,
    parse_lease_name,
    resumed_name,
)
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.storage.listed import list_again, listed_once

__all__ = ["claim_epoch", "record_resumed", "require_newest", "utc_now", "wait_for_leases"]

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_STORE_POLL_SECONDS = 1.0
_LARGEST_GAP = 10_000
"""Claims get lost one by one; a larger gap is a stray name, and to close it would fill the run with files."""
_ATTEMPT_IN_NAME = re.compile(r"\.(e[0-9]{4,}-s[0-9]{6,})\.")


def utc_now() -> str:
    """The time as RFC 3339 UTC with microseconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def require_newest(storage: Storage, epoch: int) -> None:
    """Make sure that nobody started after us, and that this still is the storage we claimed.

    One small read, never a listing: claims leave no gap, so whoever came later has claimed the next number
    first.

    Raises:
        Fenced: a newer epoch exists.
        StorageUnsuitable: our own claim is gone: the run was deleted or its file system unmounted.
    """
    if _is_claimed(storage, epoch + 1):
        raise Fenced(
            f"epoch {epoch + 1} has taken over this run from epoch {epoch}: another start of the same run "
            "owns it now; this process must not save any more and should exit",
            path=storage.url,
        )
    if storage.capabilities.directories and not _is_claimed(storage, epoch):
        raise StorageUnsuitable(
            f"the claim of epoch {epoch} is gone; was the run deleted, or its file system unmounted?",
            path=storage.url,
        )


def _is_claimed(storage: Storage, epoch: int) -> bool:
    try:
        storage.read(f"{EPOCHS}/{epoch_name(epoch)}")
    except StorageNotFound:
        return False
    return True


def wait_for_leases(storage: Storage, *, wait_seconds: float) -> list[int]:
    """Wait for writers of earlier epochs to finish what they have. Blocks up to `wait_seconds`.

    Returns:
        The epochs that still live after that; they will be fenced.
    """
    storage = listed_once(storage)
    seen = bool(_leased_epochs(storage))
    deadline = time.monotonic() + wait_seconds
    announced = False
    while True:
        live = _live_epochs(storage)
        if not live or time.monotonic() >= deadline:
            break
        if not announced:
            log.warning(
                "epoch(s) %s of %s still live; waiting up to %.0f s for their writers to finish",
                live, storage.url, wait_seconds,
            )  # fmt: skip
            announced = True
        # Where a lease runs out by itself, asking more often only costs requests.
        time.sleep(_POLL_SECONDS if storage.capabilities.lease_ends_with_holder else _STORE_POLL_SECONDS)
    if seen:
        # Whoever had a lease at the listing may have committed since, and given it up before we looked.
        list_again(storage)
    return live


def claim_epoch(
    storage: Storage,
    *,
    run_id: str,
    world_size: int,
    purpose: str,
    hold: Callable[[str | None], None],
    wait_seconds: float,
    spare_live: bool = False,
) -> EpochClaim:
    """Wait for the epochs before, then claim the next one. Blocks.

    Args:
        hold: called with the key of the new epoch's lease before the claim becomes visible, and with None to
            give it up when the claim fails.
        wait_seconds: for writers of earlier epochs.
        spare_live: rather fail than fence an owner that lives after that; also one that has come in between.

    Raises:
        CorruptCheckpoint: a stray name claims an epoch far beyond all others.
        ConfigError: with `spare_live`, an owner lives; nothing was claimed.
        StorageUnsuitable: names cannot be created exclusively there, so two owners could not be told apart.
    """
    storage = listed_once(storage)
    storage.require_exclusive_create()
    while True:
        # Before the look at the leases: whoever starts after that look finds this number free, and takes it.
        epoch = _last_used_epoch(storage) + 1
        live = wait_for_leases(storage, wait_seconds=wait_seconds)
        if live and spare_live:
            raise ConfigError(
                f"epoch(s) {', '.join(map(str, live))} of this run are still live; stop that training first, "
                "or insist with --force, which makes it stop saving",
                path=storage.url,
            )
        if live:
            log.warning("epoch(s) %s of %s are still live and will be fenced", live, storage.url)
        claim = EpochClaim(
            run_id=run_id,
            epoch=epoch,
            epoch_id=os.urandom(16).hex(),
            world_size=world_size,
            host=os.uname().nodename,
            pid=os.getpid(),
            created_at=utc_now(),
            purpose=purpose,
        )
        storage.make_directory(EPOCHS)
        hold(f"{EPOCHS}/{lease_name(claim.epoch)}")
        try:
            _close_gap(storage, claim)
            storage.create_exclusive(f"{EPOCHS}/{epoch_name(claim.epoch)}", encode_epoch(claim))
        except StorageExists:
            log.warning("another start took epoch %d of %s at the same moment", claim.epoch, storage.url)
            hold(None)
            list_again(storage)
            continue
        except BaseException:
            hold(None)
            raise
        if live:
            # Until the claim stood, whoever lives could commit.
            list_again(storage)
        return claim


def _close_gap(storage: Storage, claim: EpochClaim) -> None:
    """Claim the numbers that were used and never claimed: every owner before us must find itself followed.

    Whoever holds epoch n looks for n + 1 only (`require_newest`).
    """
    names = storage.list_names(f"{EPOCHS}/")
    last = max((epoch for name in names if (epoch := parse_epoch_name(name)) is not None), default=0)
    if claim.epoch - last > _LARGEST_GAP:
        raise CorruptCheckpoint(
            f"a name in this run says that epoch {claim.epoch - 1} was there, and the last claim is that of "
            f"epoch {last}; that cannot be: find what has that number and remove it",
            phase="claim",
            path=storage.url,
        )
    for epoch in range(last + 1, claim.epoch):
        skipped = replace(claim, epoch=epoch, epoch_id=os.urandom(16).hex(), purpose="skipped")
        with suppress(StorageExists):
            storage.create_exclusive(f"{EPOCHS}/{epoch_name(epoch)}", encode_epoch(skipped))


def record_resumed(storage: Storage, epoch: int, directory: StepDir, resumed_epoch: int, step: int) -> None:
    """Write down from what an epoch went on; the first resume of an epoch is its lineage."""
    document = Resumed(epoch=epoch, directory=str(directory), resumed_epoch=resumed_epoch, step=step)
    try:
        storage.create_exclusive(f"{EPOCHS}/{resumed_name(epoch)}", encode_epoch(document))
    except StorageExists:
        log.debug("epoch %d resumed before", epoch)


def _live_epochs(storage: Storage) -> list[int]:
    return [
        epoch for epoch in _leased_epochs(storage) if storage.lease_is_held(f"{EPOCHS}/{lease_name(epoch)}")
    ]


def _leased_epochs(storage: Storage) -> list[int]:
    """Those whose lease was taken and not cleared away, held or not."""
    epochs = (parse_lease_name(name) for name in storage.list_names(f"{EPOCHS}/"))
    return sorted(epoch for epoch in epochs if epoch is not None)


def _last_used_epoch(storage: Storage) -> int:
    """The greatest epoch that left any trace, so that a lost claim never lets a number come twice."""
    used = [0]
    for name in storage.list_names(f"{EPOCHS}/"):
        used += [epoch for epoch in (parse_epoch_name(name), parse_lease_name(name)) if epoch]
    for name in storage.list_names(""):
        directory = StepDir.parse(name.removesuffix("/"))
        if directory is None:
            continue
        used.append(directory.epoch or 0)
        for file in storage.list_names(f"{directory}/"):
            match = _ATTEMPT_IN_NAME.search(file)
            attempt = AttemptId.parse(match[1]) if match else None
            used.append(attempt.epoch if attempt else 0)
    return max(used)
