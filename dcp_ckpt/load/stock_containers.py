"""Headers of many containers, read in few merged requests.

Owns which parts of a container are read first and how requests are merged; what the bytes mean is the
caller's. Knows no tensors. Called by `load.stock`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dcp_ckpt.format.stock_metadata import StockPlace
from dcp_ckpt.format.torch_container import ContainerWindows, MoreBytesNeeded
from dcp_ckpt.storage.base import ByteRange, Storage

__all__ = ["scan_containers"]

_Result = TypeVar("_Result")

_HEAD_BYTES = 1536
"""Holds everything before the payload: the pickle of the tensor and four short records."""

_TAIL_BYTES = 1024
"""Holds everything after it: two short records and the directory."""

_WHOLE_BYTES = 8 << 10
"""A container up to this size is read whole."""

_MERGE_GAP_BYTES = 64 << 10
_READ_BYTES = 4 << 20
_CONCURRENT_READS = 4


@dataclass(frozen=True, kw_only=True)
class _Need:
    """Bytes `start` to `stop` of a file, for the container with this index."""

    container: int
    key: str
    start: int
    stop: int


def scan_containers(
    storage: Storage,
    directory: str,
    places: Sequence[tuple[str, StockPlace]],
    parse: Callable[[ContainerWindows], _Result],
    *,
    whole: bool = False,
) -> list[_Result]:
    """Parse every container from as few bytes as it needs. Blocks; reads several ranges at once.

    Args:
        places: for each container, what it is (for messages) and where.
        parse: raises `MoreBytesNeeded` for what it lacks, and is called again with it.
        whole: read every container whole.

    Returns:
        The results, in order of `places`.

    Raises:
        StorageError: a file is missing, or could not be read.
        LoadError: what `parse` raises.
    """
    windows = [ContainerWindows(place.num_bytes, what=what) for what, place in places]
    needs: list[_Need] = []

    def need(container: int, start: int, stop: int) -> None:
        place = places[container][1]
        key = f"{directory}/{place.file}"
        needs.append(
            _Need(container=container, key=key, start=place.offset + start, stop=place.offset + stop)
        )

    for index, (_, place) in enumerate(places):
        if whole or place.num_bytes <= _WHOLE_BYTES:
            need(index, 0, place.num_bytes)
        else:
            need(index, 0, _HEAD_BYTES)
            need(index, place.num_bytes - _TAIL_BYTES, place.num_bytes)
    results: dict[int, _Result] = {}
    while needs:
        asked, needs = needs, []
        _read(storage, asked, windows, places)
        for index in sorted({one.container for one in asked}):
            try:
                results[index] = parse(windows[index])
            except MoreBytesNeeded as more:
                need(index, more.start, more.stop)
    return [results[index] for index in range(len(places))]


def _read(
    storage: Storage,
    needs: Sequence[_Need],
    windows: Sequence[ContainerWindows],
    places: Sequence[tuple[str, StockPlace]],
) -> None:
    runs = _merged(needs)

    def consume(number: int, data: memoryview) -> None:
        run = runs[number]
        for one in run:
            relative = one.start - places[one.container][1].offset
            part = data[one.start - run[0].start : one.stop - run[0].start]
            windows[one.container].add(relative, bytes(part))

    storage.read_ranges(
        [
            ByteRange(
                key=run[0].key,
                offset=run[0].start,
                num_bytes=max(one.stop for one in run) - run[0].start,
            )
            for run in runs
        ],
        consume,
        concurrency=_CONCURRENT_READS,
    )


def _merged(needs: Sequence[_Need]) -> list[list[_Need]]:
    """Groups of needs that are near each other in one file, each for one request."""
    runs: list[list[_Need]] = []
    for one in sorted(needs, key=lambda need: (need.key, need.start)):
        last = runs[-1] if runs else None
        if (
            last is not None
            and last[0].key == one.key
            and one.start <= last[-1].stop + _MERGE_GAP_BYTES
            and one.stop - last[0].start <= _READ_BYTES
        ):
            last.append(one)
        else:
            runs.append([one])
    return runs
