"""A proxy in front of an S3 server that logs every request, and does to chosen ones what networks do.

Owns the thread, the sockets and the log. Must not know what is stored. The faults are values of
`proxy_faults`; one connection is the business of `proxy_connection`. Called by tests and benchmarks.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from dcp_ckpt.closing import Closing
from dcp_ckpt.testing.http_framing import MAX_HEAD_BYTES, RequestHead
from dcp_ckpt.testing.proxy_connection import ProxyConnection
from dcp_ckpt.testing.proxy_faults import Arrival, Decide, Fault, Link, no_faults
from dcp_ckpt.testing.s3_operations import S3Operation, operation_of

__all__ = ["FaultProxy", "Request"]

_START_SECONDS = 10.0
_LOOPBACK = "127.0.0.1"
_SECRET_HEADERS = {"authorization", "x-amz-security-token"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, as logged just before its client can know how it ended.

    Args:
        query: as sent, without the question mark.
        headers: by name in lower case, but for those that hold a secret or a signature; left out when two
            requests are compared.
        num_body_bytes: how much of the body was passed on, framing of chunks included.
        status: what the server answered, or the proxy in its place; None when nobody answered. A lost answer
            has the server's status.
    """

    method: str
    path: str
    query: str
    kind: S3Operation
    num_body_bytes: int
    status: int | None
    headers: Mapping[str, str] = field(default_factory=dict, compare=False)


class FaultProxy(Closing):
    """Listens on a free port of loopback, from construction to `close`. Use it as a context manager.

    Requests are passed on unchanged, the Host header too: a signature that the client makes for the proxy's
    address holds. All methods may be called from any thread.

    Args:
        target_url: of the server, like `http://127.0.0.1:8333`.
        decide: which requests fail, and how.
        link: the network.
    """

    def __init__(self, target_url: str, *, decide: Decide = no_faults, link: Link | None = None) -> None:
        target = urlsplit(target_url)
        if target.scheme != "http" or target.hostname is None or target.port is None:
            raise ValueError(f"the target must look like http://host:port, not {target_url!r}")
        self._target = (target.hostname, target.port)
        self._book = _Book(decide, link or Link())
        self._ready = threading.Event()
        self._port = 0
        self._error: OSError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._thread.start()
        if not self._ready.wait(_START_SECONDS):
            raise RuntimeError(f"the proxy did not start in {_START_SECONDS:g} s")
        if self._error is not None:
            raise self._error

    @property
    def endpoint_url(self) -> str:
        return f"http://{_LOOPBACK}:{self._port}"

    def requests(self) -> list[Request]:
        """The log since the start or the last `reset_log`, in the order in which requests ended."""
        return self._book.requests()

    def counts(self) -> Counter[S3Operation]:
        """How many requests of each kind are in the log."""
        return Counter(request.kind for request in self.requests())

    def reset_log(self) -> None:
        """Forget the requests so far; those that are on their way are logged when they end."""
        self._book.reset_log()

    def set_faults(self, decide: Decide = no_faults, *, link: Link | None = None) -> None:
        """Replace the faults, from the next request on, also on open connections. Numbers start from 1 again.

        Without arguments: an ordinary proxy again.
        """
        self._book.set_faults(decide, link or Link())

    def close(self) -> None:
        """End all connections and the thread. Idempotent. Blocks until it has ended."""
        if self._loop is not None and self._stopping is not None and self._thread.is_alive():
            with suppress(RuntimeError):  # the loop has just ended by itself
                self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except OSError as error:
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = ProxyConnection(reader, writer, target=self._target, book=self._book)
            task = asyncio.create_task(connection.serve())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        server = await asyncio.start_server(accept, _LOOPBACK, 0, limit=MAX_HEAD_BYTES)
        self._port = server.sockets[0].getsockname()[1]
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._ready.set()
        await self._stopping.wait()
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


class _Book:
    """The faults in force, and the log; shared by the proxy's thread and its users."""

    def __init__(self, decide: Decide, link: Link) -> None:
        self._lock = threading.Lock()
        self._requests: list[Request] = []
        self.set_faults(decide, link)

    def set_faults(self, decide: Decide, link: Link) -> None:
        with self._lock:
            self._decide = decide
            self._link = link
            self._number = 0
            self._kind_numbers: Counter[S3Operation] = Counter()

    @property
    def link(self) -> Link:
        with self._lock:
            return self._link

    def arrive(self, head: RequestHead) -> tuple[Arrival, Fault | None]:
        kind = operation_of(head.method, head.path, head.query, head.headers)
        with self._lock:
            self._number += 1
            self._kind_numbers[kind] += 1
            arrival = Arrival(
                number=self._number,
                kind_number=self._kind_numbers[kind],
                method=head.method,
                path=head.path,
                query=head.query,
                kind=kind,
                headers={name: value for name, value in head.headers.items() if name not in _SECRET_HEADERS},
            )
            decide = self._decide
        return arrival, decide(arrival)

    def record(self, arrival: Arrival, *, num_body_bytes: int, status: int | None) -> None:
        request = Request(
            method=arrival.method,
            path=arrival.path,
            query=arrival.query,
            kind=arrival.kind,
            headers=arrival.headers,
            num_body_bytes=num_body_bytes,
            status=status,
        )
        with self._lock:
            self._requests.append(request)

    def requests(self) -> list[Request]:
        with self._lock:
            return list(self._requests)

    def reset_log(self) -> None:
        with self._lock:
            self._requests.clear()
