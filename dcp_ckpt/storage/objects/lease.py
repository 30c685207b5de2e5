"""A lease on an object store: a small object that its holder rewrites, and is old when nobody does.

Owns the thread that renews. A lease only delays a start; safety never rests on it (docs/format.md,
section 9).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

from dcp_ckpt.errors import StorageError, StorageNotFound
from dcp_ckpt.storage.objects.client import ObjectClient

__all__ = ["LEASE_SECONDS", "RENEW_SECONDS", "ObjectLease", "is_fresh"]

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

RENEW_SECONDS = 4.0
LEASE_SECONDS = 15.0
"""A lease object older than this is nobody's: three renewals may be late."""


class ObjectLease:
    """Held until closed; renewed by a thread of its own."""

    def __init__(self, client: ObjectClient, key: str) -> None:
        self._client = client
        self._key = key
        self._content = secrets.token_hex(16).encode()
        self._stop = threading.Event()
        self._run(client.put(key, self._content, only_if_absent=False))
        self._thread = threading.Thread(target=self._renew, name="dcp_ckpt-lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give it up. Idempotent."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        try:
            # Somebody else may hold it too, and has written it since.
            if self._run(self._client.get(self._key)) == self._content:
                self._run(self._client.delete([self._key]))
        except StorageNotFound:
            pass
        except StorageError as error:
            log.warning("a lease could not be given up, and runs out by itself: %s", error)

    def __enter__(self) -> ObjectLease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            try:
                self._run(self._client.put(self._key, self._content, only_if_absent=False))
            except StorageError as error:
                log.warning("a lease was not renewed: %s", error)

    def _run(self, request: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(request, self._client.loop).result()


async def is_fresh(client: ObjectClient, key: str) -> bool:
    """Whether somebody wrote the lease object within `LEASE_SECONDS`."""
    try:
        return await client.age_seconds(key) < LEASE_SECONDS
    except StorageNotFound:
        return False
