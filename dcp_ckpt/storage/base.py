"""The storage protocol: what a checkpoint asks of the place it is kept in.

Owns the contract; local files, memory and object stores implement it. Storage knows keys and bytes,
never checkpoints. Keys are relative, `/`-separated and have no empty, `.` or `..` part. Every method may
be called from any thread. Every failure is a `StorageError` (dcp_ckpt.errors).
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

__all__ = [
    "Buffer",
    "ByteRange",
    "Lease",
    "ObjectInfo",
    "ObjectWriter",
    "Storage",
    "StorageCapabilities",
]

Buffer = bytes | bytearray | memoryview
"""What can be written."""


@dataclass(frozen=True, kw_only=True)
class StorageCapabilities:
    """What this storage can do, as data.

    Args:
        exclusive_create: `create_exclusive` holds among all processes and hosts.
        directories: empty directories exist, and renames are atomic (a file system).
        direct_io: `open_writer` bypasses the page cache when asked to.
        lease_ends_with_holder: a lease ends with its holder, however that ends; else it runs out some
            seconds later, and costs requests while it is held.
        shared: other processes see the same objects.
        links: an object may have several names (hard links).
    """

    exclusive_create: bool
    directories: bool
    direct_io: bool
    lease_ends_with_holder: bool
    shared: bool
    links: bool


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """One stored object: its key and size."""

    key: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class ByteRange:
    """`num_bytes` bytes from `offset` of the object `key`.

    Args:
        into: an offer: makes writable memory, together `num_bytes` long, that the bytes may be read into, one
            part after the other. A storage that takes it calls it once, on the thread that reads, and then
            hands no bytes to `consume`; any other ignores it.
        into_per_thread: the memory offered is the calling thread's until `consume` returns on it, and may
            have to be waited for. A storage with more reads under way than threads ignores such an offer.
    """

    key: str
    offset: int
    num_bytes: int
    into: Callable[[], Sequence[memoryview]] | None = None
    into_per_thread: bool = False


class ObjectWriter(Protocol):
    """Writes one new object in segments. Not visible as complete to anyone until `finish`."""

    @property
    def segment_bytes(self) -> int:
        """How many bytes a segment has best; the last one may have fewer."""
        ...

    def write_segment(self, offset: int, data: memoryview) -> None:
        """Write `data` at `offset`. Segments come in ascending order, without overlap.

        With direct I/O, offset, length and address should be multiples of 4096; others are
        written through the cache. The bytes may be sent later: they MUST NOT change before `finish` or
        `abort` returns.
        """
        ...

    def finish(self) -> None:
        """Return when the object is whole and durable (fsync, or a completed upload). Idempotent.

        Raises:
            StorageExists: the name was taken, where that is not found when the writer is opened.
        """
        ...

    def abort(self) -> None:
        """Remove what was written; nothing truncated stays visible. Idempotent, never raises StorageError."""
        ...


class Lease(Protocol):
    """A sign of life that others can see."""

    def close(self) -> None:
        """Give it up. Idempotent."""
        ...

    def let_run_out(self) -> None:
        """Stop holding it, silently: others may hold it too. As `close` where it ends by itself."""
        ...

    def __enter__(self) -> Lease: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class Storage(Protocol):
    """A flat space of keys under one root."""

    @property
    def url(self) -> str:
        """Where this is, for messages and for `open_storage` in another process."""
        ...

    @property
    def capabilities(self) -> StorageCapabilities: ...

    def read(self, key: str) -> bytes:
        """The whole object.

        Raises:
            StorageNotFound: there is none.
        """
        ...

    def read_ranges(
        self,
        ranges: Sequence[ByteRange],
        consume: Callable[[int, memoryview], None],
        *,
        concurrency: int,
    ) -> None:
        """Read many ranges, at most `concurrency` at a time.

        Args:
            ranges: in any order; sorted by key and offset is fastest.
            consume: called as `consume(index, data)` once per range, from several threads at once; `data` is
                valid during the call only, and empty where the bytes were read `into` what the range offers.

        Raises:
            StorageNotFound: an object is missing.
            StorageError: an object ends before a range does; the error names it.
            Exception: whatever `consume` raised first; the remaining ranges are not read.
        """
        ...

    def size(self, key: str) -> int:
        """Size in bytes.

        Raises:
            StorageNotFound: there is none.
        """
        ...

    def create_exclusive(self, key: str, data: Buffer) -> None:
        """Create the object atomically and durably, only if the name is free.

        After a return the object is durable. Nobody ever sees a part of it. Of several callers
        at the same moment exactly one succeeds.

        Raises:
            StorageExists: the name is taken, whoever took it; what it holds is durable by then.
            StorageNotFound: the directory does not exist (never made here, where directories exist).
            StorageTransient: no answer; the object may or may not exist. Call again to learn.
        """
        ...

    def require_exclusive_create(self) -> None:
        """Find out whether `create_exclusive` holds among processes. May create and delete an object, once.

        Raises:
            StorageUnsuitable: it does not, and nobody vouched for a single writer.
        """
        ...

    def put(self, key: str, data: Buffer) -> None:
        """Create or replace the object atomically and durably."""
        ...

    def open_writer(self, key: str, *, size_bytes: int, direct: bool) -> ObjectWriter:
        """Start a new large object.

        Args:
            size_bytes: its exact final size; too little space is found here where possible.
            direct: bypass the page cache if the storage can.

        Raises:
            StorageExists: the name is taken.
            StorageFull: there is no room for it.
        """
        ...

    def link(self, names: Sequence[tuple[str, str]]) -> None:
        """Give objects one more name each: `(key, new key)`. No bytes are written.

        An object lives until its last name is deleted. Objects and new names are durable on return; where one
        fails, no new name is left.

        Raises:
            StorageUnsuitable: this cannot be done here, or not with these objects: copy their bytes.
            StorageNotFound: there is no such object, or no directory for the new name.
            StorageExists: a new name is taken.
        """
        ...

    def list(self, prefix: str) -> list[ObjectInfo]:
        """All objects whose key starts with `prefix` (empty, or ending in `/`), sorted by key."""
        ...

    def list_names(self, prefix: str) -> builtins.list[str]:  # `list` is the method here
        """The first parts of the keys below `prefix`, sorted; directories end in `/`.

        Empty directories count where they exist. Some object stores show a name for a while after its last
        object was deleted.
        """
        ...

    def make_directory(self, key: str) -> None:
        """Make a directory durable where directories exist; elsewhere nothing. Idempotent."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects in the given order; missing ones are ignored. Durable on return."""
        ...

    def remove_directory(self, key: str) -> None:
        """Remove a directory if it is empty; elsewhere nothing. Idempotent."""
        ...

    def rename_directory(self, key: str, new_key: str) -> None:
        """Move a directory atomically and durably, making the new parent if needed.

        Raises:
            StorageNotFound: there is no such directory.
            StorageUnsuitable: `capabilities.directories` is false.
        """
        ...

    def abort_uploads(self, prefix: str, is_abandoned: Callable[[str], bool]) -> builtins.list[str]:
        """Discard unfinished large objects below `prefix` that no listing shows, where a store keeps such.

        Args:
            is_abandoned: told a key, says whether nobody writes it any more.

        Returns:
            The keys of those discarded.
        """
        ...

    def remove_own_root(self) -> None:
        """Remove the root, and those of its parents that this object made, as far as they are empty.

        Nothing where directories do not exist, or this object made none. Idempotent.
        """
        ...

    def until(self, deadline: float) -> Storage:
        """The same place, of which nothing is asked after `deadline` (monotonic seconds).

        For storages that repeat requests: what is under way then fails as `StorageTransient`, and so does
        whatever is asked later. A system call cannot be cut short: a file system gives itself. Shares
        everything with this object, which is the one to close.
        """
        ...

    def free_bytes(self) -> int | None:
        """How many bytes may still be written here, as the storage itself says; None where it does not say.

        A hint: others write, too, and a quota or a reservation may allow less. Changes nothing; quick, but
        not bounded in time where a file server does not answer.
        """
        ...

    def hold_lease(self, key: str) -> Lease:
        """Hold a lease together with any other holders."""
        ...

    def lease_is_held(self, key: str) -> bool:
        """Whether anybody holds it."""
        ...

    def close(self) -> None:
        """Release connections; leases that are held still are renewed no more. Idempotent."""
        ...
