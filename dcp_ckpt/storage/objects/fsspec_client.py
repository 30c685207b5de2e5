"""Any other fsspec file system, taken as an object store: `memory://` first.

Owns what can be said of a file system through fsspec's common interface only: whole reads, ranges, whole
writes. A large object is collected and written in one piece, so that nothing of it shows before. Which of
them can create exclusively is a table; what is not in it is for a single writer only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar

from dcp_ckpt.errors import (
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    StorageError,
    StorageExists,
    StorageNotFound,
    StorageTransient,
    StorageUnsuitable,
)
from dcp_ckpt.storage.base import Buffer, ObjectInfo
from dcp_ckpt.storage.objects.client import Page, StoreTraits
from dcp_ckpt.storage.objects.fetch import Filling

__all__ = ["FsspecClient"]

_Result = TypeVar("_Result")

_TRAITS = {
    # One dictionary of this process, and one event loop for all its clients: `put` below looks and stores
    # without a pause, so nothing comes between.
    "memory": StoreTraits(conditional_put=True, shared=False, parts=False),
}
_UNTRIED = StoreTraits(conditional_put=False, shared=True, parts=False)


class FsspecClient:
    """One fsspec file system below one path; see `ObjectClient` for the methods.

    Args:
        scheme: the protocol as fsspec knows it.
        path: below which all keys lie.

    Raises:
        ConfigError: fsspec knows no such protocol.
        MissingDependencyError: its package is not installed.
    """

    def __init__(self, scheme: str, path: str) -> None:
        import fsspec
        from fsspec.asyn import get_loop

        try:
            kind: Any = fsspec.get_filesystem_class(scheme)
        except ValueError as error:
            raise ConfigError(f"{scheme}:// names no storage: {error}") from error
        except ImportError as error:
            raise MissingDependencyError(f"{scheme}:// needs another package: {error}") from error
        self._fs = kind()
        self._scheme = scheme
        self._root = path.strip("/")
        self._loop: asyncio.AbstractEventLoop = get_loop()
        self._uploads: dict[str, list[bytes]] = {}

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    @property
    def url(self) -> str:
        return f"{self._scheme}://{self._root}"

    @property
    def traits(self) -> StoreTraits:
        return _TRAITS.get(self._scheme, _UNTRIED)

    @property
    def reached(self) -> bool:
        return True

    async def get(self, key: str, *, offset: int = 0, num_bytes: int | None = None) -> bytearray:
        end = None if num_bytes is None else offset + num_bytes
        return bytearray(await self._ask(key, lambda: self._fs.cat_file(self._path(key), offset, end)))

    async def get_into(self, key: str, parts: Sequence[memoryview], *, offset: int) -> int:
        data = await self.get(key, offset=offset, num_bytes=sum(map(len, parts)))
        Filling(parts).add(data)
        return len(data)

    async def size(self, key: str) -> int:
        info = await self._ask(key, lambda: self._fs.info(self._path(key)))
        if info["type"] != "file":
            raise StorageNotFound("there is no such object", path=self._where(key))
        return int(info["size"])

    async def age_seconds(self, key: str) -> float:
        modified: datetime = await self._ask(key, lambda: self._fs.modified(self._path(key)))
        if modified.tzinfo is None:
            modified = modified.replace(tzinfo=UTC)
        return time.time() - modified.timestamp()

    async def put(self, key: str, data: Buffer, *, only_if_absent: bool) -> None:
        if not only_if_absent:
            await self._ask(key, lambda: self._fs.pipe_file(self._path(key), bytes(data)))
        elif not self.traits.conditional_put:
            raise StorageUnsuitable("nothing is created exclusively there", path=self._where(key))
        else:
            with self._translating(key):
                if self._fs.isfile(self._path(key)):
                    raise StorageExists("the name is taken", path=self._where(key))
                self._fs.pipe_file(self._path(key), bytes(data))

    async def start_upload(self, key: str) -> str:
        upload = f"{key}#{time.monotonic_ns()}"
        self._uploads[upload] = []
        return upload

    async def put_part(self, key: str, upload: str, number: int, data: Buffer) -> str:
        # Copied here: the caller may change what it sent.
        self._uploads[upload].append(bytes(data))
        return str(number)

    async def complete_upload(
        self, key: str, upload: str, tags: Sequence[str], *, size_bytes: int, only_if_absent: bool
    ) -> None:
        await self.put(key, b"".join(self._uploads[upload]), only_if_absent=only_if_absent)
        del self._uploads[upload]

    async def abort_upload(self, key: str, upload: str) -> None:
        self._uploads.pop(upload, None)

    async def list_uploads(self, prefix: str) -> list[tuple[str, str]]:
        return []

    async def _list_objects(self, prefix: str) -> list[ObjectInfo]:
        root = self._path("")
        found = await self._ask(prefix, lambda: self._fs.find(self._path(prefix), detail=True))
        return [
            ObjectInfo(
                key=self._fs._strip_protocol(name)[len(root) :].lstrip("/"), size_bytes=int(info["size"])
            )
            for name, info in found.items()
        ]

    async def list_page(self, prefix: str, *, names_only: bool, token: str = "") -> Page:
        objects = await self._list_objects(prefix)
        if not names_only:
            return Page(objects=tuple(objects))
        names = set()
        for info in objects:
            name, slash, _ = info.key[len(prefix) :].partition("/")
            names.add(name + slash)
        return Page(names=tuple(names))

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            try:
                await self._ask(key, lambda key=key: self._fs.rm_file(self._path(key)))  # type: ignore[misc]
            except StorageNotFound:
                continue

    def close(self) -> None:
        """fsspec owns its file systems."""

    async def _ask(self, key: str, request: Callable[[], _Result]) -> _Result:
        """One request, in a thread, with its errors translated."""
        with self._translating(key):
            return await asyncio.to_thread(request)

    @contextmanager
    def _translating(self, key: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise StorageNotFound("there is no such object", path=self._where(key)) from error
        except FileExistsError as error:
            raise StorageExists("the name is taken", path=self._where(key)) from error
        except PermissionError as error:
            raise StorageError(
                f"access is denied: {error}", path=self._where(key), errno=error.errno
            ) from error
        except (ConnectionError, TimeoutError) as error:
            raise StorageTransient(f"no answer: {error!r}", path=self._where(key)) from error
        except OSError as error:
            raise StorageError(f"failed: {error}", path=self._where(key), errno=error.errno) from error

    def _path(self, key: str) -> str:
        path: str = self._fs._strip_protocol(f"{self._scheme}://{self._root}/{key}".rstrip("/"))
        return path

    def _where(self, key: str) -> str:
        return f"{self.url}/{key}"
