"""Merging ranges into requests: pure.

A request costs a round trip, so ranges of one object that lie near each other are fetched together and cut
apart again. Called by `ObjectStorage.read_ranges`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcp_ckpt.storage.base import ByteRange

__all__ = ["FETCH_BYTES", "GAP_BYTES", "Fetch", "merge_ranges"]

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
