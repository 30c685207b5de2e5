"""Ranks compare what must be equal on them, and name what is not.

Of every set of ranks the lowest one tells what it has, and the others compare: rank 0 for what all ranks
hold, the lowest rank of a pipeline stage for what the stage holds. Called by the pilot, on its thread.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from dcp_ckpt.coordination import Channel
from dcp_ckpt.errors import CoordinationError, SaveFailed
from dcp_ckpt.format.boxes import compress_ranks
from dcp_ckpt.save.record import SaveKeys
from dcp_ckpt.save.replicas import ReplicaSet
from dcp_ckpt.wording import shown_names

__all__ = ["Comparison"]


class Comparison:
    """One rank's part. Messages go over the channel of its owner."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._told: list[SaveKeys] = []

    def tell(self, keys: SaveKeys, sets: Sequence[ReplicaSet], *, failed: bool) -> None:
        """Publish what others compare theirs with. Does not block.

        Args:
            sets: all of this rank's.
            failed: this rank does not know its sets; whoever waits for it must not wait for long.
        """
        led = [one for one in sets if one.leader == self._channel.rank]
        if led or failed:
            self._channel.put(keys.replicas(self._channel.rank), {_key(one): _message(one) for one in led})
            self._told.append(keys)

    def require_same(self, keys: SaveKeys, sets: Sequence[ReplicaSet], *, step: int, deadline: float) -> None:
        """Compare with the leaders. Blocks until they have told, or the deadline (monotonic seconds).

        Raises:
            SaveFailed: what differs, by name, and between which ranks.
            CoordinationError: a leader told nothing in time.
        """
        known: dict[int, Mapping[str, Any]] = {}
        for one in sets:
            if one.leader == self._channel.rank:
                continue
            if one.leader not in known:
                known[one.leader] = self._told_by(one.leader, keys, deadline)
            differing = _differing(one, known[one.leader].get(_key(one)))
            if differing:
                raise SaveFailed(
                    _complaint(one, differing), rank=self._channel.rank, step=step, phase="stage"
                )

    def forget(self, *, before: int) -> None:
        """Free what was told in calls before this one: whoever reported to it has read them."""
        old = [keys for keys in self._told if keys.call < before]
        if old:
            self._channel.forget([keys.replicas(self._channel.rank) for keys in old])
            self._told = self._told[len(old) :]

    def _told_by(self, leader: int, keys: SaveKeys, deadline: float) -> Mapping[str, Any]:
        try:
            left = deadline - time.monotonic()
            message: Mapping[str, Any] = self._channel.get(keys.replicas(leader), timeout_seconds=left)
        except TimeoutError as error:
            raise CoordinationError(
                f"rank {leader} did not stage this save in time", phase="write"
            ) from error
        return message


def _key(one: ReplicaSet) -> str:
    """Names a set in a message."""
    return " ".join(f"{first}+{count}" for first, count in compress_ranks(one.ranks)) or "all"


def _message(one: ReplicaSet) -> dict[str, Any]:
    return {"digest": one.digest, "names": one.digests}


def _differing(ours: ReplicaSet, told: Mapping[str, Any] | None) -> list[str]:
    if told is not None and told["digest"] == ours.digest:
        return []
    theirs: Mapping[str, str] = {} if told is None else told["names"]
    return sorted(name for name in {*theirs, *ours.digests} if theirs.get(name) != ours.digests.get(name))


def _complaint(one: ReplicaSet, differing: Sequence[str]) -> str:
    shown = shown_names(differing)
    if one.ranks:
        where = f"ranks {', '.join(map(str, one.ranks))} differs from rank {one.leader}'s"
        return f"state that must be equal on {where}: {shown}; they hold the same part of the model"
    return (
        f"state that must be equal on all ranks differs from rank 0's: {shown}; if it belongs to each rank, "
        "pass it as per_rank, and if ranks hold parts of the model, say so with TrainState(mesh_roles=...)"
    )
