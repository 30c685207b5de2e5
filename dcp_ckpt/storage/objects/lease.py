"""A lease on an object store: a small object that its holder rewrites, and is old when nobody does.

Owns the thread that renews. A lease only delays a start; safety never rests on it (docs/format.md,
section 9).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from dcp_ckpt.closing import Closing
from dcp_ckpt.errors import CheckpointError, StorageNotFound, StorageTransient
from dcp_ckpt.storage.objects.client import ObjectClient
from dcp_ckpt.storage.objects.retry import RetryingClient

__all__ = ["LeaseTimes", "ObjectLease", "is_fresh"]

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_GIVE_UP_SECONDS = 4.0
"""How long giving it up may take: whoever waits for its holder to end should not wait for a store."""


@dataclass(frozen=True, kw_only=True)
class LeaseTimes:
    """How long a lease lasts; the same for all who use a store.

    Args:
        renew_seconds: between two renewals.
        expire_seconds: a lease object older than this is nobody's. By default three renewals may be late.
    """

    renew_seconds: float = 4.0
    expire_seconds: float = 15.0


class ObjectLease(Closing):
    """Held until closed; renewed by a thread of its own.

    Should another holder close first and have written last, the object is gone until the next renewal.
    """

    def __init__(self, client: RetryingClient, key: str, *, renew_seconds: float) -> None:
        self._client = client
        self._renew_seconds = renew_seconds
        self._key = key
        self._content = secrets.token_hex(16).encode()
        self._stop = threading.Event()
        try:
            self._run(client.put(key, self._content, only_if_absent=False))
        except StorageTransient as error:
            # A lease only spares others a mistake: no start and no save fails for it.
            log.warning("a lease is not there yet, and is tried again: %s", error)
        self._thread = threading.Thread(target=self._renew, name="dcp_ckpt-lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give it up. Idempotent."""
        if self._stop.is_set():
            return
        self.let_run_out()
        client = self._client.until(time.monotonic() + _GIVE_UP_SECONDS)
        try:
            # Somebody else may hold it too, and has written it since.
            if self._run(client.get(self._key)) == self._content:
                self._run(client.delete([self._key]))
        except StorageNotFound:
            pass
        except CheckpointError as error:
            log.warning("a lease could not be given up, and runs out by itself: %s", error)

    def let_run_out(self) -> None:
        """Stop renewing; the object stays and grows old."""
        self._stop.set()
        self._thread.join()

    def _renew(self) -> None:
        while not self._stop.wait(self._renew_seconds):
            try:
                self._run(self._client.put(self._key, self._content, only_if_absent=False))
            except CheckpointError as error:
                log.warning("a lease was not renewed: %s", error)

    def _run(self, request: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(request, self._client.loop).result()


async def is_fresh(client: ObjectClient, key: str, *, expire_seconds: float) -> bool:
    """Whether somebody wrote the lease object within `expire_seconds`."""
    try:
        return await client.age_seconds(key) < expire_seconds
    except StorageNotFound:
        return False
