"""Which older checkpoint a save builds on: what this rank stored in it, and on rank 0 which one it is.

docs/format.md, section 14. Owns the knowledge of bases on one rank, from the writer's answer to the save that
uses it, and says which of them are in use. Called by the saver on the main thread, by the pilot on its own,
and by the janitor.
"""

from __future__ import annotations

import logging
import threading

from dcp_ckpt.errors import CorruptCheckpoint, LoadError, StorageError
from dcp_ckpt.format.digests import digest
from dcp_ckpt.format.fragment import decode_fragment
from dcp_ckpt.format.manifest import FragmentRef, decode_listed_fragment, decode_manifest
from dcp_ckpt.format.names import MANIFEST, AttemptId, StepDir, fragment_name
from dcp_ckpt.save.reuse import Base
from dcp_ckpt.storage.base import Storage

__all__ = ["Bases"]

log = logging.getLogger(__name__)


class Bases:
    """The bases of one rank in one epoch. Thread-safe.

    Args:
        storage: the run; read once after each save, for what the writer has digested.
    """

    def __init__(self, storage: Storage, *, rank: int, world_size: int) -> None:
        self._storage = storage
        self._rank = rank
        self._world_size = world_size
        self._lock = threading.Lock()
        self._known: dict[AttemptId, Base] = {}
        self._newest: tuple[AttemptId, StepDir] | None = None
        self._in_use: dict[AttemptId, StepDir] = {}

    def begin(self, attempt: AttemptId) -> AttemptId | None:
        """Rank 0: the base of a save that begins. It is in use until `committed` or `ended`."""
        with self._lock:
            if self._newest is None:
                return None
            base, self._in_use[attempt] = self._newest
            return base

    def find(self, attempt: AttemptId | None) -> Base | None:
        """What this rank stored in the base that rank 0 has named; older ones are forgotten."""
        with self._lock:
            if attempt is None:
                return None
            self._known = {known: base for known, base in self._known.items() if not known < attempt}
            return self._known.get(attempt)

    def written(self, attempt: AttemptId, directory: StepDir, ref: FragmentRef) -> None:
        """This rank's part of a save is durable. Reads the fragment; without it nothing can be reused."""
        key = f"{directory}/{fragment_name(self._rank, attempt)}"
        try:
            data = self._storage.read(key)
            if digest(data) != ref.digest:
                raise CorruptCheckpoint("the fragment is not what was written", path=key)
            base = Base.of(directory, decode_fragment(data, path=key))
        except (StorageError, LoadError) as error:
            log.warning("the next save of rank %d writes everything: %s", self._rank, error)
            return
        with self._lock:
            self._known[attempt] = base

    def committed(self, attempt: AttemptId, directory: StepDir) -> None:
        """Rank 0: a save is the newest checkpoint, and the base of the next ones."""
        with self._lock:
            self._in_use.pop(attempt, None)
            self._newest = attempt, directory

    def ended(self, attempt: AttemptId) -> None:
        """Rank 0: a save has its outcome. One that was not committed is followed by one without a base.

        Should the base be what it failed by, it fails no other.
        """
        with self._lock:
            if self._in_use.pop(attempt, None) is not None:
                self._newest = None

    def forget(self) -> None:
        """This rank begins a load, which may find the base damaged: nothing is built on it any more."""
        with self._lock:
            self._known = {}
            self._newest = None

    def resumed_from(self, directory: StepDir) -> None:
        """This rank has loaded a checkpoint of the run: it is the base, if as many ranks saved it."""
        found = None
        try:
            found = self._read(directory)
        except (StorageError, LoadError) as error:
            log.warning("the next save of rank %d writes everything: %s", self._rank, error)
        with self._lock:
            self._known = {} if found is None else {found.attempt: found}
            self._newest = None if found is None else (found.attempt, directory)

    def is_in_use(self, directory: StepDir) -> bool:
        """Whether a save that is under way may still link to the files of this checkpoint."""
        with self._lock:
            return directory in self._in_use.values()

    @property
    def has_base(self) -> bool:
        """Rank 0: whether the next save may share files."""
        with self._lock:
            return self._newest is not None

    def _read(self, directory: StepDir) -> Base | None:
        key = f"{directory}/{MANIFEST}"
        manifest = decode_manifest(self._storage.read(key), path=key)
        if manifest.world_size != self._world_size:
            return None
        key = f"{directory}/{fragment_name(self._rank, manifest.attempt_id)}"
        data = self._storage.read(key)
        return Base.of(directory, decode_listed_fragment(data, manifest, self._rank, path=key))
