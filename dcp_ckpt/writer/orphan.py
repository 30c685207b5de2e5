"""A lease taken when the trainer dies while its writer still works.

On an object store a held lease costs requests, so only rank 0's writer holds the epoch's lease all the time.
The others watch their trainer during a job: should it die, the next start must wait for them. Called by the
writer program.
"""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress
from types import TracebackType

from dcp_ckpt.errors import StorageError
from dcp_ckpt.storage.base import Lease, Storage

__all__ = ["OrphanLease"]


class OrphanLease:
    """Holds the lease from the death of the trainer to the end of the `with` block.

    Args:
        trainer: a pidfd of the trainer.
    """

    def __init__(self, storage: Storage, key: str, *, trainer: int) -> None:
        self._storage = storage
        self._key = key
        self._trainer = trainer
        self._lease: Lease | None = None
        self._end_reader, self._end_writer = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._watch, name="dcp_ckpt-orphan", daemon=True)

    def __enter__(self) -> OrphanLease:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.write(self._end_writer, b"x")
        self._thread.join()
        os.close(self._end_reader)
        os.close(self._end_writer)
        if self._lease is not None:
            # Other ranks' writers may hold it as well, and all write the same object: none may delete it.
            self._lease.let_run_out()

    def _watch(self) -> None:
        watched = select.poll()
        watched.register(self._end_reader, select.POLLIN)
        watched.register(self._trainer, select.POLLIN)
        ready = [descriptor for descriptor, _ in watched.poll()]
        if self._trainer in ready:
            # Without it the next start may seal what is being written: the save is lost, nothing worse.
            with suppress(StorageError):
                self._lease = self._storage.hold_lease(self._key)
