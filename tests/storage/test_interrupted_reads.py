"""A read from an object store that is interrupted: nothing is written into the caller's memory afterwards."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import partial

import pytest

from dcp_ckpt.storage.base import ByteRange
from dcp_ckpt.storage.objects.client import StoreTraits
from dcp_ckpt.storage.objects.fetch import Filling
from dcp_ckpt.storage.objects.lease import LeaseTimes
from dcp_ckpt.storage.objects.retry import RetryingClient, RetryPolicy
from dcp_ckpt.storage.objects.storage import ObjectStorage

OBJECT_BYTES = 4 << 20
PIECE = b"\x01" * (1 << 16)
NUM_OBJECTS = 8
TRIALS = 20


class EndlessAnswers:
    """A store whose answers arrive piece by piece; one of them is interrupted by Ctrl-C."""

    url = "fake://store"
    reached = True
    traits = StoreTraits(conditional_put=True, shared=True, parts=True)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    async def get_into(self, key: str, parts: Sequence[memoryview], *, offset: int) -> int:
        filling = Filling(parts)
        if key == f"k{NUM_OBJECTS // 2}":
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)
        for _ in range(OBJECT_BYTES // len(PIECE)):
            filling.add(PIECE)
            await asyncio.sleep(0)
        return OBJECT_BYTES

    def close(self) -> None:
        pass


def offered(part: bytearray) -> Sequence[memoryview]:
    return [memoryview(part)]


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_nothing_arrives_after_an_interrupt(loop: asyncio.AbstractEventLoop) -> None:
    client = RetryingClient(EndlessAnswers(loop), RetryPolicy())  # type: ignore[arg-type]  # what reads need
    storage = ObjectStorage(client, client, url="fake://store", single_writer=False, lease_times=LeaseTimes())
    for _ in range(TRIALS):
        memory = [bytearray(OBJECT_BYTES) for _ in range(NUM_OBJECTS)]
        ranges = [
            ByteRange(key=f"k{number}", offset=0, num_bytes=OBJECT_BYTES, into=partial(offered, part))
            for number, part in enumerate(memory)
        ]
        with pytest.raises(KeyboardInterrupt):
            storage.read_ranges(ranges, lambda number, data: None, concurrency=1)
        for part in memory:
            part[:] = bytes(OBJECT_BYTES)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.01), loop).result()
        assert not any(b"\x01" in part for part in memory)
