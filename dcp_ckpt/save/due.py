"""Whether a save is due, with the same answer on all ranks also where the rule looks at a clock."""

from __future__ import annotations

import math
import time

from dcp_ckpt.coordination import Channel, broadcast
from dcp_ckpt.policies import SavePolicy

__all__ = ["DueSaves"]

_REMEMBERED_QUESTIONS = 10_000
"""No rank is so many steps behind another."""


class DueSaves:
    """One rank's part; made on all ranks.

    Args:
        timeout_seconds: how long to wait for rank 0, where its clock decides.
    """

    def __init__(self, channel: Channel, policy: SavePolicy, *, timeout_seconds: float) -> None:
        self._channel = channel
        self._policy = policy
        self._timeout_seconds = timeout_seconds
        self._questions = 0
        self._last_save = time.monotonic()

    def saved(self) -> None:
        """A save has begun."""
        self._last_save = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether to save after this step. Collective; blocks for rank 0 only where the clock decides.

        Raises:
            CoordinationError: rank 0 did not answer in time.
        """
        always = self._policy.is_due(step=step, seconds_since_save=0.0)
        if always or not self._policy.is_due(step=step, seconds_since_save=math.inf):
            return always
        self._questions += 1
        if self._channel.rank == 0:
            self._channel.forget([f"due/{self._questions - _REMEMBERED_QUESTIONS}"])
        elapsed = time.monotonic() - self._last_save
        return broadcast(
            self._channel,
            f"due/{self._questions}",
            lambda: self._policy.is_due(step=step, seconds_since_save=elapsed),
            timeout_seconds=self._timeout_seconds,
        )
