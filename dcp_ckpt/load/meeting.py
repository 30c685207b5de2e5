"""How ranks of one host that want the same find and connect with each other.

Owns the one exchange over the channel, and the sockets until they are `Neighbours`. Linux. Called by
`load.passing` on all ranks, on the main thread.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from dcp_ckpt.coordination import MISSING, Channel
from dcp_ckpt.errors import CoordinationError
from dcp_ckpt.load.neighbours import Link, Neighbours, Slots

__all__ = ["meet", "stay_alone"]

log = logging.getLogger(__name__)

_HELLO = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")


def stay_alone(channel: Channel, tag: str) -> None:
    """Let the others know that this rank reads for itself. In place of `meet`."""
    if len(channel.host_ranks) > 1:
        channel.put(f"{tag}/{channel.rank}", None)


def meet(
    channel: Channel, tag: str, wants: str, make_slots: Callable[..., Slots], *, timeout_seconds: float
) -> Neighbours | None:
    """Connect with all ranks of this host that want the same. Called on all ranks, each once; blocks.

    Args:
        tag: unique in the life of the channel.
        wants: equal for ranks that want the same.
        make_slots: makes this rank's slots, or maps those of `descriptor=`.

    Returns:
        None when no other rank of this host wants it, or this one has no sockets or memory for it.

    Raises:
        CoordinationError: a rank of this host does not answer, or cannot be reached.
    """
    if len(channel.host_ranks) == 1:
        return None
    deadline = time.monotonic() + timeout_seconds
    with ExitStack() as at_the_end, ExitStack() as resources:
        try:
            listener, name = at_the_end.enter_context(_door(len(channel.host_ranks)))
            slots = resources.enter_context(make_slots())
        except OSError as error:
            log.warning("rank %d cannot read together with others, and reads alone: %s", channel.rank, error)
            stay_alone(channel, tag)
            return None
        doors = _doors(channel, tag, wants, name, timeout_seconds)
        if len(doors) == 1:
            return None
        try:
            links = _connect(channel.rank, listener, doors, slots, make_slots, resources, deadline)
        except OSError as error:
            ranks = ", ".join(str(rank) for rank in doors if rank != channel.rank)
            raise CoordinationError(
                f"rank {channel.rank} cannot connect with rank(s) {ranks} on its own host: {error}",
                rank=channel.rank,
                phase="read",
            ) from error
        neighbours = Neighbours(channel.rank, slots, links, timeout_seconds=timeout_seconds)
        resources.pop_all()
    return neighbours


def _doors(channel: Channel, tag: str, wants: str, name: str, timeout_seconds: float) -> dict[int, str]:
    """The names of the sockets of all ranks of this host that want the same, this one among them."""
    channel.put(f"{tag}/{channel.rank}", [wants, name])
    keys = [f"{tag}/{rank}" for rank in channel.host_ranks]
    answers = channel.get_many(keys, timeout_seconds=timeout_seconds)
    silent = [rank for rank, answer in zip(channel.host_ranks, answers, strict=True) if answer is MISSING]
    if silent:
        raise CoordinationError(
            f"rank(s) {', '.join(map(str, silent))} did not begin to read within {timeout_seconds:.0f} s",
            rank=silent[0],
            phase="read",
        )
    return {
        rank: answer[1]
        for rank, answer in zip(channel.host_ranks, answers, strict=True)
        if answer is not None and answer[0] == wants
    }


@contextmanager
def _door(num_ranks: int) -> Iterator[tuple[socket.socket, str]]:
    """A socket that listens under an abstract name, which is no file and ends with its process."""
    name = f"dcp_ckpt-{secrets.token_hex(16)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{name}")
        listener.listen(num_ranks)
        yield listener, name


def _connect(
    rank: int,
    listener: socket.socket,
    doors: dict[int, str],
    slots: Slots,
    make_slots: Callable[..., Slots],
    resources: ExitStack,
    deadline: float,
) -> dict[int, Link]:
    """Call on the lower ranks, then open to the higher ones. Each lets the other map its slots."""
    called: dict[int, socket.socket] = {}
    problem: OSError | None = None
    for other in [other for other in doors if other < rank]:
        try:
            connection = resources.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.settimeout(_left(deadline))
            connection.connect(f"\0{doors[other]}")
            _greet(connection, rank, slots)
            called[other] = connection
        except OSError as error:
            problem = error
    if problem is not None:
        # Only now: those that were called see it hang up, and do not go on waiting for it.
        raise problem
    expected = {other for other in doors if other > rank}
    links: dict[int, Link] = {}
    while expected:
        listener.settimeout(_left(deadline))
        connection = resources.enter_context(listener.accept()[0])
        # The names of abstract sockets are for all to see.
        if not _is_own_user(connection):
            connection.close()
            continue
        connection.settimeout(_left(deadline))
        other, descriptor = _met(connection)
        links[other] = Link(connection, resources.enter_context(make_slots(descriptor=descriptor)))
        _greet(connection, rank, slots)
        expected.remove(other)
    for other, connection in called.items():
        _, descriptor = _met(connection)
        links[other] = Link(connection, resources.enter_context(make_slots(descriptor=descriptor)))
    return links


def _greet(connection: socket.socket, rank: int, slots: Slots) -> None:
    socket.send_fds(connection, [_HELLO.pack(rank)], [slots.descriptor])


def _met(connection: socket.socket) -> tuple[int, int]:
    """The rank at the other end, and the descriptor of its slots."""
    message, descriptors, flags, _ = socket.recv_fds(connection, _HELLO.size, 1)
    if flags & socket.MSG_CTRUNC:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    if len(message) != _HELLO.size or len(descriptors) != 1:
        _close_all(descriptors)
        raise ConnectionResetError("it hung up")
    (rank,) = _HELLO.unpack(message)
    return int(rank), descriptors[0]


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _is_own_user(connection: socket.socket) -> bool:
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(found)[1] == os.geteuid())


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return left
