"""Ranks of one host that show each other what they read: connections, and the memory that they share.

Owns sockets, shared memory and the threads that serve them, for the length of one load. Must not know what
the bytes mean. Called by `load.passing`, on the main thread and on those that read.

Every rank is connected with every other one, over abstract Unix sockets: they have no file that could be left
behind, and end with their processes, so a dead neighbour is noticed at once. Each rank reads into a few slots
of a memfd, which all others map, and shows a slot when it is full; it is free again when all have taken what
is in it. Whoever serves a connection never waits for anything but its messages, so there is no circle of
ranks that wait for each other.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from dcp_ckpt.closing import Closing
from dcp_ckpt.errors import CoordinationError

__all__ = ["Link", "Neighbours", "Slots"]

log = logging.getLogger(__name__)

_MESSAGE = struct.Struct("<BIII")
_SHOWN, _TAKEN = 1, 2
_PAGE_BYTES = 4096


class Slots(Closing):
    """Some pieces of memory of the same size, in one memfd, which has no name that could leak.

    Args:
        number: how many.
        slot_bytes: of each; rounded up to whole pages.
        descriptor: of another process's; None makes new ones.
    """

    def __init__(self, number: int, slot_bytes: int, *, descriptor: int | None = None) -> None:
        self.number = number
        self._slot_bytes = -(-slot_bytes // _PAGE_BYTES) * _PAGE_BYTES
        size_bytes = number * self._slot_bytes
        made = os.memfd_create("dcp_ckpt-load", os.MFD_CLOEXEC) if descriptor is None else descriptor
        self.descriptor = made
        try:
            if descriptor is None:
                os.ftruncate(made, size_bytes)
            self._map = mmap.mmap(made, size_bytes)
        except BaseException:
            os.close(made)
            raise
        self._view = memoryview(self._map)

    def memory(self, slot: int, num_bytes: int) -> memoryview:
        """The first bytes of one slot."""
        start = slot * self._slot_bytes
        return self._view[start : start + num_bytes]

    def close(self) -> None:
        """Give up this process's hold. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        # Where an error still refers to a part of it, the memory goes with that.
        with suppress(BufferError):
            self._view.release()
            self._map.close()


class Link:
    """The connection with one neighbour, and its slots."""

    def __init__(self, connection: socket.socket, slots: Slots) -> None:
        self.connection = connection
        self.slots = slots

    def tell(self, kind: int, slot: int, number: int, num_bytes: int = 0) -> None:
        """Send a message. Never waits: no more are under way than there are slots."""
        self.connection.send(_MESSAGE.pack(kind, slot, number, num_bytes))

    def hear(self) -> tuple[int, int, int, int] | None:
        """Wait for a message; None when the neighbour has hung up."""
        message = self.connection.recv(_MESSAGE.size)
        return _MESSAGE.unpack(message) if len(message) == _MESSAGE.size else None


