"""The trainer's end of its writer: starts the process, hands jobs over, reads replies, and joins it.

One per rank and Checkpointer. The process has a session of its own, so what kills the trainer does not kill
it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from dcp_ckpt import errors
from dcp_ckpt.closing import Closing
from dcp_ckpt.errors import CheckpointError, SaveFailed
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.writer.messages import (
    MAX_PACKET_BYTES,
    Probe,
    Reply,
    Request,
    WriteJob,
    decode_reply,
    encode,
)
from dcp_ckpt.writer.progress import Progress, ProgressPage, make_page

__all__ = ["WriterProcess", "error_of"]

log = logging.getLogger(__name__)

_KILL_SECONDS = 3.0

_BOOT = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from dcp_ckpt.writer.program import main; sys.exit(main(sys.argv[1:]))"
)


class WriterProcess(Closing):
    """Owns one writer process.

    Args:
        storage_url: what it gets ready for at once, as for `open_storage`; empty: for the first request's.

    Raises:
        SaveFailed: it cannot be started.
    """

    def __init__(self, *, rank: int, storage_url: str = "") -> None:
        self._rank = rank
        self._closed = False
        page = make_page()
        self._page = ProgressPage(page)
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = str(Path(__file__).resolve().parents[2])
        # -P: the user's working directory must not shadow modules of the standard library.
        command = [sys.executable, "-P", "-c", _BOOT, root, str(theirs.fileno()), str(os.getpid()), str(page)]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno(), page],
                    start_new_session=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
        except OSError as error:
            self._connection.close()
            self._page.close()
            raise SaveFailed(
                f"the writer process cannot be started: {error}", rank=rank, errno=error.errno
            ) from error
        finally:
            os.close(page)
        if storage_url:
            try:
                self._send(Request(kind="open", storage_url=storage_url), [])
            except BaseException:
                self.kill()
                raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def progress(self) -> Progress:
        """How far it is; known however it is. Does not block."""
        return self._page.read()

    def try_out(self, storage_url: str, probe: Probe, *, timeout_seconds: float) -> None:
        """Let it write a small object there, and read it back. Blocks.

        Raises:
            CheckpointError: what it met.
            SaveFailed: it died, or did not answer in time.
        """
        self._ask(Request(kind="probe", storage_url=storage_url, probe=probe), timeout_seconds)

    def end_probe(self, storage_url: str, key: str, *, failed: bool, timeout_seconds: float) -> None:
        """Let it delete a probe that stayed. Blocks.

        Args:
            failed: the start has failed.

        Raises:
            StorageNotFound: it has failed, and the probe was gone.
            CheckpointError: as for `try_out`.
        """
        self._ask(Request(kind="end_probe", storage_url=storage_url, key=key, failed=failed), timeout_seconds)

    def hold_lease(self, storage_url: str, key: str | None, *, timeout_seconds: float) -> None:
        """Let the writer hold this lease for as long as it lives, or none. Blocks until it does.

        Raises:
            SaveFailed: it cannot, died, or did not answer in time.
        """
        self._send(Request(kind="lease", storage_url=storage_url, key=key or ""), [])
        reply = self.receive(timeout_seconds=timeout_seconds)
        if reply.error_kind:
            raise SaveFailed(
                f"the writer cannot hold the lease: {reply.error}", rank=self._rank, path=reply.path
            )

    def submit(self, job: WriteJob, arena_descriptor: int) -> None:
        """Hand a job over; from then on it survives this process. Does not block."""
        data = encode_json(job)
        descriptor = os.memfd_create("dcp_ckpt-job", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, data)
            self._send(Request(kind="write", job_bytes=len(data)), [arena_descriptor, descriptor])
        finally:
            os.close(descriptor)

    def has_reply(self, *, timeout_seconds: float) -> bool:
        """Wait until `receive` would not block, or so long."""
        watched = select.poll()
        watched.register(self._connection, select.POLLIN)
        return bool(watched.poll(timeout_seconds * 1000.0))

    def receive(self, *, timeout_seconds: float) -> Reply:
        """Wait for the next reply.

        Raises:
            SaveFailed: the writer died, or did not answer in time.
        """
        self._connection.settimeout(timeout_seconds)
        try:
            packet = self._connection.recv(MAX_PACKET_BYTES)
        except TimeoutError as error:
            raise SaveFailed(
                f"the writer (pid {self.pid}) did not finish within {timeout_seconds:.0f} s",
                rank=self._rank,
                phase="write",
            ) from error
        except OSError as error:
            raise self._death() from error
        if not packet:
            raise self._death()
        try:
            return decode_reply(packet)
        except msgspec.DecodeError as error:
            raise SaveFailed(f"the writer answered nonsense: {error}", rank=self._rank) from error

    def close(self, *, timeout_seconds: float = 30.0) -> None:
        """Let it finish what it has, and join it. Idempotent.

        Raises:
            SaveFailed: it did not end in time and was killed.
        """
        if self._closed:
            return
        self._closed = True
        self._hang_up()
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise SaveFailed(
                f"the writer (pid {self.pid}) did not end within {timeout_seconds:.0f} s and was killed",
                rank=self._rank,
                phase="close",
            ) from error

    def kill(self) -> None:
        """End it at once and reap it. Idempotent."""
        self._closed = True
        self._hang_up()
        self._process.kill()
        try:
            self._process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            log.error("the writer (pid %d) cannot be killed; it hangs in the kernel", self.pid)

    def _hang_up(self) -> None:
        # Forked children hold copies of this end; only a shutdown tells the writer, whoever holds them.
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._page.close()

    def _ask(self, request: Request, timeout_seconds: float) -> None:
        self._send(request, [])
        if not self.has_reply(timeout_seconds=timeout_seconds):
            raise SaveFailed(
                f"the writer (pid {self.pid}) did not try the storage out within {timeout_seconds:.0f} s; "
                "see that it is mounted, and that it answers",
                rank=self._rank,
                phase="open",
                path=request.storage_url,
            )
        reply = self.receive(timeout_seconds=timeout_seconds)
        if reply.error_kind:
            raise error_of(reply, rank=self._rank, phase="open")

    def _send(self, request: Request, descriptors: list[int]) -> None:
        try:
            socket.send_fds(self._connection, [encode(request)], descriptors)
        except OSError as error:
            raise self._death() from error

    def _death(self) -> SaveFailed:
        deadline = time.monotonic() + 5.0
        status = None
        while status is None and time.monotonic() < deadline:
            try:
                status = self._process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        how = "closed its connection" if status is None else _ending(status)
        return SaveFailed(f"the writer (pid {self.pid}) {how}", rank=self._rank, phase="write")


def error_of(reply: Reply, *, rank: int, phase: str) -> CheckpointError:
    """What the writer met."""
    kind = getattr(errors, reply.error_kind) if reply.error_kind in errors.__all__ else SaveFailed
    error: CheckpointError = kind(reply.error, rank=rank, phase=phase, path=reply.path, errno=reply.errno)
    return error


def _ending(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with exit code {status}"
