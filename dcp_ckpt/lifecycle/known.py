"""What the owner of a run knows of its checkpoints: read once at the start, kept true by what it does itself.

Only the owner commits and removes, so nothing has to be listed again in a training that saves every minute.
Owns the one copy of that knowledge; the truth stays on storage. Lives on rank 0; used by its two threads.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace

from dcp_ckpt.format.manifest import Manifest
from dcp_ckpt.format.names import StepDir
from dcp_ckpt.lifecycle.catalogue import Catalogue, CheckpointEntry
from dcp_ckpt.lifecycle.marks import Mark, read_marks
from dcp_ckpt.storage.base import Storage

__all__ = ["KnownRun"]

_MARKS_SECONDS = 600.0
"""How old the marks that others made may get; a removal looks for pins by itself."""


class KnownRun:
    """The catalogue of a run as its owner sees it. Thread-safe.

    Args:
        catalogue: just read, after the epoch was claimed and recovered.
    """

    def __init__(self, storage: Storage, catalogue: Catalogue) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._run = catalogue.run
        self._rejected = catalogue.rejected
        self._entries = {entry.directory: entry for entry in catalogue.entries}
        self._marks_until = time.monotonic() + _MARKS_SECONDS

    def catalogue(self, *, deadline: float = math.inf) -> Catalogue:
        """What is committed now; marks may be read again for it, until `deadline` (monotonic seconds).

        Raises:
            StorageError: the marks could not be read.
        """
        with self._lock:
            if time.monotonic() >= self._marks_until:
                self._read_marks(self._storage.until(deadline))
            entries = sorted(self._entries.values(), key=lambda entry: entry.manifest.order)
            return Catalogue(run=self._run, entries=tuple(entries), rejected=self._rejected)

    def committed(self, directory: StepDir, manifest: Manifest) -> None:
        """A checkpoint was committed by this owner."""
        with self._lock:
            self._entries[directory] = CheckpointEntry(directory=directory, manifest=manifest)
            self._rejected = tuple(item for item in self._rejected if item.directory != directory)

    def removed(self, directory: StepDir) -> None:
        """A checkpoint was taken back by this owner."""
        with self._lock:
            self._entries.pop(directory, None)

    def marked(self, directory: StepDir, mark: Mark) -> None:
        """This process marked a checkpoint that it has committed."""
        with self._lock:
            entry = self._entries.get(directory)
            if entry is not None:
                self._entries[directory] = replace(entry, marks=(*entry.marks, mark))

    def marks_changed(self) -> None:
        """This process wrote marks: read them at the next look."""
        with self._lock:
            self._marks_until = 0.0

    def _read_marks(self, storage: Storage) -> None:
        marks = read_marks(storage)
        for directory, entry in self._entries.items():
            own = tuple(mark for mark in marks.get(directory, ()) if mark.attempt == entry.manifest.attempt)
            self._entries[directory] = replace(entry, marks=own)
        self._marks_until = time.monotonic() + _MARKS_SECONDS
