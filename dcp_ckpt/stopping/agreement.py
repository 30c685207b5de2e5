"""One answer for all ranks to the question whether to stop, at the same call, at no cost until somebody asks.

Ranks count their calls. Who wants to stop tells rank 0; rank 0 wakes a thread on every rank, which notes how
many calls its rank has made and holds the next one; the first call that no rank has made yet is the one at
which all stop. Until then a call takes a lock and adds one: no message, no collective.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from dcp_ckpt.closing import Closing
from dcp_ckpt.coordination import MISSING, Channel
from dcp_ckpt.errors import CoordinationError

__all__ = ["Stop", "StopAgreement"]

log = logging.getLogger(__name__)

_ASKED = "stop/asked"
_DECISION = "stop/decision"
_SLICE_SECONDS = 3600.0
_ANSWER_SECONDS = 20.0
"""How long the threads of all ranks may take to answer; they have nothing else to do."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """What all ranks agreed on.

    Args:
        reason: the name of a signal, or words.
        rank: the one that asked.
        deadline: until when the process may be expected to live, in monotonic seconds of this process.
    """

    reason: str
    rank: int
    deadline: float


class StopAgreement(Closing):
    """One rank's part. All ranks make it, and call `look` equally often, on their main threads.

    Args:
        channel: a clone is made for the thread.
        timeout_seconds: how long a held call waits for rank 0.
    """

    def __init__(self, channel: Channel, *, timeout_seconds: float) -> None:
        self._channel = channel
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._calls = 0
        self._held = False
        self._wish: Stop | None = None
        self._told = False
        self._held_at = 0.0
        self._decision: dict[str, Any] | None = None
        self._agreed: Stop | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        if channel.world_size > 1:
            self._own = channel.clone()
            self._thread = threading.Thread(target=self._run, name="dcp_ckpt-stop", daemon=True)
            self._thread.start()

    @property
    def agreed(self) -> Stop | None:
        """What was agreed on, once `look` has said so."""
        return self._agreed

    def ask(self, reason: str, *, grace_seconds: float) -> None:
        """Wish to stop; the first wish counts. For any thread and signal handlers: it only takes a note."""
        if self._wish is None:
            self._wish = Stop(
                reason=reason, rank=self._channel.rank, deadline=time.monotonic() + grace_seconds
            )

    def look(self) -> Stop | None:
        """Whether to stop at this call: the same answer on all ranks at their n-th call, for good.

        Blocks only while ranks settle on the call.

        Raises:
            CoordinationError: rank 0 is gone or did not answer in time.
        """
        if self._agreed is not None:
            return self._agreed
        with self._lock:
            self._calls += 1
            call, held = self._calls, self._held
        wish = self._wish
        if self._channel.world_size == 1:
            self._agreed = wish
            return wish
        if wish is not None and not self._told:
            self._told = True
            self._channel.put(_ASKED, _message(wish))
        if not held:
            return None
        if self._decision is None:
            self._decision = self._read_decision()
        if self._decision["call"] is not None and call >= self._decision["call"]:
            self._agreed = _stop(self._decision, since=self._held_at)
        return self._agreed

    def close(self) -> None:
        """End the thread; what rank 0 has begun to settle is settled before. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            # The thread may be waiting; and whoever still settles something counts on an answer of this rank.
            self._channel.put(_wake(self._channel.rank), None)
            if self._channel.rank == 0:
                self._channel.put(_ASKED, None)
        except CoordinationError:
            pass  # rank 0 is gone, and the thread has noticed it
        thread.join(2 * _ANSWER_SECONDS)

    def _read_decision(self) -> dict[str, Any]:
        try:
            decision: dict[str, Any] = self._channel.get(_DECISION, timeout_seconds=self._timeout_seconds)
        except TimeoutError as error:
            raise CoordinationError(
                f"rank 0 did not say within {self._timeout_seconds:.0f} s when to stop",
                rank=self._channel.rank,
                phase="stop",
            ) from error
        return decision

    def _run(self) -> None:
        try:
            if self._channel.rank == 0:
                self._settle()
            else:
                self._wait(_wake(self._channel.rank))
                self._answer()
        except CoordinationError as error:
            log.debug("nobody is left to agree with: %s", error)
        finally:
            self._own.close()

    def _wait(self, key: str) -> Any:
        while True:
            try:
                return self._own.get(key, timeout_seconds=_SLICE_SECONDS)
            except TimeoutError:
                continue

    def _answer(self) -> None:
        """Hold this rank's next call, and tell how many it has made."""
        with self._lock:
            self._held, self._held_at = True, time.monotonic()
            calls = self._calls
        self._own.put(_made(self._channel.rank), calls)

    def _settle(self) -> None:
        """Rank 0: once somebody asks, find the first call that no rank has made yet."""
        asked = self._wait(_ASKED)
        if asked is None:
            return
        ranks = range(self._channel.world_size)
        for rank in ranks[1:]:
            self._own.put(_wake(rank), None)
        self._answer()
        made = self._own.get_many([_made(rank) for rank in ranks], timeout_seconds=_ANSWER_SECONDS)
        silent = [rank for rank in ranks if made[rank] is MISSING]
        if silent:
            log.warning(
                "no stop after %s: rank(s) %s did not answer within %.0f s; dead or stuck",
                asked["reason"], ", ".join(map(str, silent)), _ANSWER_SECONDS,
            )  # fmt: skip
        call = None if silent else max(made) + 1
        self._own.put(_DECISION, {**asked, "call": call})


def _wake(rank: int) -> str:
    return f"stop/wake/{rank}"


def _made(rank: int) -> str:
    return f"stop/made/{rank}"


def _message(stop: Stop) -> dict[str, Any]:
    # Clocks differ between hosts: what is left of the time crosses, not the end of it.
    return {"reason": stop.reason, "rank": stop.rank, "seconds_left": stop.deadline - time.monotonic()}


def _stop(message: dict[str, Any], *, since: float) -> Stop:
    return Stop(reason=message["reason"], rank=message["rank"], deadline=since + message["seconds_left"])
