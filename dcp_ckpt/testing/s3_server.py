"""A real S3 server for tests and trials: SeaweedFS on loopback, gone without a trace when it is closed.

Owns the process: its start until it really works, its end, and its files. Must not know what is stored. What
is particular to the program is in `seaweedfs`. Called by tests, by `make s3`, and as
`python -m dcp_ckpt.testing.s3_server`.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import click

from dcp_ckpt.closing import Closing
from dcp_ckpt.testing.s3_requests import S3Answer, S3Requests
from dcp_ckpt.testing.seaweedfs import (
    LOOPBACK,
    Ports,
    command,
    environment,
    find_binary,
    find_ports,
    write_settings,
)

__all__ = ["S3Server", "S3ServerFailed"]

_START_ATTEMPTS = 5
_STOP_SECONDS = 20.0
"""Of an orderly end: it takes 15 s, most of them until the filer gives up waiting for its own gateway."""
_POLL_SECONDS = 0.05
_ANSWER_SECONDS = 5.0
_LOG_LINES = 30
_PROBE_BUCKET = "server-is-ready"
_PROBE_BODY = b"ready"

# Runs before `weed` in its process: a test run that is killed cannot stop its server, so the kernel does.
# As a program of its own instead of a `preexec_fn`, which may deadlock in a process with threads. The parent
# may have died before the kernel was asked; then it is not the parent any more. Signals that this process
# blocks would stay blocked.
_DIE_WITH_PARENT = """\
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) or os.getppid() != int(sys.argv[1]):
    sys.exit("cannot tie the server to its parent")
