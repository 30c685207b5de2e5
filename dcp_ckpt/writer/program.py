"""The writer program: takes jobs from its trainer, and finishes them even when the trainer is gone.

One process per rank, started by `dcp_ckpt.save.writer_process`, in a session of its own, without torch. It
ends when its trainer closes the connection or dies, after the jobs that were handed over; it holds the
epoch's lease until then.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import socket
import sys
import traceback

from dcp_ckpt.closing import Closing
from dcp_ckpt.errors import CheckpointError
from dcp_ckpt.format.documents import decoder_of
from dcp_ckpt.format.names import EPOCHS, lease_name
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.base import Lease, Storage
from dcp_ckpt.writer.engine import check_shared_storage, write_attempt
from dcp_ckpt.writer.footprint import give_back, share_one_heap
from dcp_ckpt.writer.messages import (
    MAX_PACKET_BYTES,
    Reply,
    Request,
    WriteJob,
    decode_request,
    encode,
)
from dcp_ckpt.writer.orphan import OrphanLease
from dcp_ckpt.writer.probe import end_probe, try_out
from dcp_ckpt.writer.progress import Progress, ProgressPage, Tell

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Run until the trainer is gone.

    Args:
        arguments: the numbers of the inherited socket, the trainer's process id, and the inherited page on
            which the trainer looks for progress.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A terminal or scheduler that stops the job signals us too; the staged bytes are why we go on.
        signal.signal(number, signal.SIG_IGN)
    share_one_heap()
    connection = socket.socket(fileno=int(arguments[0]))
    with (
        connection,
        ProgressPage(int(arguments[2])) as page,
        Program(connection, page, trainer_pid=int(arguments[1])) as program,
    ):
        program.serve()
    return 0


class Program(Closing):
    """The state of one writer: its connection, the mapped arena, the storage and the lease."""

    def __init__(self, connection: socket.socket, page: ProgressPage, *, trainer_pid: int) -> None:
        self._connection = connection
        self._page = page
        self._trainer = _open_pidfd(trainer_pid)
        self._storage: Storage | None = None
        self._lease: Lease | None = None
        self._arena: mmap.mmap | None = None
        self._arena_inode = -1
        self._seen_epoch = ""

    def serve(self) -> None:
        """Answer requests in order until the trainer is gone and nothing is left to do."""
        while True:
            packet, descriptors = self._receive()
            if not packet:
                return
            request = decode_request(packet)
            if request.kind == "open":
                # What fails now fails again, and is told, at the first request that has an answer.
                with contextlib.suppress(Exception):
                    self._storage_at(request.storage_url)
                continue
            reply = self._answer(request, descriptors)
            # Where the trainer is gone, what was handed over is still finished.
            with contextlib.suppress(OSError):
                self._connection.send(encode(reply))
            give_back()

    def close(self) -> None:
        if self._lease is not None:
            self._lease.close()
        if self._storage is not None:
            self._storage.close()
        if self._trainer is not None:
            os.close(self._trainer)

    def _receive(self) -> tuple[bytes, list[int]]:
        """The next packet, or an empty one when the trainer is gone and all packets are read."""
        # poll, not select: an inherited descriptor keeps its number, which may be above select's limit.
        watched = select.poll()
        watched.register(self._connection, select.POLLIN)
        if self._trainer is not None:
            # Children forked by the trainer may hold its end of the socket open after its death.
            watched.register(self._trainer, select.POLLIN)
        ready = [descriptor for descriptor, _ in watched.poll()]
        if self._connection.fileno() not in ready:
            return b"", []
        try:
            packet, descriptors, _, _ = socket.recv_fds(self._connection, MAX_PACKET_BYTES, 2)
        except ConnectionResetError:
            # The trainer died without reading our last reply. The kernel says so once; what was sent before
            # comes after that.
            packet, descriptors, _, _ = socket.recv_fds(self._connection, MAX_PACKET_BYTES, 2)
        return packet, descriptors

    def _answer(self, request: Request, descriptors: list[int]) -> Reply:
        attempt = ""
        try:
            if request.kind == "lease":
                self._hold(request)
                return Reply()
            if request.kind == "probe":
                assert request.probe is not None, "it comes with its request"
                try_out(self._storage_at(request.storage_url), request.probe)
                return Reply()
            if request.kind == "end_probe":
                end_probe(self._storage_at(request.storage_url), request.key, failed=request.failed)
                return Reply()
            job = self._open_job(request, descriptors)
            attempt = job.fragment.attempt
            return self._write(job)
        except CheckpointError as error:
            return Reply(
                attempt=attempt,
                error_kind=type(error).__name__,
                error=error.message,
                path=error.path,
                errno=error.errno,
            )
        except Exception:
            return Reply(attempt=attempt, error_kind="SaveFailed", error=traceback.format_exc(limit=5))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _hold(self, request: Request) -> None:
        if self._lease is not None:
            self._lease.close()
            self._lease = None
        if request.key:
            self._lease = self._storage_at(request.storage_url).hold_lease(request.key)

    def _storage_at(self, url: str) -> Storage:
        """The run; opened once."""
        if self._storage is None:
            self._storage = open_storage(url)
        return self._storage

    def _open_job(self, request: Request, descriptors: list[int]) -> WriteJob:
        arena, job = descriptors
        self._map_arena(arena)
        return decoder_of(WriteJob).decode(os.pread(job, request.job_bytes, 0))

    def _map_arena(self, descriptor: int) -> None:
        """Map the arena once; mapping it anew at each save would fault in every page again."""
        status = os.fstat(descriptor)
        if self._arena is not None:
            if status.st_ino == self._arena_inode and len(self._arena) == status.st_size:
                return
            # Not closed: the error of a failed upload may still hold a part. It goes with its last view.
            self._arena = None
        if status.st_size:
            self._arena = mmap.mmap(descriptor, status.st_size, prot=mmap.PROT_READ)
        self._arena_inode = status.st_ino

    def _write(self, job: WriteJob) -> Reply:
        storage = self._storage_at(job.storage_url)
        if job.deadline is not None:
            storage = storage.until(job.deadline)
        # A file system may be unmounted between two saves; of a store, each look costs a request.
        if storage.capabilities.directories or self._seen_epoch != job.fragment.epoch_id:
            check_shared_storage(storage, job.fragment)
            self._seen_epoch = job.fragment.epoch_id
        mapped = self._arena if self._arena is not None else b""
        with self._watch_over(storage, job), memoryview(mapped) as arena:
            ref = write_attempt(storage, job, arena, self._tell(job))
        return Reply(
            attempt=job.fragment.attempt,
            fragment_bytes=ref.size_bytes,
            digest=ref.digest,
            file_bytes=ref.file_bytes,
            shared_bytes=ref.shared_bytes,
        )

    def _tell(self, job: WriteJob) -> Tell:
        def tell(key: str, *, bytes_done: int, bytes_total: int) -> None:
            attempt = job.fragment.attempt
            self._page.write(
                Progress(attempt=attempt, key=key, bytes_done=bytes_done, bytes_total=bytes_total)
            )

        return tell

    def _watch_over(self, storage: Storage, job: WriteJob) -> contextlib.AbstractContextManager[object]:
        """Make sure that the next start waits for this job, should the trainer die during it."""
        held = self._lease is not None or storage.capabilities.lease_ends_with_holder
        if held or self._trainer is None:
            return contextlib.nullcontext()
        return OrphanLease(storage, f"{EPOCHS}/{lease_name(job.fragment.epoch)}", trainer=self._trainer)


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
