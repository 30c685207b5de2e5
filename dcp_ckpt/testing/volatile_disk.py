"""A model of a disk that keeps only what was synced: what a directory tree may look like after a power loss.

Owns the model. Must not know how it is fed nor what the files mean. Fed by `power_loss`; pure until
`write_out`.

The model is what POSIX promises and no more; no journal comes to the rescue:

- A file's bytes and size are durable up to its last `sync`. Of each 4 KiB page that was written since, the
  disk has the new content, the old one, zeros or garbage. The size is one of those that the file had since.
- A name in a directory is durable once *that* directory was synced; syncing the file is not enough. Of the
  changes since, any subset is on the disk, except that the changes of one name come in their order.
- A rename within one directory is one change. From one directory to another it is two, the new name first:
  both names may be on the disk, never none.
- A file or directory whose name is not on the disk is gone, whatever was synced in it.
- What was under way when a sync *failed* may be on the disk or not, and no later sync says anything about it:
  kernels report the error once and drop the bytes. A later change of the same name is durable when synced.

Modes, times, owners, locks and reservations are not modelled.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

__all__ = ["NUM_EXTREMES", "PAGE_BYTES", "ROOT", "VolatileDisk"]

PAGE_BYTES = 4096
ROOT = 0
"""The node of the tree's root, which is always there."""

Name = tuple[int, str]


@dataclass(frozen=True, kw_only=True)
class _Loss:
    """How a power loss treats what was not synced.

    Args:
        added, removed: the probability that a change that adds or removes a name is on the disk.
        sizes: which size an unsynced file has.
        pages: weights of an unsynced page being new, old, zero and garbage.
    """

    added: float
    removed: float
    sizes: Literal["new", "old", "any"]
    pages: tuple[int, int, int, int]


_EXTREMES = (
    _Loss(added=0, removed=0, sizes="old", pages=(0, 1, 0, 0)),  # nothing
    _Loss(added=1, removed=1, sizes="new", pages=(0, 0, 0, 1)),  # all names, garbage in the files
    _Loss(added=1, removed=1, sizes="new", pages=(0, 0, 1, 0)),  # all names and sizes, zeros in the files
    _Loss(added=1, removed=1, sizes="old", pages=(0, 1, 0, 0)),  # all names, empty files
    _Loss(added=1, removed=0, sizes="new", pages=(1, 0, 0, 0)),  # everything but removals
    _Loss(added=0, removed=1, sizes="new", pages=(1, 0, 0, 0)),  # removals only
)
NUM_EXTREMES = len(_EXTREMES)
"""Seeds below this are the extremes: nothing unsynced survives, all names without their data, and so on."""


@dataclass(kw_only=True)
class _File:
    """`sizes`: those it had since the last sync, that one first; `dirty`: the pages written since."""

    durable: bytes = b""
    now: bytearray = field(default_factory=bytearray)
    dirty: set[int] = field(default_factory=set)
    sizes: list[int] = field(default_factory=lambda: [0])
    failed: bool = False


@dataclass(kw_only=True)
class _Directory:
    durable: dict[str, int] = field(default_factory=dict)
    now: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True, eq=False)
class _Change:
    """Names that change together: what each stands for afterwards, None for nothing.

    Args:
        after: the change that must be on the disk before this one.
        failed: a sync of it failed.
    """

    names: dict[Name, int | None]
    after: _Change | None = None
    failed: bool = False

    @property
    def adds(self) -> bool:
        return any(node is not None for node in self.names.values())


