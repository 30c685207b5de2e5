"""One large object on its way up: parts sent concurrently, straight from the caller's memory.

Owns the parts in flight, their bound, and the way out: whole and visible, or aborted and never seen. Called
by `ObjectStorage.open_writer`; one thread uses it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

from dcp_ckpt.errors import CheckpointError, ConfigError, StorageError
from dcp_ckpt.storage.objects.client import ObjectClient

__all__ = ["PART_BYTES", "ObjectUpload", "part_bytes_for"]

log = logging.getLogger(__name__)

PART_BYTES = 8 << 20
"""Parts have at least this, and more where there would be too many; an object below two parts is one PUT."""

_MOST_PARTS = 9_000  # S3 takes 10,000
_PARTS_IN_FLIGHT = 16


def part_bytes_for(size_bytes: int) -> int:
    """The size of all parts but the last, a multiple of 1 MiB.

    Such that no small rest becomes a request of its own.
    """
    num_parts = min(max(size_bytes // PART_BYTES, 1), _MOST_PARTS)
    part_bytes = max(PART_BYTES, -(-size_bytes // (num_parts << 20)) << 20)
    while size_bytes > part_bytes and 0 < size_bytes % part_bytes < part_bytes // 16:
        part_bytes += 1 << 20
    return part_bytes


class ObjectUpload:
    """See `ObjectWriter`. Segments are sent as they are when they are at least a part long.

    Args:
        brief: the same store, given up on soon; for the abort.
        key: below the client's root.
        size_bytes: of the whole object.
    """

    def __init__(self, client: ObjectClient, brief: ObjectClient, key: str, *, size_bytes: int) -> None:
        self._client = client
        self._brief = brief
        self._key = key
        self._path = f"{client.url}/{key}"
        self._size_bytes = size_bytes
        self.segment_bytes = part_bytes_for(size_bytes)
        self._pending: list[memoryview] = []
        self._pending_bytes = 0
        self._end = 0
        self._upload: str | None = None
        self._parts: list[Future[str]] = []
        self._failure: BaseException | None = None
        self._sending: set[asyncio.Task[Any]] = set()
        self._slots = threading.BoundedSemaphore(_PARTS_IN_FLIGHT if client.traits.parts else 1)
        self._state = "open"

    def write_segment(self, offset: int, data: memoryview) -> None:
        self._require_open("write to")
        view = memoryview(data).cast("B")
        if offset < self._end or offset + len(view) > self._size_bytes:
            raise ConfigError(
                f"segment [{offset}, {offset + len(view)}) of {self._path} must start at {self._end} or "
                f"later and end at {self._size_bytes} or before"
            )
        if self._failure is not None:
            raise self._failure
        if offset > self._end:
            self._add(memoryview(bytes(offset - self._end)))
        self._add(view)
        self._end = offset + len(view)

    def finish(self) -> None:
        if self._state == "finished":
            return
        self._require_open("finish")
        if self._end != self._size_bytes:
            raise StorageError(
                f"cannot finish the object: {self._end} of {self._size_bytes} bytes were written",
                path=self._path,
            )
        if self._upload is None and not self._parts:
            self._run(self._client.put(self._key, self._take_pending(), only_if_absent=True))
        else:
            if self._pending:
                self._send(self._take_pending())
            tags = [part.result() for part in self._parts]
            assert self._upload is not None, "parts belong to an upload"
            self._run(
                self._client.complete_upload(
                    self._key, self._upload, tags, size_bytes=self._size_bytes, only_if_absent=True
                )
            )
        self._state = "finished"

    def abort(self) -> None:
        if self._state != "open":
            return
        self._state = "aborted"
        for part in self._parts:
            part.cancel()
        self._pending.clear()
        try:
            self._run(self._discard())
        except CheckpointError as error:
            log.warning("an unfinished upload stays behind; a later recover removes it: %s", error)
        # Their errors hold the caller's memory.
        self._parts.clear()
        self._failure = None

    def _add(self, view: memoryview) -> None:
        if view:
            self._pending.append(view)
            self._pending_bytes += len(view)
        if self._pending_bytes >= self.segment_bytes and self._size_bytes > self.segment_bytes:
            self._send(self._take_pending())

    def _take_pending(self) -> memoryview:
        views, self._pending, self._pending_bytes = self._pending, [], 0
        return views[0] if len(views) == 1 else memoryview(b"".join(views))

    def _send(self, data: memoryview) -> None:
        """Start one part; blocks while as many as allowed are in flight."""
        if self._upload is None:
            self._upload = self._run(self._client.start_upload(self._key))
        self._slots.acquire()
        number = len(self._parts) + 1
        part = self._submit(self._put_part(self._upload, number, data))
        self._parts.append(part)
        part.add_done_callback(self._part_done)

    def _part_done(self, part: Future[str]) -> None:
        if not part.cancelled() and (error := part.exception()) is not None:
            self._failure = self._failure or error
        self._slots.release()

    async def _put_part(self, upload: str, number: int, data: memoryview) -> str:
        task = asyncio.current_task()
        assert task is not None, "a coroutine is run by a task"
        self._sending.add(task)
        try:
            return await self._client.put_part(self._key, upload, number, data)
        finally:
            self._sending.discard(task)

    async def _discard(self) -> None:
        """Wait for the end of parts that were cancelled, then abort.

        An abort while a part still arrives may leave that part behind, unseen but paid for; and nothing may
        read the caller's memory any more.
        """
        await asyncio.gather(*self._sending, return_exceptions=True)
        if self._upload is not None:
            await self._brief.abort_upload(self._key, self._upload)

    def _submit(self, request: Coroutine[Any, Any, str]) -> Future[str]:
        return asyncio.run_coroutine_threadsafe(request, self._client.loop)

    def _run(self, request: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(request, self._client.loop).result()

    def _require_open(self, action: str) -> None:
        if self._state != "open":
            raise StorageError(f"cannot {action} the object: it was {self._state}", path=self._path)
