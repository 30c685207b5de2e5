"""What all ranks have rank 0 do once, such as a prune or a pin; its answer, or its failure, is everybody's.

Called by the Checkpointer, on the main thread of all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from dcp_ckpt.coordination import Channel, broadcast
from dcp_ckpt.errors import ConfigError
from dcp_ckpt.lifecycle.catalogue import Catalogue, CheckpointEntry, read_catalogue
from dcp_ckpt.save.session import Session
from dcp_ckpt.storage.base import Storage

__all__ = ["Orders"]

_Result = TypeVar("_Result")


class Orders:
    """One rank's part; made on all ranks, and given the same orders on all of them.

    Args:
        timeout_seconds: how long rank 0 may take.
    """

    def __init__(self, storage: Storage, channel: Channel, *, timeout_seconds: float) -> None:
        self._storage = storage
        self._channel = channel
        self._timeout_seconds = timeout_seconds
        self._given = 0

    def give(self, what: str, act: Callable[[], _Result], *, timeout_seconds: float | None = None) -> _Result:
        """Let rank 0 act once. Collective; blocks.

        Raises:
            CheckpointError: what `act` raises on rank 0, on all ranks.
        """
        self._given += 1
        timeout = timeout_seconds or self._timeout_seconds
        return broadcast(self._channel, f"{what}/{self._given}", act, timeout_seconds=timeout)

    def final_save(self, session: Session, step: int, *, deadline: float, why: str) -> bool:
        """Whether to save once more before `deadline` (monotonic seconds); rank 0 weighs the time.

        Collective; blocks, on rank 0 also for a save in flight, until the deadline at most.
        """
        return self.give(
            "stop/final save",
            lambda: session.saver.final_save(step, deadline=deadline, why=why).saves,
            timeout_seconds=max(deadline - time.monotonic(), 0.0) + self._timeout_seconds,
        )

    def mark(
        self,
        what: str,
        step: int,
        mark: Callable[[CheckpointEntry, Catalogue], object],
        session: Session | None,
        *,
        after_its_save: bool = False,
    ) -> None:
        """Let rank 0 mark the checkpoint of a step. Collective; blocks.

        Args:
            session: learns of it, if there is one.
            after_its_save: wait for the save of that step first, if it is under way.

        Raises:
            CheckpointNotFound: there is none; on all ranks.
            CheckpointError: what `mark` raises on rank 0, on all ranks.
        """
        if type(step) is not int:
            raise ConfigError(f"step must be a whole number, not {step!r}")

        def act() -> None:
            if session is not None and after_its_save:
                session.saver.wait_for(step, timeout_seconds=self._timeout_seconds)
            catalogue = read_catalogue(self._storage)
            mark(catalogue.require_step(step, url=self._storage.url), catalogue)
            if session is not None:
                session.marks_changed()

        self.give(what, act, timeout_seconds=(2 if after_its_save else 1) * self._timeout_seconds)
