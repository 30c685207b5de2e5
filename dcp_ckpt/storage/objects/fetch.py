"""Merging ranges into requests, and where the bytes of a request go; without effects but on memory.

A request costs a round trip, so ranges of one object that lie near each other are fetched together and cut
apart again. Called by `ObjectStorage.read_ranges` and by the clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcp_ckpt.storage.base import Buffer, ByteRange

__all__ = ["FETCH_BYTES", "GAP_BYTES", "Fetch", "Filling", "memory_for", "merge_ranges"]

FETCH_BYTES = 8 << 20
"""Ranges are merged up to this; one range is never split."""

GAP_BYTES = 1 << 20
"""What lies between two ranges is fetched with them up to this: less time than another round trip."""


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """One request.

    Args:
        members: numbers of the ranges that it answers.
    """

    key: str
    offset: int
    num_bytes: int
    members: tuple[int, ...]


def merge_ranges(ranges: Sequence[ByteRange]) -> list[Fetch]:
    """Cover all ranges by requests, in order of key and offset; empty ranges ask for nothing."""
    order = sorted(
        (number for number, item in enumerate(ranges) if item.num_bytes),
        key=lambda number: (ranges[number].key, ranges[number].offset),
    )
    fetches: list[Fetch] = []
    members: list[int] = []
    key, start, stop = "", 0, 0
    for number in order:
        item = ranges[number]
        end = max(stop, item.offset + item.num_bytes)
        joins = members and item.key == key and item.offset <= stop + GAP_BYTES and end - start <= FETCH_BYTES
        if not joins:
            if members:
                fetches.append(Fetch(key=key, offset=start, num_bytes=stop - start, members=tuple(members)))
            members, key, start, end = [], item.key, item.offset, item.offset + item.num_bytes
        members.append(number)
        stop = end
    if members:
        fetches.append(Fetch(key=key, offset=start, num_bytes=stop - start, members=tuple(members)))
    return fetches


def memory_for(fetch: Fetch, ranges: Sequence[ByteRange]) -> list[memoryview] | None:
    """What the members offer to be read into, with other memory for the gaps; None where one offers none.

    Members that overlap need the same bytes twice: None as well.
    """
    parts: list[memoryview] = []
    end = fetch.offset
    for item in (ranges[number] for number in fetch.members):
        if item.into is None or item.into_per_thread or item.offset < end:
            return None
        end = item.offset + item.num_bytes
    end = fetch.offset
    for item in (ranges[number] for number in fetch.members):
        assert item.into is not None, "looked at above"
        parts.append(memoryview(bytearray(item.offset - end)))
        parts.extend(item.into())
        end = item.offset + item.num_bytes
    return [part for part in parts if len(part)]


class Filling:
    """Parts of memory, filled one after the other by pieces of any size."""

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self._parts = iter(parts)
        self._left = memoryview(b"")
        self.num_bytes = 0

    def add(self, piece: Buffer) -> None:
        """Copy a piece behind the last one.

        Raises:
            ValueError: there is no room for it.
        """
        data = memoryview(piece)
        while data:
            while not self._left:
                found = next(self._parts, None)
                if found is None:
                    raise ValueError(f"{len(data)} bytes more than were asked for")
                self._left = found
            count = min(len(data), len(self._left))
            self._left[:count] = data[:count]
            self._left, data = self._left[count:], data[count:]
            self.num_bytes += count
