"""This rank's line to its writer across the writer's death: hand over, wait, start a new one when it died.

One thread submits (the main one, or the fence's), the pilot's waits; they never do so at once, because a job
is only submitted when the arena is free, and the arena is free only when the last job was answered.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from dcp_ckpt import errors
from dcp_ckpt.errors import CheckpointError, SaveFailed
from dcp_ckpt.format.manifest import FragmentRef
from dcp_ckpt.save.writer_process import WriterProcess
from dcp_ckpt.writer.messages import Reply, WriteJob

__all__ = ["WriterLink"]

log = logging.getLogger(__name__)

_LEASE_SECONDS = 30.0


class WriterLink:
    """Owns the writer process of one rank, and says when the arena is free."""

    def __init__(self, *, rank: int) -> None:
        self._rank = rank
        self._process: WriterProcess | None = WriterProcess(rank=rank)
        self._lease: tuple[str, str] | None = None
        self._attempt = ""
        self._idle = threading.Event()
        self._idle.set()
        self._closed = False

    def is_writing(self, attempt: str) -> bool:
        """Whether the job of this attempt was submitted and not yet answered."""
        return self._attempt == attempt and not self._idle.is_set()

    def wait_idle(self, *, timeout_seconds: float) -> None:
        """Wait until the bytes of the last save are durable (or given up).

        Raises:
            SaveFailed: that took too long.
        """
        if not self._idle.wait(timeout_seconds):
            raise SaveFailed(
                f"the save before is still being written after {timeout_seconds:.0f} s",
                rank=self._rank,
                phase="stage",
            )

    def hold_lease(self, storage_url: str, key: str | None) -> None:
        """Let the writer hold this epoch's lease, now and whenever it is started anew; None gives it up.

        Blocks until it does.
        """
        self._lease = None if key is None else (storage_url, key)
        with self._dropping():
            self._running().hold_lease(storage_url, key, timeout_seconds=_LEASE_SECONDS)

    def submit(self, job: WriteJob, arena_descriptor: int) -> None:
        """Hand a job over. From then on it survives this process.

        Raises:
            SaveFailed: no writer could be started.
        """
        try:
            with self._dropping():
                self._running().submit(job, arena_descriptor)
        except SaveFailed as error:
            log.warning("starting a new writer: %s", error)
            with self._dropping():
                self._running().submit(job, arena_descriptor)
        self._attempt = job.fragment.attempt
        self._idle.clear()

    def wait(self, attempt: str, *, deadline: float) -> FragmentRef:
        """Wait for the answer to the last job, which frees the arena however it ends.

        Raises:
            CheckpointError: what the writer met; its death is a SaveFailed.
        """
        try:
            with self._dropping():
                reply = self._running().receive(timeout_seconds=max(deadline - time.monotonic(), 0.001))
                if reply.attempt != attempt:
                    raise SaveFailed(
                        f"the writer answered {reply.attempt or 'nothing'} instead of {attempt}; "
                        f"{reply.error or 'it met no error'}",
                        rank=self._rank,
                    )
        finally:
            self._idle.set()
        if reply.error_kind:
            raise _error_of(reply, rank=self._rank)
        return FragmentRef(size_bytes=reply.fragment_bytes, digest=reply.digest, file_bytes=reply.file_bytes)

    def close(self, *, timeout_seconds: float) -> None:
        """Join the writer. Idempotent.

        Raises:
            SaveFailed: it did not end in time and was killed.
        """
        self._closed = True
        process, self._process = self._process, None
        if process is not None:
            process.close(timeout_seconds=timeout_seconds)

    def _running(self) -> WriterProcess:
        if self._process is None:
            if self._closed:
                raise SaveFailed("the checkpointer is closed", rank=self._rank)
            self._process = WriterProcess(rank=self._rank)
            if self._lease is not None:
                with self._dropping():
                    self._process.hold_lease(*self._lease, timeout_seconds=_LEASE_SECONDS)
        return self._process

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        """End the writer when anything goes wrong with it.

        One that is dead, stuck or out of step must neither touch the arena, which the next save reuses, nor
        answer the next request with the reply to this one.
        """
        try:
            yield
        except BaseException:
            process, self._process = self._process, None
            if process is not None:
                process.kill()
            raise


def _error_of(reply: Reply, *, rank: int) -> CheckpointError:
    kind = getattr(errors, reply.error_kind) if reply.error_kind in errors.__all__ else SaveFailed
    error: CheckpointError = kind(reply.error, rank=rank, phase="write", path=reply.path, errno=reply.errno)
    return error