class VolatileDisk:
    """The model. Files and directories are nodes, numbered by the caller; ROOT is there."""

    def __init__(self) -> None:
        self._files: dict[int, _File] = {}
        self._directories: dict[int, _Directory] = {ROOT: _Directory()}
        self._pending: list[_Change] = []

    def create(self, node: int, parent: int, name: str) -> None:
        """A new empty file."""
        self._files[node] = _File()
        self._change({(parent, name): node})

    def make_directory(self, node: int, parent: int, name: str) -> None:
        self._directories[node] = _Directory()
        self._change({(parent, name): node})

    def link(self, node: int, parent: int, name: str) -> None:
        """One more name for a file."""
        self._change({(parent, name): node})

    def remove(self, parent: int, name: str) -> None:
        """A name of a file, or that of an empty directory."""
        self._change({(parent, name): None})

    def rename(self, parent: int, name: str, new_parent: int, new_name: str) -> None:
        """Give a file or directory another name, replacing what has it."""
        node = self._directories[parent].now[name]
        if self._directories[new_parent].now.get(new_name) == node:
            return  # two names of one file: POSIX leaves both
        if parent == new_parent:
            self._change({(parent, new_name): node, (parent, name): None})
        else:
            added = self._change({(new_parent, new_name): node})
            self._change({(parent, name): None}, after=added)

    def write(self, node: int, offset: int, data: bytes) -> None:
        file = self._files[node]
        end = offset + len(data)
        self._resize(file, max(len(file.now), end))
        file.now[offset:end] = data
        file.dirty.update(range(offset // PAGE_BYTES, -(-end // PAGE_BYTES)))

    def truncate(self, node: int, size: int) -> None:
        self._resize(self._files[node], size)

    def sync(self, node: int) -> None:
        """Make a file's content, or the names in a directory, durable."""
        if node in self._files:
            file = self._files[node]
            if not file.failed:
                file.durable, file.dirty, file.sizes = bytes(file.now), set(), [len(file.now)]
            return
        self._settle({change for change in self._touching(node) if not change.failed})

    def fail_sync(self, node: int) -> None:
        """A sync failed: of what it was to make durable nothing is known for good."""
        if node in self._files:
            self._files[node].failed = True
        for change in self._touching(node):
            change.failed = True

    def sync_all(self) -> None:
        """Make everything durable."""
        for node in self._files:
            self.sync(node)
        self._settle(set(self._pending))

    def names(self, node: int) -> dict[str, int]:
        """The names in a directory as programs see them now, with their nodes."""
        return dict(self._directories[node].now)

    def is_directory(self, node: int) -> bool:
        return node in self._directories

    def content(self, node: int) -> bytes:
        """The bytes of a file as programs see them now."""
        return bytes(self._files[node].now)

    def write_out(self, target: Path, *, seed: int) -> None:
        """Write what the disk holds if the power fails now to the new directory `target`.

        Args:
            seed: equal seeds make equal trees. Those below NUM_EXTREMES are the extremes.
        """
        rng = random.Random(seed)
        loss = _EXTREMES[seed] if seed < NUM_EXTREMES else _drawn(rng)
        entries = self._surviving_names(loss, rng)
        written: dict[int, Path] = {}
        target.mkdir()
        for path, node in self._walk(entries, ROOT, target):
            if node in self._directories:
                path.mkdir()
            elif node in written:
                os.link(written[node], path)
            else:
                path.write_bytes(_surviving_bytes(self._files[node], loss, rng))
                written[node] = path

    def _change(self, names: dict[Name, int | None], *, after: _Change | None = None) -> _Change:
        change = _Change(names=names, after=after)
        self._pending.append(change)
        for (parent, name), node in names.items():
            _set(self._directories[parent].now, name, node)
        return change

    def _resize(self, file: _File, size: int) -> None:
        old = len(file.now)
        if size == old:
            return
        del file.now[size:]
        file.now.extend(bytes(size - len(file.now)))
        file.sizes.append(size)
        file.dirty.update(range(min(old, size) // PAGE_BYTES, -(-max(old, size) // PAGE_BYTES)))

    def _touching(self, directory: int) -> Iterator[_Change]:
        return (change for change in self._pending if any(parent == directory for parent, _ in change.names))

    def _settle(self, wanted: set[_Change]) -> None:
        """Make changes durable, and with them all that must have come before them."""
        names: set[Name] = set()
        for change in reversed(self._pending):
            if change in wanted or not names.isdisjoint(change.names):
                wanted.add(change)
                names.update(change.names)
                if change.after is not None:
                    wanted.add(change.after)
        for change in self._pending:
            if change in wanted:
                for (parent, name), node in change.names.items():
                    _set(self._directories[parent].durable, name, node)
        self._pending = [change for change in self._pending if change not in wanted]

    def _surviving_names(self, loss: _Loss, rng: random.Random) -> dict[int, dict[str, int]]:
        entries = {node: dict(directory.durable) for node, directory in self._directories.items()}
        lost: set[_Change] = set()
        stopped: set[Name] = set()
        for change in self._pending:
            is_kept = rng.random() < (loss.added if change.adds else loss.removed)
            if is_kept and stopped.isdisjoint(change.names) and change.after not in lost:
                for (parent, name), node in change.names.items():
                    _set(entries[parent], name, node)
            else:
                lost.add(change)
                stopped.update(change.names)
        return entries

    def _walk(self, entries: dict[int, dict[str, int]], node: int, path: Path) -> Iterator[tuple[Path, int]]:
        """All that can be reached from `node`, parents before what is in them."""
        for name, child in sorted(entries[node].items()):
            yield path / name, child
            if child in self._directories:
                yield from self._walk(entries, child, path / name)


def _set(entries: dict[str, int], name: str, node: int | None) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node


def _drawn(rng: random.Random) -> _Loss:
    return _Loss(
        added=rng.choice((0.2, 0.5, 0.8, 1.0)),
        removed=rng.choice((0.0, 0.2, 0.5, 0.8)),
        sizes="any",
        pages=(rng.randint(0, 3), rng.randint(0, 3), rng.randint(0, 3), rng.randint(1, 3)),
    )


def _surviving_bytes(file: _File, loss: _Loss, rng: random.Random) -> bytes:
    if not file.dirty and not file.failed:
        return file.durable
    if loss.sizes == "any":
        size = rng.choice([*file.sizes, rng.randint(min(file.sizes), max(file.sizes))])
    else:
        size = len(file.now) if loss.sizes == "new" else file.sizes[0]
    found = bytearray(size)
    old = min(size, len(file.durable))
    found[:old] = file.durable[:old]
    for page in sorted(file.dirty):
        start, end = page * PAGE_BYTES, min((page + 1) * PAGE_BYTES, size)
        if start >= end:
            continue
        fate = rng.choices(("new", "old", "zero", "garbage"), loss.pages)[0]
        if fate == "new":
            new = bytes(file.now[start:end])
            found[start:end] = new + bytes(end - start - len(new))
        elif fate == "zero":
            found[start:end] = bytes(end - start)
        elif fate == "garbage":
            found[start:end] = rng.randbytes(end - start)
    return bytes(found)