signal.pthread_sigmask(signal.SIG_SETMASK, [])
os.execv(sys.argv[2], sys.argv[2:])
"""


class S3ServerFailed(RuntimeError):
    """The server ended, or did not work in time; the message holds the end of its log."""


class S3Server(Closing):
    """An S3 server of this process's own, ready when the constructor returns. Use it as a context manager.

    Blocks for about 4 seconds. Several can run at once, each with its own credentials. Should this process be
    killed, the server dies with it, and its temporary files stay. Linux ties it to the thread that starts it:
    that one has to live as long as the server. Not thread-safe.

    Args:
        data_directory: where to store; made if missing, and left where it is by `close`. None: a temporary
            one.
        start_seconds: how long the server may take until it works.

    Raises:
        MissingDependencyError: the program `weed` or botocore is not installed.
        S3ServerFailed: it did not start.
    """

    def __init__(self, data_directory: Path | None = None, *, start_seconds: float = 60.0) -> None:
        self.access_key = secrets.token_hex(10)
        self.secret_key = secrets.token_hex(20)
        self.region = "us-east-1"
        self._binary = find_binary()
        self._start_seconds = start_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = Path(tempfile.mkdtemp(prefix="dcp_ckpt-s3-"))
        self._data = (data_directory or self._directory / "data").resolve()
        self._keeps_data = data_directory is not None
        self._log = self._directory / "weed.log"
        try:
            self._data.mkdir(parents=True, exist_ok=True)
            write_settings(self._directory, access_key=self.access_key, secret_key=self.secret_key)
            self._ports = self._start_on_free_ports()
        except BaseException:
            shutil.rmtree(self._directory)
            raise

    @property
    def endpoint_url(self) -> str:
        return f"http://{LOOPBACK}:{self._ports.s3}"

    @property
    def pid(self) -> int | None:
        """The process id of the server, or None when it does not run."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def environment(self) -> dict[str, str]:
        """The variables with which S3 clients find this server, and ask nobody else for credentials."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def requests(self) -> S3Requests:
        """For single signed requests to this server."""
        return S3Requests(
            endpoint_url=self.endpoint_url,
            access_key=self.access_key,
            secret_key=self.secret_key,
            region=self.region,
        )

    def make_bucket(self, name: str) -> None:
        """Make a bucket; nothing happens when it is there.

        The server reserves disk space for each bucket: tests share one, with a prefix each.

        Raises:
            S3ServerFailed: the server refuses, for example a name of less than 3 characters.
        """
        answer = self.requests().send("PUT", f"/{name}")
        if answer.status not in (200, 409):
            raise S3ServerFailed(f"no bucket {name!r}: {answer.status} {answer.error_code}")

    def kill(self) -> None:
        """End the server at once (SIGKILL), as a crash would. Nothing happens when it does not run."""
        if self._process is None:
            return
        # Its group may be gone only once it has been waited for; then its number may be somebody else's.
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None
        for path in self._ports.stale_sockets():
            path.unlink(missing_ok=True)

    def restart(self) -> None:
        """Start it again, on the same data, ports and credentials; stops it first when it runs. Blocks.

        Raises:
            S3ServerFailed: it did not start.
        """
        self._stop()
        self._start(self._ports)

    def close(self) -> None:
        """Stop the server and remove its files, but for a data directory that was given. Idempotent.

        Blocks: for 15 seconds with a data directory that is kept, where the server is asked to end (SIGTERM)
        and killed when it does not; hardly at all with a temporary one, where it is killed at once.
        """
        self._stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _start_on_free_ports(self) -> Ports:
        for attempt in range(1, _START_ATTEMPTS + 1):
            ports = find_ports()
            try:
                self._start(ports)
            except S3ServerFailed:
                # Somebody took a port in between: the only failure that other ports mend.
                if attempt == _START_ATTEMPTS or ports.all_free():
                    raise
            else:
                break
        return ports

    def _start(self, ports: Ports) -> None:
        self._ports = ports
        weed = command(self._binary, ports, directory=self._directory, data_directory=self._data)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *weed],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory / "conf",
                env=environment(os.environ, self._directory),
                start_new_session=True,
            )
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.kill()
            raise

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._start_seconds
        for missing in self._missing():
            if missing is None:
                return
            if process.poll() is not None:
                raise S3ServerFailed(f"the S3 server ended with {process.returncode}:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise S3ServerFailed(
                    f"the S3 server does not work after {self._start_seconds:g} s, {missing}:\n"
                    f"{self._log_tail()}"
                )
            time.sleep(_POLL_SECONDS)

    def _missing(self) -> Iterator[str | None]:
        """What does not work yet, look by look; None at last.

        An open port says little: right after a start the gateway answers 500 to reads of what is stored,
        since the volumes become known one by one.
        """
        checks = (
            ("the gateway does not answer", self._gateway_answers),
            ("the master knows no place for new data", self._master_assigns),
            ("the master does not know all stored volumes", self._volumes_are_known),
            ("a first object cannot be stored and read", self._objects_work),
        )
        for missing, works in checks:
            while True:
                with suppress(OSError, http.client.HTTPException):
                    if works():
                        break
                yield missing
        yield None

    def _gateway_answers(self) -> bool:
        return _get(urlsplit(self.endpoint_url).netloc, "/")[0] == http.HTTPStatus.FORBIDDEN

    def _master_assigns(self) -> bool:
        status, body = _get(f"{LOOPBACK}:{self._ports.master}", "/dir/assign")
        return status == http.HTTPStatus.OK and "fid" in json.loads(body)

    def _volumes_are_known(self) -> bool:
        numbers = sorted({path.stem.rpartition("_")[2] for path in self._data.glob("*.dat")})
        master = f"{LOOPBACK}:{self._ports.master}"
        return all(
            _get(master, f"/dir/lookup?volumeId={number}")[0] == http.HTTPStatus.OK for number in numbers
        )

    def _objects_work(self) -> bool:
        """Whether an object can be deleted, stored and read. It stays, to be read first after a restart."""
        self.make_bucket(_PROBE_BUCKET)

        def ask(method: str, body: bytes = b"") -> S3Answer:
            return self.requests().send(method, f"/{_PROBE_BUCKET}/probe", body=body)

        return (
            ask("GET").status in (http.HTTPStatus.OK, http.HTTPStatus.NOT_FOUND)
            and ask("DELETE").status == http.HTTPStatus.NO_CONTENT
            and ask("PUT", _PROBE_BODY).status == http.HTTPStatus.OK
            and ask("GET").body == _PROBE_BODY
        )

    def _stop(self) -> None:
        if self._process is not None and self._keeps_data:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        self.kill()

    def _log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:])


def _get(address: str, target: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=_ANSWER_SECONDS)
    try:
        connection.request("GET", target)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to store, and to find again at the next start. [default: a temporary directory]",
)
@click.option("--bucket", default="checkpoints", show_default=True, help="A bucket to make.")
def main(data: Path | None, bucket: str) -> None:
    """Run an S3 server on this machine until Ctrl-C or SIGTERM."""
    awaited = {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD}
    # Blocked from the start, so that none ends this program while there is something to clean up.
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    with S3Server(data) as server:
        server.make_bucket(bucket)
        for name, value in server.environment().items():
            click.echo(f"export {name}={value}")
        click.echo(f"# then use, for example, s3://{bucket}/my-run; Ctrl-C stops the server")
        sys.stdout.flush()
        while signal.sigwait(awaited) == signal.SIGCHLD:
            if server.pid is None:
                raise click.ClickException("the S3 server has ended by itself")


if __name__ == "__main__":
    main()
