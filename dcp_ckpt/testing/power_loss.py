"""Losing power at any moment, after the fact: a recording of what a program did to its disk.

Owns the recording. The program runs once, for real, in this process; afterwards every moment of it can be
looked at as the disk would be found if the power had failed there, as often as wanted (`volatile_disk` says
what may be lost). Must not know checkpoints. Called by crash tests, also those of users:

    with recorded(directory) as recording:
        storage = LocalStorage(directory / "run", calls=watched_calls())
        ...
        recording.tell("committed")
    for moment in range(recording.num_moments + 1):
        recording.lose_power(somewhere / str(moment), moment=moment, seed=7)
        ...  # start again there; what recording.told(moment) says must still be so

Only calls through `os` in this process are seen, by whatever thread; what else changed the tree is found out
when the recording ends.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dcp_ckpt.testing.interposition import SystemCall, interposed
from dcp_ckpt.testing.volatile_disk import ROOT, VolatileDisk

__all__ = ["DiskRecording", "recorded"]

Event = Callable[[VolatileDisk], None]
Identity = tuple[int, int]

_SYNCS = ("fdatasync", "fsync")
_OF_CONTENT = (*_SYNCS, "ftruncate", "pwrite", "write")


@contextmanager
def recorded(
    root: str | os.PathLike[str],
    *,
    see: Callable[[SystemCall], None] | None = None,
    without_syncs_of: str | None = None,
) -> Iterator[DiskRecording]:
    """Record what this process does below `root` in the with-block.

    Args:
        root: an existing directory; what is in it now is durable.
        see: called before and after each system call. An `OSError` that it raises before is the answer of a
            call that was not made; raised after, that of one that was.
        without_syncs_of: a pattern as in `fnmatch`, where `*` stands for slashes too: syncs of such paths are
            answered and not done. A test that finds nothing then does not depend on them.

    Raises:
        RuntimeError: at the end, when the tree was changed by what cannot be seen here.
    """
    recording = DiskRecording(root)

    def see_all(call: SystemCall) -> None:
        if call.after and not (call.name in _SYNCS and without_syncs_of and call.matches(without_syncs_of)):
            recording.succeeded(call)
        if see is not None:
            try:
                see(call)
            except OSError:
                if not call.after:
                    recording.failed(call)
                raise

    with interposed(see_all):
        yield recording
    recording.require_complete()


class DiskRecording:
    """The changes of one directory tree in their order, and what was told in between. Thread-safe.

    Moment n is that after n changes; syncs count as changes.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root)
        self._lock = threading.Lock()
        self._nodes: dict[Identity, int] = {_identity(os.stat(root)): ROOT}
        self._num_nodes = 1
        self._disk = VolatileDisk()
        self._before: list[Event] = []
        self._events = self._before
        self._told: list[tuple[int, Any]] = []
        self._look(self._root, ROOT)
        self._disk.sync_all()
        self._events = []

    @property
    def num_moments(self) -> int:
        """The number of the last moment; the first is 0."""
        return len(self._events)

    def tell(self, fact: Any) -> None:
        """Note that the program has told somebody something: it must hold from here on."""
        with self._lock:
            self._told.append((len(self._events), fact))

    def told(self, moment: int) -> list[Any]:
        """What was told up to a moment."""
        return [fact for when, fact in self._told if when <= moment]

    def lose_power(self, target: Path, *, moment: int, seed: int) -> None:
        """Write the tree as it is found after a power loss at `moment` to the new directory `target`.

        Args:
            seed: what is lost; see `VolatileDisk.write_out`.
        """
        disk = VolatileDisk()
        for event in self._before:
            event(disk)
        disk.sync_all()
        for event in self._events[:moment]:
            event(disk)
        disk.write_out(target, seed=seed)

    def succeeded(self, call: SystemCall) -> None:
        """Record a call that was made."""
        with self._lock:
            if call.name in _OF_CONTENT:
                self._note_content(call)
            else:
                self._note_names(call)

    def failed(self, call: SystemCall) -> None:
        """Record that a sync failed; other calls that fail change nothing."""
        if call.name in _SYNCS:
            with self._lock:
                node = self._nodes.get(_identity(os.fstat(call.arguments[0])))
                if node is not None:
                    self._apply(lambda disk: disk.fail_sync(node))

    def require_complete(self) -> None:
        """Make sure that nothing changed the tree unseen.

        Raises:
            RuntimeError: something did.
        """
        self._compare(self._root, ROOT)

    def _note_content(self, call: SystemCall) -> None:
        descriptor = call.arguments[0]
        node = self._nodes.get(_identity(os.fstat(descriptor)))
        if node is None:
            return
        if call.name in _SYNCS:
            self._apply(lambda disk: disk.sync(node))
        elif call.name == "ftruncate":
            self._apply(lambda disk: disk.truncate(node, call.arguments[1]))
        else:
            # Copied: the caller may change its memory.
            data = bytes(memoryview(call.arguments[1]).cast("B")[: call.result])
            position = os.lseek(descriptor, 0, os.SEEK_CUR) - len(data) if call.name == "write" else 0
            offset = position if call.name == "write" else call.arguments[2]
            self._apply(lambda disk: disk.write(node, offset, data))

    def _note_names(self, call: SystemCall) -> None:
        path = call.paths[-1]
        parent, name = self._parent(path), os.path.basename(path)
        if parent is None:
            return
        if call.name == "open":
            self._note_open(call, parent, name)
        elif call.name == "mkdir":
            node = self._new_node(os.lstat(path))
            self._apply(lambda disk: disk.make_directory(node, parent, name))
        elif call.name == "link":
            linked = self._nodes[_identity(os.lstat(path))]
            self._apply(lambda disk: disk.link(linked, parent, name))
        elif call.name in ("rename", "replace"):
            self._note_rename(call.paths[0], parent, name)
        else:
            self._forget(self._disk.names(parent)[name])
            self._apply(lambda disk: disk.remove(parent, name))

    def _note_open(self, call: SystemCall, parent: int, name: str) -> None:
        standing = self._disk.names(parent).get(name)
        if standing is None:
            node = self._new_node(os.fstat(call.result))
            self._apply(lambda disk: disk.create(node, parent, name))
        elif call.arguments[1] & os.O_TRUNC:
            self._apply(lambda disk: disk.truncate(standing, 0))

    def _note_rename(self, old: str, new_parent: int, new_name: str) -> None:
        parent, name = self._parent(old), os.path.basename(old)
        if parent is None:
            raise RuntimeError(f"{old} was moved in from outside of what is recorded")
        names = self._disk.names(new_parent)
        if new_name in names and names[new_name] != self._disk.names(parent)[name]:
            self._forget(names[new_name])
        self._apply(lambda disk: disk.rename(parent, name, new_parent, new_name))

    def _parent(self, path: str) -> int | None:
        return self._nodes.get(_identity(os.stat(os.path.dirname(path))))

    def _new_node(self, status: os.stat_result) -> int:
        node = self._nodes[_identity(status)] = self._num_nodes
        self._num_nodes += 1
        return node

    def _forget(self, node: int) -> None:
        """The number of a file without a name may be given to another one, also outside of the tree."""
        links = self._count_names(ROOT, node)
        if links <= 1:
            self._nodes = {identity: known for identity, known in self._nodes.items() if known != node}

    def _count_names(self, directory: int, node: int) -> int:
        children = self._disk.names(directory).values()
        below = (self._count_names(child, node) for child in children if self._disk.is_directory(child))
        return sum(child == node for child in children) + sum(below)

    def _apply(self, event: Event) -> None:
        self._events.append(event)
        event(self._disk)

    def _look(self, path: Path, directory: int) -> None:
        """Take in what is there already."""
        for child in sorted(path.iterdir()):
            known = self._nodes.get(_identity(child.lstat()))
            node = known if known is not None else self._new_node(child.lstat())
            self._take_in(child, node, directory, is_known=known is not None)

    def _take_in(self, path: Path, node: int, parent: int, *, is_known: bool) -> None:
        name = path.name
        if path.is_dir():
            self._apply(lambda disk: disk.make_directory(node, parent, name))
            self._look(path, node)
        elif is_known:
            self._apply(lambda disk: disk.link(node, parent, name))
        else:
            data = path.read_bytes()
            self._apply(lambda disk: disk.create(node, parent, name))
            self._apply(lambda disk: disk.write(node, 0, data))

    def _compare(self, path: Path, directory: int) -> None:
        names = self._disk.names(directory)
        if sorted(names) != sorted(os.listdir(path)):
            raise RuntimeError(f"names in {path} were changed unseen")
        for name, node in names.items():
            if self._disk.is_directory(node):
                self._compare(path / name, node)
            elif (path / name).read_bytes() != self._disk.content(node):
                raise RuntimeError(f"{path / name} was written unseen")


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino
