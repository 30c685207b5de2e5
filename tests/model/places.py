"""Storages of a model: in memory, copyable, comparable, every creation cut into its atomic parts.

`FilePlace` behaves as `LocalStorage` does on a POSIX file system, `ObjectPlace` as an object store; both pass
the storage suite. Must not know checkpoints.
"""

from __future__ import annotations

import itertools
import secrets
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Self

from dcp_ckpt.closing import Closing
from dcp_ckpt.errors import StorageError, StorageExists, StorageNotFound, StorageTransient
from dcp_ckpt.storage.base import StorageCapabilities
from dcp_ckpt.storage.keys import check_key, check_prefix, is_listed, temporary_name
from dcp_ckpt.storage.memory import MemoryObjectWriter, MemoryStorage

__all__ = ["FilePlace", "ObjectPlace", "Place", "PlaceLease"]

Buffer = bytes | bytearray | memoryview


class PlaceLease(Closing):
    """One holder's lease in a place; `beat` is its sign of life where a lease runs out by itself."""

    def __init__(self, place: Place, key: str, holder: int) -> None:
        self._place = place
        self._key = key
        self._holder = holder

    def beat(self) -> None:
        self._place.beat(self._key, self._holder)

    def expire(self) -> None:
        """Nobody has heard of the holder for long."""
        self._place.expire(self._key, self._holder)

    def let_run_out(self) -> None:
        self._place.leave(self._key, self._holder)

    def close(self) -> None:
        self._place.release(self._key, self._holder)


class Place(MemoryStorage):
    """What both have."""

    def __init__(self, name: str = "place") -> None:
        super().__init__(name)
        self._held: dict[str, set[int]] = {}
        self._next_holder = itertools.count()

    @property
    def objects(self) -> dict[str, bytes]:
        """All objects, for looking only."""
        return self._objects

    def copy(self) -> Self:
        """A place of the same content, whose leases all ended."""
        other = type(self)(self._name)
        other._objects = dict(self._objects)
        return other

    def fingerprint(self) -> Hashable:
        """Equal for equal states."""
        held = frozenset((key, len(holders)) for key, holders in self._held.items() if holders)
        return hash(frozenset(self._objects.items())), held

    def empty_directories(self) -> list[str]:
        """Directories in which there is nothing at all."""
        return []

    @abstractmethod
    def creating(self, key: str, data: Buffer) -> Iterator[bool]:
        """`create_exclusive` in its atomic parts; each says when it is done whether it was the last."""

    def create_exclusive(self, key: str, data: Buffer) -> None:
        for _ in self.creating(key, data):
            pass

    def hold_lease(self, key: str) -> PlaceLease:  # type: ignore[override]  # not a MemoryLease
        check_key(key)
        holder = next(self._next_holder)
        self._held.setdefault(key, set())
        self.beat(key, holder)
        return PlaceLease(self, key, holder)

    def lease_is_held(self, key: str) -> bool:
        check_key(key)
        return bool(self._held.get(key))

    def beat(self, key: str, holder: int) -> None:
        self._held[key].add(holder)
        self._objects.setdefault(key, b"")

    def expire(self, key: str, holder: int) -> None:
        """Nothing: the kernel knows who lives."""

    def leave(self, key: str, holder: int) -> None:
        self.release(key, holder)

    def release(self, key: str, holder: int) -> None:
        self._held[key].discard(holder)


class ObjectPlace(Place):
    """An object store: no directories; leases run out; an upload appears when it is finished."""

    @property
    def capabilities(self) -> StorageCapabilities:
        return StorageCapabilities(
            exclusive_create=True,
            directories=False,
            direct_io=False,
            lease_ends_with_holder=False,
            shared=True,
            links=False,
        )

    def creating(self, key: str, data: Buffer) -> Iterator[bool]:
        with self._lock:
            self._check_free(key)
            self._objects[key] = bytes(data)
        yield True

    def open_writer(self, key: str, *, size_bytes: int, direct: bool) -> MemoryObjectWriter:
        check_key(key)
        if key in self._objects:
            raise StorageExists("the name is taken", path=self._where(key))
        self._unfinished.add(key)
        return MemoryObjectWriter(self._settle, path=self._where(key), key=key, size_bytes=size_bytes)

    def abort_uploads(self, prefix: str, is_abandoned: Callable[[str], bool]) -> list[str]:
        check_prefix(prefix)
        aborted = sorted(key for key in self._unfinished if key.startswith(prefix) and is_abandoned(key))
        self._unfinished.difference_update(aborted)
        return aborted

    def expire(self, key: str, holder: int) -> None:
        self._held[key].discard(holder)

    def leave(self, key: str, holder: int) -> None:
        """The object stays and grows old."""

    def release(self, key: str, holder: int) -> None:
        self._held[key].discard(holder)
        if not self._held[key]:
            self._objects.pop(key, None)

    def lease_is_held(self, key: str) -> bool:
        return super().lease_is_held(key) and key in self._objects

    def fingerprint(self) -> Hashable:
        return super().fingerprint(), frozenset(self._unfinished)

    def _settle(self, key: str, data: bytes | None) -> None:
        if data is not None and key not in self._unfinished:
            raise StorageError("the upload was discarded", path=self._where(key))
        if data is not None and key in self._objects:
            raise StorageExists("the name is taken", path=self._where(key))
        super()._settle(key, data)


class FilePlace(Place):
    """A file system: directories, atomic renames, locks of processes, files that are seen as they grow."""

    def __init__(self, name: str = "place") -> None:
        super().__init__(name)
        self._directories: set[str] = set()
        self._open: dict[int, str | None] = {}

    @property
    def capabilities(self) -> StorageCapabilities:
        return StorageCapabilities(
            exclusive_create=True,
            directories=True,
            direct_io=False,
            lease_ends_with_holder=True,
            shared=True,
            links=True,
        )

    def empty_directories(self) -> list[str]:
        return sorted(name for name in self._directories if name and not self._is_used(name))

    def copy(self) -> Self:
        other = super().copy()
        other._directories = set(self._directories)
        return other

    def fingerprint(self) -> Hashable:
        return super().fingerprint(), frozenset(self._directories)

    def creating(self, key: str, data: Buffer) -> Iterator[bool]:
        self._check_free(key)
        self._require_parent(key)
        parent, slash, name = key.rpartition("/")
        temporary = f"{parent}{slash}{temporary_name(name, secrets.token_hex(8))}"
        self._objects[temporary] = bytes(data)
        yield False
        with self._lock:
            if key in self._objects:
                self._objects.pop(temporary, None)
                raise StorageExists("the name is taken", path=self._where(key))
            if temporary not in self._objects:
                raise StorageNotFound("the directory is gone", path=self._where(key))
            self._objects[key] = self._objects[temporary]
        yield False
        self._objects.pop(temporary, None)
        if parent not in self._directories:
            raise StorageTransient("the directory could not be synced", path=self._where(key))
        yield True

    def read(self, key: str) -> bytes:
        if check_key(key) in self._directories:
            raise StorageError("this is a directory", path=self._where(key))
        return super().read(key)

    def put(self, key: str, data: Buffer) -> None:
        self._make(check_key(key).rpartition("/")[0])
        super().put(key, data)

    def open_writer(self, key: str, *, size_bytes: int, direct: bool) -> MemoryObjectWriter:
        self._check_free(key)
        self._make(key.rpartition("/")[0])
        handle = len(self._open)
        self._open[handle] = key
        # The space is reserved: other processes see a file of this size from here on.
        self._objects[key] = bytes(size_bytes)

        def settle(_: str, data: bytes | None) -> None:
            now = self._open.pop(handle, None)
            if data is None:
                self._objects.pop(key, None)
                return
            if now is not None:
                self._objects[now] = data
            self._require_parent(key)

        return MemoryObjectWriter(settle, path=self._where(key), key=key, size_bytes=size_bytes)

    def link(self, names: Sequence[tuple[str, str]]) -> None:
        for key, new_key in names:
            check_key(key)
            self._check_free(new_key)
            if key not in self._objects:
                raise StorageNotFound("there is no such file", path=self._where(key))
            self._require_parent(new_key)
        # Names of one file are equal bytes here: nobody writes into a file that has a name.
        self._objects.update({new_key: self._objects[key] for key, new_key in names})

    def list_names(self, prefix: str) -> list[str]:
        below = set(super().list_names(prefix))
        for directory in self._directories:
            if directory.startswith(prefix) and directory != prefix:
                name = directory[len(prefix) :].partition("/")[0]
                below |= {f"{name}/"} if name and is_listed(name) else set()
        return sorted(below)

    def make_directory(self, key: str) -> None:
        self._make(check_key(key))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            super().delete([key])
            self._open = {handle: None if now == key else now for handle, now in self._open.items()}

    def remove_directory(self, key: str) -> None:
        check_key(key)
        if not self._is_used(key):
            self._directories.discard(key)

    def rename_directory(self, key: str, new_key: str) -> None:
        check_key(new_key)
        if check_key(key) not in self._directories:
            raise StorageNotFound("there is no such directory", path=self._where(key))
        if self._is_used(new_key):
            raise StorageExists("the new name is taken", path=self._where(new_key))
        self._make(new_key.rpartition("/")[0])

        def moved(name: str) -> str:
            return new_key + name[len(key) :] if name == key or name.startswith(f"{key}/") else name

        self._objects = {moved(name): data for name, data in self._objects.items()}
        self._directories = {moved(name) for name in self._directories}
        self._open = {handle: now and moved(now) for handle, now in self._open.items()}

    def hold_lease(self, key: str) -> PlaceLease:  # type: ignore[override]  # not a MemoryLease
        self._make(check_key(key).rpartition("/")[0])
        return super().hold_lease(key)

    def release(self, key: str, holder: int) -> None:
        # The file stays: to unlink a lock file is a race.
        self._held[key].discard(holder)

    def _make(self, directory: str) -> None:
        parts = directory.split("/") if directory else []
        self._directories |= {"/".join(parts[:count]) for count in range(len(parts) + 1)}

    def _is_used(self, key: str) -> bool:
        names = itertools.chain(self._objects, self._directories)
        return any(name.startswith(f"{key}/") for name in names)

    def _require_parent(self, key: str) -> None:
        if key.rpartition("/")[0] not in self._directories:
            raise StorageNotFound("the directory is gone", path=self._where(key))
