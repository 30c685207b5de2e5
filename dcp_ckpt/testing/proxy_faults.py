"""What `fault_proxy` does to requests and connections, as values, and which requests it does it to.

Owns the vocabulary of faults. Pure, and knows no sockets. Called by tests, which choose faults, and by
`fault_proxy`, which carries them out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dcp_ckpt.testing.s3_operations import S3Operation

__all__ = [
    "INTERNAL_ERROR",
    "SLOW_DOWN",
    "Answer",
    "Arrival",
    "Decide",
    "Fault",
    "Hang",
    "Hold",
    "Link",
    "LoseAnswer",
    "Reset",
    "every_nth",
    "first",
    "no_faults",
    "nth",
]


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request whose head has arrived.

    Args:
        number: among all requests since the faults were set, from 1.
        kind_number: among those of its kind.
        query: as sent, without the question mark.
        headers: by name in lower case, but for those that hold a secret or a signature.
    """

    number: int
    kind_number: int
    method: str
    path: str
    query: str
    kind: S3Operation
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The proxy answers with an S3 error itself; the server never hears of the request."""

    status: int
    code: str


@dataclass(frozen=True, kw_only=True)
class Reset:
    """Both connections are reset (RST) once so many bytes of the body were passed on.

    With 0 bytes the server never hears of the request. With more than the body has, it gets all of it, and
    may or may not act on it.
    """

    after_body_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class LoseAnswer:
    """The request takes effect, then the client's connection is reset (RST) instead of the answer.

    Args:
        after_body_bytes: the client gets the head of the answer, and at most so much of its body. None:
            nothing at all; the server has answered completely by then.
    """

    after_body_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Hang:
    """Nobody answers, the server never hears of the request, and the connection stays open."""


@dataclass(frozen=True, kw_only=True)
class Hold:
    """The request waits at the proxy until it is released, and goes on as if nothing had happened.

    Args:
        released: set by whoever lets it go on.
        answer: the request takes effect at once, and its answer waits instead.
    """

    released: threading.Event
    answer: bool = False


Fault = Answer | Reset | LoseAnswer | Hang | Hold

Decide = Callable[[Arrival], Fault | None]
"""Called once for each request, in the proxy's thread, one at a time; None lets it pass."""

SLOW_DOWN = Answer(status=503, code="SlowDown")
INTERNAL_ERROR = Answer(status=500, code="InternalError")


@dataclass(frozen=True, kw_only=True)
class Link:
    """The network between client and server, for all requests.

    Args:
        latency_up_seconds: added to each request on its way to the server.
        latency_down_seconds: added to each answer. A new connection costs both once more, as on a network.
        bytes_per_second: the most that a connection carries, in each direction.
        reset_after_bytes_up: a connection that has carried so much towards the server is reset (RST).
    """

    latency_up_seconds: float = 0.0
    latency_down_seconds: float = 0.0
    bytes_per_second: float | None = None
    reset_after_bytes_up: int | None = None


def no_faults(arrival: Arrival) -> None:
    """Every request passes."""


def nth(number: int, fault: Fault, *, kind: S3Operation | None = None) -> Decide:
    """Only request `number`, counted from 1 among those of `kind`, or among all."""
    return lambda arrival: fault if _number(arrival, kind) == number else None


def first(count: int, fault: Fault, *, kind: S3Operation | None = None) -> Decide:
    """The first `count` requests of `kind`, or of all."""
    return lambda arrival: fault if 0 < _number(arrival, kind) <= count else None


def every_nth(number: int, fault: Fault, *, kind: S3Operation | None = None) -> Decide:
    """Requests `number`, 2 `number`, ... of `kind`, or of all."""
    return lambda arrival: fault if (n := _number(arrival, kind)) > 0 and n % number == 0 else None


def _number(arrival: Arrival, kind: S3Operation | None) -> int:
    """The number that counts for `kind`; 0 for a request of another kind."""
    if kind is None:
        return arrival.number
    return arrival.kind_number if arrival.kind == kind else 0
