"""Filling targets together: what several ranks of a host want alike, one of them reads and all take.

Replicas would read the same bytes as often as there are ranks on the host: from the disk, from the page cache
or, at a price, from an object store. Here each reads and checks a part of them into memory that all of them
map (`load.neighbours`), and everyone copies from there. Runs on the main thread of every rank.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from dcp_ckpt.coordination import Channel
from dcp_ckpt.load.fill import fill, read_all
from dcp_ckpt.load.landing import spoiling_on_failure
from dcp_ckpt.load.meeting import meet, stay_alone
from dcp_ckpt.load.neighbours import Neighbours, Slots
from dcp_ckpt.load.read_plan import MOST_READ_BYTES, ReadPlan, Target, plan_reads, requests_for
from dcp_ckpt.load.replicas import shares_of, wants_digest
from dcp_ckpt.load.source import Source
from dcp_ckpt.storage.base import ByteRange

__all__ = ["fill_together"]

_WORTH_IT_BYTES = 8 << 20
"""Less is read sooner than ranks have met."""

_SLOTS_PER_THREAD = 2
"""One is filled while the other is emptied."""


def fill_together(
    source: Source,
    targets: Mapping[str, Target],
    channel: Channel,
    *,
    tag: str,
    verify: bool,
    concurrency: int,
    timeout_seconds: float,
) -> int:
    """Fill all targets in place, as `load.fill.fill`. Called on all ranks; blocks.

    Where it fails on a rank, in whatever way, all targets of that rank are NaN afterwards, as with `fill`.

    Args:
        targets: by stored name. Those that have copies are read together with ranks of this host that want
            exactly the same of them; any rank may want other things.
        tag: unique in the life of the channel.
        timeout_seconds: how long this rank waits for others while nothing at all happens.

    Returns:
        Bytes that this rank read from storage.

    Raises:
        CorruptCheckpoint: as `fill`; on the rank that found it.
        CoordinationError: another rank that reads for this one has ended, failed, or stands still.
    """
    with spoiling_on_failure(target.local for target in targets.values()):
        copied = {name: target for name, target in targets.items() if target.has_copies}
        num_copied_bytes = sum(target.local.nbytes for target in copied.values())
        if num_copied_bytes < _WORTH_IT_BYTES or len(channel.host_ranks) == 1:
            stay_alone(channel, tag)
            return fill(source, targets, verify=verify, concurrency=concurrency)
        try:
            copies, others = _plans(source, targets, verify=verify)
        except BaseException:
            stay_alone(channel, tag)
            raise
        wants = wants_digest(source.directory, copied, verify=verify)
        make_slots = partial(Slots, _SLOTS_PER_THREAD * concurrency, MOST_READ_BYTES)
        neighbours = meet(channel, tag, wants, make_slots, timeout_seconds=timeout_seconds)
        if neighbours is None:
            num_bytes = read_all(copies, concurrency=concurrency)
        else:
            with neighbours:
                num_bytes = _read_together(copies, neighbours, concurrency=concurrency)
        return num_bytes + read_all(others, concurrency=concurrency)


def _plans(source: Source, targets: Mapping[str, Target], *, verify: bool) -> tuple[ReadPlan, ReadPlan]:
    requests = requests_for(source, targets)
    copies = [request for request in requests if request.target.has_copies]
    others = [request for request in requests if not request.target.has_copies]
    return plan_reads(source, copies, verify=verify), plan_reads(source, others, verify=verify)


@torch.no_grad()
def _read_together(plan: ReadPlan, neighbours: Neighbours, *, concurrency: int) -> int:
    """Read this rank's share, show it, and take everything."""
    shares = shares_of(plan.reads, len(neighbours.ranks))
    own = shares[neighbours.index]
    counts = {rank: len(share) for rank, share in zip(neighbours.ranks, shares, strict=True)}
    neighbours.start(counts, partial(_take, plan))
    shown = _Shown(plan, own, neighbours)
    try:
        with plan.reading():
            plan.source.storage.read_ranges(shown.ranges(), shown.consume, concurrency=concurrency)
        neighbours.finish()
    except BaseException as error:
        neighbours.fail(error)
        raise
    return sum(plan.reads[number].num_bytes for number in own)


@torch.no_grad()  # which is a thread's own
def _take(plan: ReadPlan, number: int, data: memoryview) -> None:
    plan.take(plan.reads[number], data)


class _Shown:
    """What is done with each read of this rank's share, on the thread that made it."""

    def __init__(self, plan: ReadPlan, share: Sequence[int], neighbours: Neighbours) -> None:
        self._plan = plan
        self._share = share
        self._neighbours = neighbours
        self._lock = threading.Lock()
        self._borrowed: dict[int, tuple[int, memoryview]] = {}

    def ranges(self) -> list[ByteRange]:
        """The reads of the share, into free slots where the storage can."""
        reads = self._plan.reads
        return [
            ByteRange(
                key=self._plan.source.file_key(reads[number].rank, reads[number].file),
                offset=reads[number].start,
                num_bytes=reads[number].num_bytes,
                into=partial(self._borrow, index),
                into_per_thread=True,
            )
            for index, number in enumerate(self._share)
        ]

    def consume(self, index: int, data: memoryview) -> None:
        number = self._share[index]
        read = self._plan.reads[number]
        if data:
            (memory,) = self._borrow(index)
            memory[:] = data
        with self._lock:
            slot, memory = self._borrowed.pop(index)
        self._plan.check(read, [memory])
        self._neighbours.show(slot, number, read.num_bytes)
        self._plan.take(read, memory)
        self._neighbours.give_back(slot)

    def _borrow(self, index: int) -> Sequence[memoryview]:
        slot, memory = self._neighbours.borrow(self._plan.reads[self._share[index]].num_bytes)
        with self._lock:
            self._borrowed[index] = slot, memory
        return [memory]
