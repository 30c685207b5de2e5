"""One answer for all ranks to the question whether to stop, at the same call, at no cost until somebody asks.

Ranks count their calls. Who wants to stop tells rank 0; rank 0 wakes a thread on every rank, which notes how
many calls its rank has made and holds the next one; the first call that no rank has made yet is the one at
which all stop. Where a rank stays silent the round ends without a result, and the wish is told again in the
next. Until somebody asks, a call takes a lock and adds one: no message, no collective.
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

_SLICE_SECONDS = 3600.0
_ANSWER_SECONDS = 5.0
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
        self._round = 0
        self._calls = 0
        self._held = False
        self._held_at = 0.0
        self._wish: Stop | None = None
        self._told_round = -1
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
            call, held, number = self._calls, self._held, self._round
        wish = self._wish
        if self._channel.world_size == 1:
            self._agreed = wish
            return wish
        if wish is not None and self._told_round != number:
            self._told_round = number
            self._channel.put(_asked(number), _message(wish))
        if not held:
            return None
        if self._decision is None:
            self._decision = self._read_decision(number)
        if self._decision["call"] is None:
            self._decision = None
            self._begin_round(number + 1)
        elif call >= self._decision["call"]:
            self._agreed = _stop(self._decision, since=self._held_at)
        return self._agreed

    def close(self) -> None:
        """End the thread; what rank 0 has begun to settle is settled before. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            with self._lock:
                self._closed = True
                number = self._round
            # The thread may be waiting; and whoever still settles something counts on an answer of this rank.
            self._channel.put(_wake(number, self._channel.rank), None)
            if self._channel.rank == 0:
                self._channel.put(_asked(number), None)
        except CoordinationError:
            pass  # rank 0 is gone, and the thread has noticed it
        thread.join(2 * _ANSWER_SECONDS)

    def _begin_round(self, number: int) -> None:
        with self._lock:
            if self._round < number:
                self._round, self._held = number, False

    def _read_decision(self, number: int) -> dict[str, Any]:
        key, timeout = _decided(number), self._timeout_seconds
        try:
            decision: dict[str, Any] = self._channel.get(key, timeout_seconds=timeout)
        except TimeoutError as error:
            raise CoordinationError(
                f"rank 0 did not say within {self._timeout_seconds:.0f} s when to stop",
                rank=self._channel.rank,
                phase="stop",
            ) from error
        return decision

    def _run(self) -> None:
        try:
            number = 0
            while not (self._settle(number) if self._channel.rank == 0 else self._follow(number)):
                number += 1
                self._begin_round(number)
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

    def _answer(self, number: int) -> bool:
        """Hold this rank's next call, and tell how many it has made. Returns whether this rank leaves."""
        with self._lock:
            self._held, self._held_at = True, time.monotonic()
            calls, closed = self._calls, self._closed
        self._own.put(_made(number, self._channel.rank), calls)
        return closed

    def _follow(self, number: int) -> bool:
        """Other ranks: answer rank 0. Whether that is the end: a call was found, or this rank leaves."""
        self._wait(_wake(number, self._channel.rank))
        if self._answer(number):
            return True
        decision = self._own.get(_decided(number), timeout_seconds=self._timeout_seconds)
        return decision["call"] is not None

    def _settle(self, number: int) -> bool:
        """Rank 0: once somebody asks, find the first call that no rank has made. Whether that is the end."""
        asked = self._wait(_asked(number))
        if asked is None:
            return True
        ranks = range(self._channel.world_size)
        for rank in ranks[1:]:
            self._own.put(_wake(number, rank), None)
        self._answer(number)
        made = self._own.get_many([_made(number, rank) for rank in ranks], timeout_seconds=_ANSWER_SECONDS)
        silent = [rank for rank in ranks if made[rank] is MISSING]
        if silent:
            log.warning(
                "no stop yet after %s: rank(s) %s did not answer within %.0f s",
                asked["reason"], ", ".join(map(str, silent)), _ANSWER_SECONDS,
            )  # fmt: skip
        call = None if silent else max(made) + 1
        self._own.put(_decided(number), {**asked, "call": call})
        return call is not None or self._closed


def _asked(number: int) -> str:
    return f"stop/{number}/asked"


def _decided(number: int) -> str:
    return f"stop/{number}/decided"


def _wake(number: int, rank: int) -> str:
    return f"stop/{number}/wake/{rank}"


def _made(number: int, rank: int) -> str:
    return f"stop/{number}/made/{rank}"


def _message(stop: Stop) -> dict[str, Any]:
    # Clocks differ between hosts: what is left of the time crosses, not the end of it.
    return {"reason": stop.reason, "rank": stop.rank, "seconds_left": stop.deadline - time.monotonic()}


def _stop(message: dict[str, Any], *, since: float) -> Stop:
    return Stop(reason=message["reason"], rank=message["rank"], deadline=since + message["seconds_left"])
