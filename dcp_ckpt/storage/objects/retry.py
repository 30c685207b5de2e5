"""Asking again: throttling, lost connections and time-outs are repeated until a deadline.

Owns the policy (pure) and the wrapper that applies it, including the one hard case: a conditional create
whose first answer was lost and whose repetition finds the name taken. Knows no store.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

from dcp_ckpt.errors import StorageExists, StorageNotFound, StorageTransient
from dcp_ckpt.storage.base import Buffer
from dcp_ckpt.storage.objects.client import ObjectClient, Page, StoreTraits

__all__ = ["RetryPolicy", "RetryingClient"]

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When a request is repeated, and when not any more.

    Args:
        deadline_seconds: no attempt begins later than this after the first one began.
        first_contact_seconds: the same for a store that never answered: a wrong address must not take
            minutes to be told.
        attempt_seconds: how long one attempt may take; None: as long as the client lets it.
        first_delay_seconds, most_delay_seconds: delays double from the one to the other; each is drawn
            between half of it and all of it, so that ranks that were throttled together come back apart.
    """

    deadline_seconds: float = 120.0
    first_contact_seconds: float = 8.0
    attempt_seconds: float | None = None
    first_delay_seconds: float = 0.1
    most_delay_seconds: float = 5.0

    def delay(self, attempt: int, *, elapsed_seconds: float, reached: bool, draw: float) -> float | None:
        """Seconds to wait before the next attempt; None to give up.

        Args:
            attempt: how many have failed, from 1.
            elapsed_seconds: since the first one began.
            reached: the store has answered before.
            draw: uniform in [0, 1).
        """
        whole = min(self.first_delay_seconds * 2.0 ** min(attempt - 1, 16), self.most_delay_seconds)
        delay = whole * (0.5 + draw / 2)
        limit = self.deadline_seconds if reached else min(self.first_contact_seconds, self.deadline_seconds)
        return delay if elapsed_seconds + delay <= limit else None


class RetryingClient:
    """`inner`, with every request repeated by `policy`; see `ObjectClient` for the methods."""

    def __init__(self, inner: ObjectClient, policy: RetryPolicy) -> None:
        self._inner = inner
        self._policy = policy
        self._deadline = math.inf
        self._random = random.Random()

    def until(self, deadline: float) -> Self:
        """The same client, that asks for nothing after `deadline` (monotonic seconds)."""
        view = copy.copy(self)
        view._deadline = min(deadline, self._deadline)
        return view

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._inner.loop

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def traits(self) -> StoreTraits:
        return self._inner.traits

    @property
    def reached(self) -> bool:
        return self._inner.reached

    async def get(self, key: str, *, offset: int = 0, num_bytes: int | None = None) -> bytearray:
        return await self._repeat(lambda: self._inner.get(key, offset=offset, num_bytes=num_bytes))

    async def get_into(self, key: str, parts: Sequence[memoryview], *, offset: int) -> int:
        return await self._repeat(lambda: self._inner.get_into(key, parts, offset=offset))

    async def size(self, key: str) -> int:
        return await self._repeat(lambda: self._inner.size(key))

    async def age_seconds(self, key: str) -> float:
        return await self._repeat(lambda: self._inner.age_seconds(key))

    async def put(self, key: str, data: Buffer, *, only_if_absent: bool) -> None:
        lost = _LostAnswers()
        try:
            await self._repeat(lambda: self._inner.put(key, data, only_if_absent=only_if_absent), lost)
        except StorageExists:
            # Equal bytes after an answer was lost: it was us. Documents that must be told apart hold a
            # random id.
            if not lost.any or await self._content(key) != bytes(data):
                raise

    async def start_upload(self, key: str) -> str:
        return await self._repeat(lambda: self._inner.start_upload(key))

    async def put_part(self, key: str, upload: str, number: int, data: Buffer) -> str:
        return await self._repeat(lambda: self._inner.put_part(key, upload, number, data))

    async def complete_upload(
        self, key: str, upload: str, tags: Sequence[str], *, size_bytes: int, only_if_absent: bool
    ) -> None:
        lost = _LostAnswers()
        try:
            await self._repeat(
                lambda: self._inner.complete_upload(
                    key, upload, tags, size_bytes=size_bytes, only_if_absent=only_if_absent
                ),
                lost,
            )
        except (StorageExists, StorageNotFound):
            # The upload is gone because the request whose answer was lost had completed it. The size tells
            # enough: a name that goes up in parts belongs to one attempt of one rank.
            if not lost.any or await self._size_or_none(key) != size_bytes:
                raise

    async def abort_upload(self, key: str, upload: str) -> None:
        await self._repeat(lambda: self._inner.abort_upload(key, upload))

    async def list_uploads(self, prefix: str) -> list[tuple[str, str]]:
        return await self._repeat(lambda: self._inner.list_uploads(prefix))

    async def list_page(self, prefix: str, *, names_only: bool, token: str = "") -> Page:
        return await self._repeat(lambda: self._inner.list_page(prefix, names_only=names_only, token=token))

    async def delete(self, keys: Sequence[str]) -> None:
        await self._repeat(lambda: self._inner.delete(keys))

    def close(self) -> None:
        self._inner.close()

    async def _repeat(
        self, request: Callable[[], Awaitable[_Result]], lost: _LostAnswers | None = None
    ) -> _Result:
        started = time.monotonic()
        attempt = 0
        while True:
            try:
                return await self._attempt(request)
            except StorageTransient as error:
                attempt += 1
                if lost is not None:
                    lost.any = True
                elapsed = time.monotonic() - started
                delay = self._policy.delay(
                    attempt, elapsed_seconds=elapsed, reached=self.reached, draw=self._random.random()
                )
                if delay is None or time.monotonic() + delay >= self._deadline:
                    error.message += f"; gave up after {attempt} attempts in {elapsed:.0f} s"
                    raise
                log.debug("attempt %d failed, next in %.2f s: %s", attempt, delay, error)
            await asyncio.sleep(delay)

    async def _attempt(self, request: Callable[[], Awaitable[_Result]]) -> _Result:
        left = self._deadline - time.monotonic()
        if left <= 0.0:
            raise StorageTransient("the store was not asked: the time for this is over", path=self.url)
        limit = min(self._policy.attempt_seconds or math.inf, left)
        try:
            async with asyncio.timeout(None if limit == math.inf else limit):
                return await request()
        except TimeoutError as error:
            raise StorageTransient(f"no answer within {limit:.1f} s", path=self.url) from error

    async def _content(self, key: str) -> bytes | None:
        try:
            return bytes(await self.get(key))
        except StorageNotFound:
            return None

    async def _size_or_none(self, key: str) -> int | None:
        try:
            return await self.size(key)
        except StorageNotFound:
            return None


class _LostAnswers:
    """Whether some attempt of a request may have had an effect that was not told."""

    any = False
