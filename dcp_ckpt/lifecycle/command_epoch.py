"""The epoch of a command that changes a run: claimed, held, and given up at its end.

A command is an owner like a trainer, with one rank and no writer process (docs/format.md, section 9). Called
by what the command line runs: recover, prune, import and average.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from dcp_ckpt.errors import StorageError
from dcp_ckpt.format.epoch import EpochClaim
from dcp_ckpt.lifecycle.epochs import claim_epoch
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.storage.base import Lease, Storage

__all__ = ["command_epoch"]

log = logging.getLogger(__name__)


@contextmanager
def command_epoch(
    storage: Storage, *, purpose: str, force: bool, wait_seconds: float
) -> Iterator[EpochClaim]:
    """Own the run for as long as the context lasts. Blocks up to `wait_seconds` for those who live.

    Args:
        purpose: of the claim.
        force: go on although the owner of the run lives; it is fenced then.
        wait_seconds: how long to wait for writers that still work.

    Raises:
        ConfigError: a live owner holds the run and `force` is not given; nothing was claimed.
        StorageError: the epoch could not be claimed.
    """
    run = ensure_run(storage)
    with ExitStack() as held:

        def hold(key: str | None) -> None:
            held.close()
            if key is not None:
                held.callback(_give_up, storage.hold_lease(key))

        yield claim_epoch(
            storage,
            run_id=run.run_id,
            world_size=1,
            purpose=purpose,
            hold=hold,
            wait_seconds=wait_seconds,
            # Asked again whenever somebody else takes the number: a start that came in between lives, too.
            spare_live=not force,
        )


def _give_up(lease: Lease) -> None:
    """It ends with this process, or by itself: no command fails for it after its work is done."""
    try:
        lease.close()
    except (OSError, StorageError) as error:
        log.warning("the lease of this command could not be given up, and ends by itself: %s", error)
