"""Whether a save is due, with the same answer on all ranks also where the rule looks at a clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

from dcp_ckpt.coordination import Channel, broadcast
from dcp_ckpt.policies import Moment, SaveCosts, SavePolicy

__all__ = ["DueSaves"]

_REMEMBERED_QUESTIONS = 10_000
"""No rank is so many steps behind another."""


class DueSaves:
    """One rank's part; made on all ranks.

    Args:
        costs: what saves took so far; asked on rank 0.
        timeout_seconds: how long to wait for rank 0, where its clock decides.
    """

    def __init__(
        self,
        channel: Channel,
        policy: SavePolicy,
        costs: Callable[[], SaveCosts | None],
        *,
        timeout_seconds: float,
    ) -> None:
        self._channel = channel
        self._policy = policy
        self._costs = costs
        self._timeout_seconds = timeout_seconds
        self._first_step: int | None = None
        self._questions = 0
        self._last_save = time.monotonic()

    def saved(self) -> None:
        """A save has begun."""
        self._last_save = time.monotonic()

    def is_due(self, step: int, *, finished_epoch: int | None = None, is_last: bool = False) -> bool:
        """Whether to save after this step. Collective; blocks for rank 0 only where the clock decides.

        Raises:
            CoordinationError: rank 0 did not answer in time.
        """
        if self._first_step is None:
            self._first_step = step
        moment = Moment(
            step=step, finished_epoch=finished_epoch, is_first=step == self._first_step, is_last=is_last
        )
        always = self._policy.is_due(moment)
        if always or not self._policy.is_due(replace(moment, seconds_since_save=math.inf)):
            return always
        self._questions += 1
        if self._channel.rank == 0:
            self._channel.forget([f"due/{self._questions - _REMEMBERED_QUESTIONS}"])
            moment = replace(
                moment, seconds_since_save=time.monotonic() - self._last_save, costs=self._costs()
            )
        return broadcast(
            self._channel,
            f"due/{self._questions}",
            lambda: self._policy.is_due(moment),
            timeout_seconds=self._timeout_seconds,
        )
