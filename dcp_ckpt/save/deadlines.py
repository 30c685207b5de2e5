"""How long parts of a save may take after its deadline, so that every rank hears of it soon after.

With `timeout_seconds` in the config, a handle has its outcome within `timeout_seconds` +
`REPORT_SLACK_SECONDS` + `CONCLUDE_SECONDS` on all ranks, also with a store that does not answer. A system
call that hangs on rank 0 itself cannot be cut short: the other ranks then wait for `timeout_seconds` longer.
"""

from __future__ import annotations

__all__ = [
    "AFTERWARDS_SECONDS",
    "CONCLUDE_SECONDS",
    "REPORT_SLACK_SECONDS",
    "WRITER_END_SECONDS",
    "take_back_seconds",
]

REPORT_SLACK_SECONDS = 5.0
"""How long after the deadline reports are still awaited: what a rank says at its own deadline has to win over
what can be said of a silent rank. Ending a writer is part of that."""

CONCLUDE_SECONDS = 10.0
"""How long after that, or after the last report, rank 0 asks a store to commit or to take back."""

AFTERWARDS_SECONDS = 10.0
"""How long rank 0 asks a store for `.metadata` after a commit. A save that waits behind it waits so much
longer for its outcome, at most; retention is not tried then."""

WRITER_END_SECONDS = 15.0
"""How long an idle writer may take to end: to give up a lease of a store that does not answer."""

_TAKE_BACK_SECONDS = 8.0


def take_back_seconds(timeout_seconds: float) -> float:
    """How long before the deadline a writer gives up asking a store, to take back what it has sent."""
    return min(_TAKE_BACK_SECONDS, 0.2 * timeout_seconds)
