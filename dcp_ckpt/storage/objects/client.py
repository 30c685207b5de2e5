"""What one object store is asked: one request a method, asynchronous, with errors of our own tree.

Owns the contract between `ObjectStorage` and the stores. Keys here are relative to the client's root.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dcp_ckpt.storage.base import Buffer, ObjectInfo

__all__ = ["DELETE_BATCH", "ObjectClient", "Page", "StoreTraits"]


DELETE_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class StoreTraits:
    """What a kind of store can do, as far as its documentation and trials say.

    Args:
        conditional_put: it has a create that fails when the name is taken, atomically; whether an endpoint
            really honours it is found by a probe.
        shared: other processes see the same objects.
        parts: large objects go up in parts, several at once; else in one piece.
    """

    conditional_put: bool
    shared: bool
    parts: bool


@dataclass(frozen=True, kw_only=True)
class Page:
    """A part of a listing.

    Args:
        objects: empty when only names were asked for.
        next_token: for the next page; empty on the last one.
    """

    objects: tuple[ObjectInfo, ...] = ()
    names: tuple[str, ...] = ()
    next_token: str = ""


class ObjectClient(Protocol):
    """One store, rooted at a prefix. All coroutines run on `loop`.

    Every method may raise StorageError: StorageTransient when repeating may help, and then it is not known
    whether a change was made.
    """

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Runs in a thread of its own; may be shared."""
        ...

    @property
    def url(self) -> str: ...

    @property
    def traits(self) -> StoreTraits: ...

    @property
    def reached(self) -> bool:
        """Whether the store ever answered this client, if only with an error."""
        ...

    async def get(self, key: str, *, offset: int = 0, num_bytes: int | None = None) -> bytearray:
        """The object, or a range of it (fewer bytes where it ends).

        Raises:
            StorageNotFound: there is none.
        """
        ...

    async def get_into(self, key: str, parts: Sequence[memoryview], *, offset: int) -> int:
        """Read a range into memory, one part after the other; undefined memory after an error.

        Returns:
            How many bytes there were: fewer than the parts hold where the object ends.

        Raises:
            StorageNotFound: there is none.
        """
        ...

    async def size(self, key: str) -> int:
        """Size in bytes.

        Raises:
            StorageNotFound: there is none.
        """
        ...

    async def age_seconds(self, key: str) -> float:
        """Seconds since it was last written, both moments on the store's clock where it tells its time.

        Raises:
            StorageNotFound: there is none.
        """
        ...

    async def put(self, key: str, data: Buffer, *, only_if_absent: bool) -> None:
        """Create, or replace unless `only_if_absent`.

        Raises:
            StorageExists: the name is taken.
        """
        ...

    async def start_upload(self, key: str) -> str:
        """Begin an upload in parts; returns its id."""
        ...

    async def put_part(self, key: str, upload: str, number: int, data: Buffer) -> str:
        """Send part `number` (from 1); returns its tag."""
        ...

    async def complete_upload(
        self, key: str, upload: str, tags: Sequence[str], *, size_bytes: int, only_if_absent: bool
    ) -> None:
        """Make the object of all parts visible, whole.

        Args:
            size_bytes: of the whole object, to recognise it when an answer was lost.
            only_if_absent: only if the name is free.

        Raises:
            StorageExists: the name is taken.
            StorageNotFound: there is no such upload (any more).
        """
        ...

    async def abort_upload(self, key: str, upload: str) -> None:
        """Discard an upload; one that is gone is fine."""
        ...

    async def list_uploads(self, prefix: str) -> list[tuple[str, str]]:
        """Uploads that were neither completed nor aborted, as (key, id)."""
        ...

    async def list_page(self, prefix: str, *, names_only: bool, token: str = "") -> Page:
        """A page of what lies below `prefix`, in any order.

        Args:
            names_only: give the first parts of the keys below `prefix` instead, those with more behind them
                ending in `/`. A store may go on for a while to show that of a prefix whose last object was
                deleted.
            token: empty for the first page, then `next_token` of the page before.
        """
        ...

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete up to `DELETE_BATCH` objects; missing ones are fine."""
        ...

    def close(self) -> None:
        """Release connections. Idempotent; not called from `loop`."""
        ...
