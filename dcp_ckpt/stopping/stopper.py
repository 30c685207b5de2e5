"""Stopping as the checkpointer sees it: who may ask for it, and which call of the loop gets the answer.

Owns the handlers of signals, from the first call that needs them, the clock of the time limit and this rank's
part of the agreement. Called on the main thread.
"""

from __future__ import annotations

import contextlib
import time

from dcp_ckpt.closing import Closing
from dcp_ckpt.config import CheckpointConfig
from dcp_ckpt.coordination import Channel, reduce
from dcp_ckpt.errors import CoordinationError
from dcp_ckpt.stopping.agreement import Stop, StopAgreement
from dcp_ckpt.stopping.signals import SignalWatch

__all__ = ["TAKEN_OVER", "TIME_LIMIT", "Stopper"]

TIME_LIMIT = "time limit"
TAKEN_OVER = "taken over"

_END_SECONDS = 30.0


class Stopper(Closing):
    """One rank's part; made on all ranks.

    Args:
        config: `stop_signals`, `stop_after_seconds` (counted from now) and `stop_grace_seconds`.
    """

    def __init__(self, channel: Channel, config: CheckpointConfig) -> None:
        self._channel = channel
        self._config = config
        self._started = time.monotonic()
        self._signals: SignalWatch | None = None
        # Now, while all ranks are here: what is settled later needs an answer of each of them at once.
        self._agreement = StopAgreement(channel, timeout_seconds=config.timeout_seconds)
        self._is_answered = False

    @property
    def agreed(self) -> Stop | None:
        """Why all ranks stop, once they have been told so."""
        return self._agreement.agreed

    def before_save(self) -> Stop | None:
        """Asked before a save is decided, so that a stop finds its final save. Collective."""
        self._is_answered = True
        return self._look()

    def should_stop(self) -> bool:
        """The answer of the `before_save` just before, or else a new one. Collective."""
        if self._signals is None:
            # Not before: a program that never asks would swallow its signals.
            self._signals = SignalWatch(self._config.stop_signals, self._ask)
        if self._is_answered:
            self._is_answered = False
            return self.agreed is not None
        return self._look() is not None

    def taken_over(self) -> None:
        """A newer start owns the run. From any thread."""
        self._ask(TAKEN_OVER)

    def end_together(self) -> None:
        """Wait for the other ranks to come here, too, a while at most. Collective, after a stop.

        A launcher that sees one rank end signals the others, who may still be busy.
        """
        with contextlib.suppress(CoordinationError):
            reduce(self._channel, "stop/end", None, lambda _: None, timeout_seconds=_END_SECONDS)

    def close(self) -> None:
        """Give the signals back and leave the agreement. Idempotent."""
        self._agreement.close()
        if self._signals is not None:
            self._signals.close(is_heard=self.agreed is not None)

    def _look(self) -> Stop | None:
        limit = self._config.stop_after_seconds
        is_watching = self._signals is not None
        if is_watching and limit is not None and time.monotonic() - self._started >= limit:
            # Nobody is about to kill the process: the final save has all the time that a save may take.
            self._agreement.ask(TIME_LIMIT, grace_seconds=self._config.timeout_seconds)
        return self._agreement.look()

    def _ask(self, reason: str) -> None:
        self._agreement.ask(reason, grace_seconds=self._config.stop_grace_seconds)
