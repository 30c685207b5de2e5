"""Checkpoints on an object store: the storage protocol over an `ObjectClient`.

Owns the bridge from the callers' threads to the client's event loop, the merging and the concurrency of
reads, and the probe for stores that ignore conditions. Knows no store by name.
"""

from __future__ import annotations

import asyncio
import builtins
import copy
import secrets
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, Self, TypeVar
from weakref import WeakSet

from dcp_ckpt.errors import StorageError, StorageExists, StorageUnsuitable
from dcp_ckpt.storage.base import Buffer, ByteRange, ObjectInfo, StorageCapabilities
from dcp_ckpt.storage.keys import check_key, check_prefix, is_listed, temporary_name
from dcp_ckpt.storage.objects.client import DELETE_BATCH, Page
from dcp_ckpt.storage.objects.fetch import Fetch, memory_for, merge_ranges
from dcp_ckpt.storage.objects.lease import LeaseTimes, ObjectLease, is_fresh
from dcp_ckpt.storage.objects.retry import RetryingClient
from dcp_ckpt.storage.objects.upload import ObjectUpload
from dcp_ckpt.storage.ranges import check_ranges

__all__ = ["ObjectStorage"]

_Result = TypeVar("_Result")

_FETCHES_IN_FLIGHT = 16


class ObjectStorage:
    """See `Storage` for the methods.

    Args:
        client: closed with this object.
        brief: the same store, given up on soon: for what matters only now, or is only tidiness.
        url: what `open_storage` takes to open the same place.
        single_writer: the user vouches that no other process creates objects here, so the store is taken as
            it is; the clients look before they create.
        lease_times: of the leases that are held and looked at here.
    """

    def __init__(
        self,
        client: RetryingClient,
        brief: RetryingClient,
        *,
        url: str,
        single_writer: bool,
        lease_times: LeaseTimes,
    ) -> None:
        self._client = client
        self._brief = brief
        self._url = url
        self._single_writer = single_writer
        self._lease_times = lease_times
        self._probe_lock = threading.Lock()
        self._probed = False
        self._leases: WeakSet[ObjectLease] = WeakSet()

    @property
    def url(self) -> str:
        return self._url

    @property
    def capabilities(self) -> StorageCapabilities:
        return StorageCapabilities(
            exclusive_create=self._client.traits.conditional_put and not self._single_writer,
            directories=False,
            direct_io=False,
            lease_ends_with_holder=False,
            shared=self._client.traits.shared,
            links=False,
        )

    def read(self, key: str) -> bytes:
        return bytes(self._run(self._client.get(check_key(key))))

    def read_ranges(
        self,
        ranges: Sequence[ByteRange],
        consume: Callable[[int, memoryview], None],
        *,
        concurrency: int,
    ) -> None:
        check_ranges(ranges, concurrency=concurrency)
        if not ranges:
            return
        with ThreadPoolExecutor(concurrency, thread_name_prefix="dcp_ckpt-consume") as pool:
            tasks: builtins.list[asyncio.Task[None]] = []
            try:
                self._run(self._fetch_all(ranges, consume, pool, tasks))
            except BaseException:
                # An interrupt does not wait: nothing may be written into the callers' memory any more.
                self._run(_ended(tasks))
                raise

    def size(self, key: str) -> int:
        return self._run(self._client.size(check_key(key)))

    def create_exclusive(self, key: str, data: Buffer) -> None:
        self._run(self._client.put(check_key(key), data, only_if_absent=True))

    def require_exclusive_create(self) -> None:
        if self._single_writer:
            return
        if not self._client.traits.conditional_put:
            raise self._unsuitable("it is not known to create an object only if the name is free")
        with self._probe_lock:
            if not self._probed:
                self._probe()
                self._probed = True

    def put(self, key: str, data: Buffer) -> None:
        self._run(self._client.put(check_key(key), data, only_if_absent=False))

    def open_writer(self, key: str, *, size_bytes: int, direct: bool) -> ObjectUpload:
        return ObjectUpload(self._client, self._brief, check_key(key), size_bytes=size_bytes)

    def link(self, names: Sequence[tuple[str, str]]) -> None:
        for key in chain.from_iterable(names):
            check_key(key)
        raise StorageUnsuitable("an object has one name only here", path=self.url)

    def list(self, prefix: str) -> builtins.list[ObjectInfo]:
        check_prefix(prefix)
        pages = self._run(self._list_all(prefix, names_only=False))
        found = (info for page in pages for info in page.objects)
        listed = (info for info in found if all(map(is_listed, info.key[len(prefix) :].split("/"))))
        return sorted(listed, key=lambda info: info.key)

    def list_names(self, prefix: str) -> builtins.list[str]:
        check_prefix(prefix)
        pages = self._run(self._list_all(prefix, names_only=True))
        return sorted({name for page in pages for name in page.names if is_listed(name.removesuffix("/"))})

    def make_directory(self, key: str) -> None:
        check_key(key)

    def delete(self, keys: Iterable[str]) -> None:
        wanted = [check_key(key) for key in keys]
        for start in range(0, len(wanted), DELETE_BATCH):
            self._run(self._client.delete(wanted[start : start + DELETE_BATCH]))

    def remove_directory(self, key: str) -> None:
        check_key(key)

    def rename_directory(self, key: str, new_key: str) -> None:
        check_key(key)
        check_key(new_key)
        raise StorageUnsuitable("there are no directories to rename here", path=f"{self._url}/{key}")

    def abort_uploads(self, prefix: str, is_abandoned: Callable[[str], bool]) -> builtins.list[str]:
        check_prefix(prefix)
        return self._run(self._abort_uploads(prefix, is_abandoned))

    def remove_own_root(self) -> None:
        """There is none."""

    def until(self, deadline: float) -> Self:
        view = copy.copy(self)
        view._client = self._client.until(deadline)
        view._brief = self._brief.until(deadline)
        return view

    def free_bytes(self) -> int | None:
        """None: stores do not say."""
        return None

    def hold_lease(self, key: str) -> ObjectLease:
        lease = ObjectLease(self._brief, check_key(key), renew_seconds=self._lease_times.renew_seconds)
        self._leases.add(lease)
        return lease

    def lease_is_held(self, key: str) -> bool:
        expire_seconds = self._lease_times.expire_seconds
        return self._run(is_fresh(self._client, check_key(key), expire_seconds=expire_seconds))

    def close(self) -> None:
        for lease in list(self._leases):
            lease.let_run_out()  # one that is held still could not be renewed any more
        self._client.close()

    async def _fetch_all(
        self,
        ranges: Sequence[ByteRange],
        consume: Callable[[int, memoryview], None],
        pool: ThreadPoolExecutor,
        tasks: builtins.list[asyncio.Task[None]],
    ) -> None:
        """All requests, a bounded number at a time; a slot is held until its bytes were consumed."""
        slots = asyncio.Semaphore(_FETCHES_IN_FLIGHT)
        loop = asyncio.get_running_loop()

        async def fetch(item: Fetch) -> None:
            async with slots:
                memory = memory_for(item, ranges)
                if memory is not None:
                    end = item.offset + await self._client.get_into(item.key, memory, offset=item.offset)
                    parts = [memoryview(b"")] * len(item.members)
                else:
                    data = memoryview(
                        await self._client.get(item.key, offset=item.offset, num_bytes=item.num_bytes)
                    )
                    end = item.offset + len(data)
                    parts = [_cut(ranges[number], item, data) for number in item.members]
                for number, part in zip(item.members, parts, strict=True):
                    self._require_whole(ranges[number], end)
                    await loop.run_in_executor(pool, consume, number, part)

        for number, item in enumerate(ranges):
            if not item.num_bytes:
                await loop.run_in_executor(pool, consume, number, memoryview(bytearray()))
        tasks.extend(asyncio.ensure_future(fetch(item)) for item in merge_ranges(ranges))
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            await _ended(tasks)
            raise

    def _require_whole(self, item: ByteRange, end: int) -> None:
        if item.offset + item.num_bytes > end:
            raise StorageError(
                f"the object ends early: {item.num_bytes} bytes at offset {item.offset} were asked for, and "
                f"it ends at {end}",
                path=f"{self._url}/{item.key}",
            )

    def _probe(self) -> None:
        """Create one object twice: the second time must be refused."""
        # A temporary name: should we die before it is deleted, the next start sweeps it.
        key = temporary_name("probe", secrets.token_hex(8))
        try:
            self._run(self._client.put(key, b"first", only_if_absent=True))
        except StorageUnsuitable as error:
            raise self._unsuitable("it refuses `If-None-Match: *`") from error
        try:
            self._run(self._client.put(key, b"second", only_if_absent=True))
        except StorageExists:
            return
        finally:
            self._run(self._client.delete([key]))
        raise self._unsuitable("it accepts `If-None-Match: *` and ignores it")

    def _unsuitable(self, reason: str) -> StorageUnsuitable:
        scheme, _, rest = self._url.partition("://")
        return StorageUnsuitable(
            f"two writers could overwrite each other's checkpoints in this store: {reason}; use another "
            f"store, or vouch for a single writer with {scheme}+single-writer://{rest}",
            path=self._url,
        )

    async def _list_all(self, prefix: str, *, names_only: bool) -> builtins.list[Page]:
        pages = [await self._client.list_page(prefix, names_only=names_only)]
        while pages[-1].next_token:
            token = pages[-1].next_token
            pages.append(await self._client.list_page(prefix, names_only=names_only, token=token))
        return pages

    async def _abort_uploads(self, prefix: str, is_abandoned: Callable[[str], bool]) -> builtins.list[str]:
        aborted = []
        for key, upload in await self._client.list_uploads(prefix):
            if is_abandoned(key):
                await self._client.abort_upload(key, upload)
                aborted.append(key)
        return aborted

    def _run(self, request: Coroutine[Any, Any, _Result]) -> _Result:
        """Run on the client's loop, and wait; an interrupt cancels it."""
        future = asyncio.run_coroutine_threadsafe(request, self._client.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


async def _ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel them, and wait for their end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _cut(item: ByteRange, fetch: Fetch, data: memoryview) -> memoryview:
    start = item.offset - fetch.offset
    return data[start : start + item.num_bytes]
