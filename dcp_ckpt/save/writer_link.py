"""This rank's line to its writer across the writer's death: hand over, wait, start a new one when it died.

One thread submits (the main one, or the fence's), the pilot's waits; they never do so at once, because a job
is only submitted when the arena is free, and the arena is free only when the last job was answered.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from dcp_ckpt.errors import SaveFailed
from dcp_ckpt.format.manifest import FragmentRef
from dcp_ckpt.save.watch import Watch
from dcp_ckpt.save.writer_process import WriterProcess, error_of
from dcp_ckpt.writer.messages import Probe, Reply, WriteJob
from dcp_ckpt.writer.progress import Progress

__all__ = ["WriterLink", "describe"]

log = logging.getLogger(__name__)

_LEASE_SECONDS = 30.0


class WriterLink:
    """Owns the writer process of one rank, and says when the arena is free.

    The process is started at once; should that fail, it is tried again, and told, at the first use.

    Args:
        storage_url: the run, as the user gave it; the writer gets ready for it while others do other things.
    """

    def __init__(self, *, rank: int, storage_url: str = "") -> None:
        self._rank = rank
        self._process: WriterProcess | None = None
        with contextlib.suppress(SaveFailed):
            self._process = WriterProcess(rank=rank, storage_url=storage_url)
        self._lease: tuple[str, str] | None = None
        self._attempt = ""
        self._storage_url = ""
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

    def try_out(self, storage_url: str, probe: Probe, *, timeout_seconds: float) -> None:
        """Let the writer write a small object and read it back. Blocks.

        Raises:
            CheckpointError: what it met; SaveFailed when no writer could be started.
        """
        with self._dropping():
            self._running().try_out(storage_url, probe, timeout_seconds=timeout_seconds)

    def end_probe(self, storage_url: str, key: str, *, failed: bool, timeout_seconds: float) -> None:
        """Let the writer delete a probe that stayed. Blocks.

        Args:
            failed: the start has failed, and leaves nothing.

        Raises:
            StorageNotFound: it has failed, and the probe was gone.
            CheckpointError: any other failure.
        """
        with self._dropping():
            self._running().end_probe(storage_url, key, failed=failed, timeout_seconds=timeout_seconds)

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
        self._attempt, self._storage_url = job.fragment.attempt, job.storage_url
        self._idle.clear()

    def wait(
        self, attempt: str, *, deadline: float, still: Callable[[Progress | None, float], None]
    ) -> FragmentRef:
        """Wait for the answer to the last job, which frees the arena however it ends.

        Args:
            deadline: monotonic seconds.
            still: told when nothing moves, with what the writer has done of this job (None: it has not begun
                it) and for how many seconds.

        Raises:
            CheckpointError: what the writer met; its death is a SaveFailed.
        """
        try:
            with self._dropping():
                reply = self._reply_to(attempt, deadline, still)
                if reply.attempt != attempt:
                    raise SaveFailed(
                        f"the writer answered {reply.attempt or 'nothing'} instead of {attempt}; "
                        f"{reply.error or 'it met no error'}",
                        rank=self._rank,
                    )
        finally:
            self._idle.set()
        if reply.error_kind:
            raise error_of(reply, rank=self._rank, phase="write")
        return FragmentRef(
            size_bytes=reply.fragment_bytes,
            digest=reply.digest,
            file_bytes=reply.file_bytes,
            shared_bytes=reply.shared_bytes,
        )

    def close(self, *, timeout_seconds: float) -> None:
        """Join the writer. Idempotent.

        Raises:
            SaveFailed: it did not end in time and was killed.
        """
        self._closed = True
        process, self._process = self._process, None
        if process is not None:
            process.close(timeout_seconds=timeout_seconds)

    def _reply_to(
        self, attempt: str, deadline: float, still: Callable[[Progress | None, float], None]
    ) -> Reply:
        process = self._running()
        started = now = time.monotonic()
        watch = Watch(None, now=now)
        while not process.has_reply(timeout_seconds=min(max(deadline - now, 0.0), watch.look_seconds)):
            now = time.monotonic()
            progress = process.progress if process.progress.attempt == attempt else None
            seconds = watch.look(progress, now=now)
            if now >= deadline:
                raise SaveFailed(
                    f"the writer (pid {process.pid}) did not finish within {now - started:.0f} s: "
                    f"{describe(progress)}, and nothing has moved for {watch.still_seconds(now):.0f} s",
                    rank=self._rank,
                    phase="write",
                    path=None if progress is None else f"{self._storage_url}/{progress.key}",
                )
            if seconds is not None:
                still(progress, seconds)
        return process.receive(timeout_seconds=1.0)

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


def describe(progress: Progress | None) -> str:
    """How far the writer is, for messages."""
    if progress is None:
        return "it has not begun"
    done = f"{progress.bytes_done} of {progress.bytes_total} bytes"
    if progress.bytes_done < progress.bytes_total:
        return f"{done} of {progress.key} are written"
    return f"all {done} of {progress.key} are written, and not yet durable"