class Neighbours(Closing):
    """One rank's view of the ranks that read for each other.

    Args:
        rank: this one.
        slots: its own.
        links: to the others, by rank.
        timeout_seconds: how long nothing at all may happen here before the load has failed.
    """

    def __init__(self, rank: int, slots: Slots, links: Mapping[int, Link], *, timeout_seconds: float) -> None:
        self.ranks = tuple(sorted((rank, *links)))
        self.index = self.ranks.index(rank)
        self._slots = slots
        self._links = links
        self._timeout_seconds = timeout_seconds
        self._changed = threading.Condition()
        self._last_change = time.monotonic()
        self._failure: BaseException | None = None
        self._free = list(range(slots.number))
        self._holders: dict[int, set[int]] = {}
        self._awaited: dict[int, int] = {}
        self._threads: list[threading.Thread] = []
        for link in links.values():
            link.connection.settimeout(timeout_seconds)

    def start(self, counts: Mapping[int, int], take: Callable[[int, memoryview], None]) -> None:
        """Begin to take what the others show.

        Args:
            counts: how many reads each rank will show, this one included.
            take: called as `take(number, data)` with the number of a read, on the thread of its connection;
                `data` is valid during the call only.
        """
        self._awaited = {rank: counts[rank] for rank in self._links}
        own = counts[self.ranks[self.index]]
        for rank, link in self._links.items():
            thread = threading.Thread(
                target=self._serve, args=(rank, link, counts[rank] + own, take), name=f"dcp_ckpt-from-{rank}"
            )
            thread.start()
            self._threads.append(thread)

    def borrow(self, num_bytes: int) -> tuple[int, memoryview]:
        """Wait for a free slot of this rank.

        Raises:
            CoordinationError: a neighbour has ended, or takes nothing any more.
            BaseException: what failed here meanwhile.
        """
        with self._changed:
            self._wait_until(lambda: bool(self._free))
            slot = self._free.pop()
        return slot, self._slots.memory(slot, num_bytes)

    def show(self, slot: int, number: int, num_bytes: int) -> None:
        """Tell all others that read `number` is in a slot. `give_back` frees it for this rank's part."""
        with self._changed:
            self._holders[slot] = set(self.ranks)
        for rank, link in self._links.items():
            try:
                link.tell(_SHOWN, slot, number, num_bytes)
            except OSError as error:
                # What failed here hangs up, too: that is the reason then.
                raise self._failure or self._gone(rank) from error

    def give_back(self, slot: int) -> None:
        """Say that this rank itself is done with what it has shown."""
        self._release(slot, self.ranks[self.index])

    def finish(self) -> None:
        """Wait until everything was taken, here and by the others. Raises as `borrow`."""
        with self._changed:
            self._wait_until(lambda: not any(self._awaited.values()) and not self._holders)

    def fail(self, error: BaseException) -> None:
        """Make this the reason why nothing goes on, and let the others know that nothing will come."""
        with self._changed:
            if self._failure is None:
                self._failure = error
            self._changed.notify_all()
        self._hang_up()

    def close(self) -> None:
        """Hang up and wait for the threads. Idempotent."""
        with self._changed:
            self._failure = self._failure or CoordinationError("the connection was closed", phase="read")
            self._changed.notify_all()
        self._hang_up()
        for thread in self._threads:
            thread.join()
        for link in self._links.values():
            link.connection.close()
            link.slots.close()
        self._slots.close()

    def _serve(
        self, rank: int, link: Link, num_messages: int, take: Callable[[int, memoryview], None]
    ) -> None:
        """All messages of one neighbour; how many there will be is known."""
        try:
            while num_messages:
                try:
                    message = link.hear()
                except TimeoutError:
                    self._require_change()
                    continue
                if message is None:
                    raise self._gone(rank)
                num_messages -= 1
                kind, slot, number, num_bytes = message
                if kind == _TAKEN:
                    self._release(slot, rank)
                    continue
                take(number, link.slots.memory(slot, num_bytes))
                link.tell(_TAKEN, slot, number)
                with self._changed:
                    self._awaited[rank] -= 1
                    self._note_change()
        except ConnectionError:
            self.fail(self._gone(rank))
        except BaseException as error:  # raised on the thread that waits
            self.fail(error)

    def _release(self, slot: int, rank: int) -> None:
        with self._changed:
            holders = self._holders[slot]
            holders.discard(rank)
            if not holders:
                del self._holders[slot]
                self._free.append(slot)
            self._note_change()

    def _note_change(self) -> None:
        self._last_change = time.monotonic()
        self._changed.notify_all()

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            if self._failure is not None:
                raise self._failure
            if not self._changed.wait(self._timeout_seconds):
                self._require_change()

    def _require_change(self) -> None:
        if time.monotonic() - self._last_change < self._timeout_seconds:
            return
        own = self.ranks[self.index]
        silent = sorted({rank for holders in self._holders.values() for rank in holders} - {own})
        silent = silent or [rank for rank, missing in sorted(self._awaited.items()) if missing]
        raise CoordinationError(
            f"rank(s) {', '.join(map(str, silent))} did not go on with the load for "
            f"{self._timeout_seconds:.0f} s, and rank {own} reads together with them",
            rank=silent[0] if silent else own,
            phase="read",
        )

    def _gone(self, rank: int) -> CoordinationError:
        own = self.ranks[self.index]
        return CoordinationError(
            f"rank {rank} has ended or failed while it read together with rank {own}", rank=rank, phase="read"
        )

    def _hang_up(self) -> None:
        for link in self._links.values():
            with suppress(OSError):
                link.connection.shutdown(socket.SHUT_RDWR)
