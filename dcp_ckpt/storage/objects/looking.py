"""Creating on a store without conditions, for somebody who vouches that nobody else writes there.

Owns the look before each creation, which two writers at once could both do; so it protects a single one from
its own past only. Called by `open_object_storage` for URLs that end their scheme in `+single-writer`.
"""

from __future__ import annotations

from collections.abc import Sequence

from dcp_ckpt.errors import StorageExists, StorageNotFound
from dcp_ckpt.storage.base import Buffer
from dcp_ckpt.storage.objects.retry import RetryingClient

__all__ = ["LookingClient"]


class LookingClient(RetryingClient):
    """A `RetryingClient` that looks whether a name is free, and asks no condition of the store."""

    async def put(self, key: str, data: Buffer, *, only_if_absent: bool) -> None:
        if only_if_absent:
            await self._require_absent(key)
        await super().put(key, data, only_if_absent=False)

    async def complete_upload(
        self, key: str, upload: str, tags: Sequence[str], *, size_bytes: int, only_if_absent: bool
    ) -> None:
        if only_if_absent:
            await self._require_absent(key)
        await super().complete_upload(key, upload, tags, size_bytes=size_bytes, only_if_absent=False)

    async def _require_absent(self, key: str) -> None:
        try:
            await self.size(key)
        except StorageNotFound:
            return
        raise StorageExists("the name is taken", path=f"{self.url}/{key}")
