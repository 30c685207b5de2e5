"""Before the first step: does what a save takes exist? Asked of all ranks at once, when a load has ended.

Owns the exchange of the ranks' needs and the verdict, which is pure and the same on all of them; then every
rank makes its arena. So the first save neither fails for memory or space that were never there, nor pays for
fresh pages. Called by the session, on the main thread of all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dcp_ckpt.coordination import (
    Channel,
    agree,
    as_checkpoint_error,
    error_fields,
    error_from_fields,
    reduce,
)
from dcp_ckpt.errors import CheckpointError, StateError, StorageFull
from dcp_ckpt.format.documents import converted
from dcp_ckpt.policies import KeepPolicy
from dcp_ckpt.save.memory import MemoryNeed, MemoryPool, available_memory, memory_shortage
from dcp_ckpt.save.space import full, retention_shortage
from dcp_ckpt.save.staging import Stager
from dcp_ckpt.state.component import Captured

__all__ = ["Needs", "Room", "needs_problem", "prepare_saves"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Room:
    """What rank 0 finds on storage.

    Args:
        path: where, for messages.
        free_bytes: now; None where nobody says.
        removable_bytes: of committed checkpoints that retention may remove in time.
    """

    path: str
    free_bytes: int | None
    removable_bytes: int


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a save takes on one rank, told to rank 0.

    Args:
        memory_bytes: beyond what it holds.
        file_bytes: of its data file.
        pools: where its memory comes from.
        room: on rank 0.
        unready: why the state cannot be looked at yet.
        error: fields of the CheckpointError that any save of this state would meet.
    """

    rank: int
    memory_bytes: int = 0
    file_bytes: int = 0
    pools: tuple[MemoryPool, ...] = ()
    room: Room | None = None
    unready: str | None = None
    error: dict[str, Any] | None = None


def needs_problem(needs: Sequence[Needs]) -> CheckpointError | None:
    """Why no save of this state can succeed; None when nothing is known. Pure."""
    errors = [error_from_fields(need.error) for need in needs if need.error is not None]
    if errors:
        return errors[0]
    shortage = memory_shortage(
        [MemoryNeed(rank=need.rank, num_bytes=need.memory_bytes, pools=need.pools) for need in needs]
    )
    if shortage is not None:
        return shortage
    room = needs[0].room
    needed = sum(need.file_bytes for need in needs)
    if room is not None and room.free_bytes is not None and room.free_bytes < needed:
        return full(needed, room.free_bytes, room.path, when=" before the first step")
    return None


def prepare_saves(
    stager: Stager,
    capture: Callable[[], Captured],
    look_for_room: Callable[[], Room],
    channel: Channel,
    *,
    keep: KeepPolicy | None,
    tag: str,
    timeout_seconds: float,
) -> int | None:
    """Make sure that a save of this state finds memory and space, and make its arena. Called on all ranks.

    Args:
        capture: this rank's state as it is now.
        look_for_room: called on rank 0 only.
        keep: for a warning when retention needs more room than there is.
        tag: unique in the life of the channel.

    Returns:
        The size of a checkpoint in bytes; None when the state cannot be looked at yet.

    Raises:
        CheckpointError: no save of this state can succeed: StateError, StorageFull; on all ranks. No arena is
            held then.
    """
    captured, own = _own_needs(stager, capture, look_for_room, rank=channel.rank)
    told = reduce(
        channel,
        f"{tag}/needs",
        asdict(own),
        lambda messages: _judged(converted(list[Needs], messages), keep),
        timeout_seconds=timeout_seconds,
    )
    if told["problem"] is not None:
        stager.close()
        raise error_from_fields(told["problem"])
    needed_bytes: int | None = told["needed_bytes"]
    if captured is None or needed_bytes is None:
        return None
    _, failures = agree(
        channel, f"{tag}/arena", lambda: stager.prepare(captured), timeout_seconds=timeout_seconds
    )
    if failures:
        stager.close()
        failures.raise_first()
    return needed_bytes


def _judged(needs: Sequence[Needs], keep: KeepPolicy | None) -> dict[str, Any]:
    """On rank 0: what all ranks have to know. `needed_bytes` is None where some needs are not known."""
    problem = needs_problem(needs)
    if problem is not None:
        return {"problem": error_fields(problem), "needed_bytes": None}
    unready = [f"rank {need.rank}: {need.unready}" for need in needs if need.unready is not None]
    if unready:
        log.warning("what a save takes is not known before the first one: %s", "; ".join(unready))
        return {"problem": None, "needed_bytes": None}
    _log_needs(needs, keep)
    return {"problem": None, "needed_bytes": sum(need.file_bytes for need in needs)}


def _own_needs(
    stager: Stager, capture: Callable[[], Captured], look_for_room: Callable[[], Room], *, rank: int
) -> tuple[Captured | None, Needs]:
    try:
        captured = capture()
        size = stager.measure(captured)
        needs = Needs(
            rank=rank,
            memory_bytes=size.memory_bytes,
            file_bytes=size.file_bytes,
            pools=available_memory() if size.memory_bytes else (),
            room=look_for_room() if rank == 0 else None,
        )
    except (StateError, StorageFull) as error:
        return None, Needs(rank=rank, error=error_fields(as_checkpoint_error(error, rank=rank)))
    # Objects of the user's may not be able to give their state before training has begun, and a storage that
    # does not answer now may do so at the save.
    except Exception as error:
        log.debug("the state could not be captured", exc_info=True)
        return None, Needs(rank=rank, unready=repr(error))
    return captured, needs


def _log_needs(needs: Sequence[Needs], keep: KeepPolicy | None) -> None:
    needed = sum(need.file_bytes for need in needs)
    room = needs[0].room
    free = None if room is None else room.free_bytes
    log.info(
        "a checkpoint takes %d bytes on storage (%s bytes free) and %d bytes of memory on all ranks together",
        needed,
        "unknown" if free is None else free,
        sum(need.memory_bytes for need in needs),
    )
    if room is None or free is None:
        return
    warning = retention_shortage(
        keep, needed_bytes=needed, free_bytes=free, removable_bytes=room.removable_bytes
    )
    if warning is not None:
        log.warning("%s: %s", room.path, warning)
