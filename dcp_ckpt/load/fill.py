"""Filling target tensors from a checkpoint: read whole blocks, check them, copy what is wanted.

What lies in a target as it lies in the file is read into it and checked there, which takes half the time of a
copy on the way (benchmarks/NOTES.md); the rest is copied from memory that is used again. Local to a rank;
blocks; several reads are under way at once, each checked and copied by the thread that read it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch

from dcp_ckpt.load.landing import spoiling_on_failure
from dcp_ckpt.load.ranges import Stretch, stretches_of
from dcp_ckpt.load.read_plan import MOST_READ_BYTES, ReadPlan, Request, Target, plan_reads, requests_for
from dcp_ckpt.load.source import Source
from dcp_ckpt.storage.base import ByteRange

__all__ = ["fill", "fill_requests", "read_all"]


def fill(source: Source, targets: Mapping[str, Target], *, verify: bool, concurrency: int) -> int:
    """Fill all targets in place.

    Args:
        targets: by stored name; one of another dtype is cast into.
        verify: check the digest of every block read, where there are digests.
        concurrency: threads that read, check and copy.

    Returns:
        Bytes read from storage.

    Raises:
        CorruptCheckpoint: a block differs from its digest, a file is missing or too short. After this and
            any other failure all targets are NaN (all bits set, where the type has none).
    """
    with spoiling_on_failure(target.local for target in targets.values()):
        requests = requests_for(source, targets)
        return read_all(plan_reads(source, requests, verify=verify), concurrency=concurrency)


def fill_requests(source: Source, requests: Sequence[Request], *, verify: bool, concurrency: int) -> int:
    """As `fill`, where a tensor may have several targets."""
    with spoiling_on_failure(request.target.local for request in requests):
        return read_all(plan_reads(source, requests, verify=verify), concurrency=concurrency)


@torch.no_grad()
def read_all(plan: ReadPlan, *, concurrency: int) -> int:
    """Make all reads of a plan; see `fill`, but for what becomes of the targets after a failure."""
    arrivals = _Arrivals(plan)
    with plan.reading():
        plan.source.storage.read_ranges(arrivals.ranges(), arrivals.consume, concurrency=concurrency)
    return plan.num_bytes


class _Arrivals:
    """What is done with each read, on the thread that made it."""

    def __init__(self, plan: ReadPlan) -> None:
        self._plan = plan
        self._memory: dict[int, Sequence[memoryview]] = {}
        self._pinned = _PinnedBuffers() if plan.is_for_gpu else None

    def ranges(self) -> list[ByteRange]:
        """The reads, with the memory of the targets where their bytes can lie as they are."""
        plan = self._plan
        fits = [landing.takes_bytes for landing in plan.landings]
        stretches = [stretches_of(read, plan.pieces, fits) for read in plan.reads]
        return [
            ByteRange(
                key=plan.source.file_key(read.rank, read.file),
                offset=read.start,
                num_bytes=read.num_bytes,
                into=self._offer(number, stretches[number]),
                into_per_thread=stretches[number] is None,  # a pinned buffer
            )
            for number, read in enumerate(plan.reads)
        ]

    def _offer(
        self, number: int, stretches: Sequence[Stretch] | None
    ) -> Callable[[], Sequence[memoryview]] | None:
        if stretches is None:
            pinned = self._pinned
            return None if pinned is None else lambda: [pinned.memory(self._plan.reads[number].num_bytes)]

        def make() -> Sequence[memoryview]:
            parts = [
                memoryview(bytearray(stretch.num_bytes))
                if stretch.piece is None
                else self._plan.landings[stretch.piece].memory(stretch.offset, stretch.num_bytes)
                for stretch in stretches
            ]
            self._memory[number] = parts
            return parts

        return make

    def consume(self, number: int, data: memoryview) -> None:
        read = self._plan.reads[number]
        landed = self._memory.get(number) if not data else None
        if not data and landed is None:
            assert self._pinned is not None, "nothing else was offered"
            data = self._pinned.memory(read.num_bytes)
        self._plan.check(read, landed or [data])
        if landed is not None:
            del self._memory[number]
        else:
            self._plan.take(read, data)


class _PinnedBuffers:
    """One buffer for each thread that reads, from which a GPU fetches faster than from other memory.

    While one thread waits for its copy, others read. torch keeps the memory for later loads.
    """

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def memory(self, num_bytes: int) -> memoryview:
        """The first bytes of this thread's buffer."""
        buffer: torch.Tensor | None = getattr(self._of_thread, "buffer", None)
        if buffer is None:
            buffer = torch.empty(MOST_READ_BYTES, dtype=torch.uint8, pin_memory=True)
            self._of_thread.buffer = buffer
        return buffer.numpy().data[:num_bytes]
