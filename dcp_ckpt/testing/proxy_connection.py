"""One client's connection through `fault_proxy`: its requests one after the other, each with its fault.

Owns the passing on of bytes, with the latency, the pace and the breaks that were asked for, and with bounded
memory: it reads no faster than the other side takes. Must not know which requests are to fail. Called by
`fault_proxy`, in its event loop.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from dcp_ckpt.testing.http_framing import (
    MAX_HEAD_BYTES,
    AnswerHead,
    BadFraming,
    BodyLength,
    RequestHead,
    body_pieces,
    read_answer_head,
    read_request_head,
)
from dcp_ckpt.testing.proxy_faults import Answer, Arrival, Fault, Hang, Hold, Link, LoseAnswer, Reset

__all__ = ["ProxyBook", "ProxyConnection"]

_PIECE_BYTES = 256 << 10
_MIN_PIECE_BYTES = 1 << 10
_PIECES_PER_SECOND = 50
"""How finely a bandwidth is kept."""
_LINGER_SECONDS = 2.0
_RELEASE_POLL_SECONDS = 0.005
_ERROR_BODY = "<Error><Code>{code}</Code><Message>injected by the proxy</Message></Error>"
_ERROR_HEAD = (
    "HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\n{more}\r\n"
)


class ProxyBook(Protocol):
    """Decides and logs."""

    @property
    def link(self) -> Link: ...

    def arrive(self, head: RequestHead) -> tuple[Arrival, Fault | None]: ...

    def record(self, arrival: Arrival, *, num_body_bytes: int, status: int | None) -> None: ...


class _Cut(Exception):
    """This connection has been reset on purpose."""


class _Side:
    """One of the two sockets, with the pace at which bytes are written to it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer
        self._due = 0.0
        writer.transport.set_write_buffer_limits(high=_PIECE_BYTES)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def write(self, data: bytes, bytes_per_second: float | None = None) -> None:
        if bytes_per_second is not None:
            now = asyncio.get_running_loop().time()
            self._due = max(self._due, now) + len(data) / bytes_per_second
            await asyncio.sleep(self._due - now)
        self._writer.write(data)
        await self._writer.drain()

    @property
    def has_ended(self) -> bool:
        """Whether the other end has closed or reset the connection."""
        return self.reader.at_eof() or self.reader.exception() is not None

    def reset(self) -> None:
        """Send a RST; what was not sent yet is lost."""
        with suppress(OSError):
            self._writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        self._writer.transport.abort()

    async def end(self) -> None:
        """Let the other end read all before it sees the end: closing with unread bytes would reset."""
        with suppress(OSError):
            self._writer.write_eof()
            await asyncio.wait_for(self.drain_input(), _LINGER_SECONDS)

    async def drain_input(self) -> None:
        while await self.reader.read(_PIECE_BYTES):
            pass

    async def close(self) -> None:
        """Write what is buffered, for as long as the other end takes it, and close."""
        self._writer.close()
        try:
            with suppress(OSError):
                await asyncio.wait_for(self._writer.wait_closed(), _LINGER_SECONDS)
        finally:
            self._writer.transport.abort()


@dataclass(kw_only=True)
class _Exchange:
    """One request and what becomes of it."""

    book: ProxyBook
    head: RequestHead
    arrival: Arrival
    fault: Fault | None
    link: Link
    num_body_bytes: int = 0
    is_sent: bool = False
    is_recorded: bool = False

    def record(self, status: int | None) -> None:
        """Put it into the log, the first time it is called."""
        if not self.is_recorded:
            self.is_recorded = True
            self.book.record(self.arrival, num_body_bytes=self.num_body_bytes, status=status)

    @property
    def piece_bytes(self) -> int:
        rate = self.link.bytes_per_second
        if rate is None:
            return _PIECE_BYTES
        return min(_PIECE_BYTES, max(_MIN_PIECE_BYTES, int(rate / _PIECES_PER_SECOND)))


class ProxyConnection:
    """Serves one accepted connection."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        target: tuple[str, int],
        book: ProxyBook,
    ) -> None:
        self._client = _Side(reader, writer)
        self._server: _Side | None = None
        self._target = target
        self._book = book
        self._num_bytes_up = 0

    async def serve(self) -> None:
        """Until either side ends the connection, a fault does, or the task is cancelled."""
        try:
            link = self._book.link
            await asyncio.sleep(link.latency_up_seconds + link.latency_down_seconds)
            while (head := await read_request_head(self._client.reader)) is not None:
                arrival, fault = self._book.arrive(head)
                exchange = _Exchange(
                    book=self._book, head=head, arrival=arrival, fault=fault, link=self._book.link
                )
                if not await self._handle(exchange):
                    break
        except (OSError, BadFraming, _Cut):
            # Whatever ended this connection, the client is to see it end; other connections go on.
            self._client.reset()
        finally:
            await self._client.close()
            await self._leave_server()

    async def _handle(self, exchange: _Exchange) -> bool:
        """One request; whether another may follow."""
        await asyncio.sleep(exchange.link.latency_up_seconds)
        fault = exchange.fault
        try:
            if isinstance(fault, Answer):
                return await self._answer(exchange, fault)
            if isinstance(fault, Hang):
                exchange.record(None)
                await self._client.drain_input()
                return False
            if isinstance(fault, Reset) and fault.after_body_bytes == 0:
                raise _Cut
            if isinstance(fault, Hold) and not fault.answer:
                await _released(fault)
            return await self._pass_on(exchange)
        finally:
            # Before the client can see the end of its connection.
            exchange.record(None)

    async def _answer(self, exchange: _Exchange, answer: Answer) -> bool:
        """Answer in place of the server, as S3 does: after the body, unless the client waits with it."""
        head = exchange.head
        if not head.expects_continue:
            async for _ in body_pieces(
                self._client.reader, head.body_length, piece_bytes=exchange.piece_bytes
            ):
                pass
        body = "" if head.method == "HEAD" else _ERROR_BODY.format(code=answer.code)
        more = "Connection: close\r\n" if head.expects_continue else ""
        text = _ERROR_HEAD.format(status=answer.status, code=answer.code, length=len(body), more=more) + body
        await asyncio.sleep(exchange.link.latency_down_seconds)
        exchange.record(answer.status)
        await self._client.write(text.encode(), exchange.link.bytes_per_second)
        if head.expects_continue or head.closes:
            await self._client.end()
            return False
        return True

    async def _pass_on(self, exchange: _Exchange) -> bool:
        server = await self._reach_server()
        sending = asyncio.create_task(self._send_request(exchange, server))
        try:
            answer = await self._receive_head(exchange, server, sending)
            length = answer.body_length(exchange.head.method)
            await self._send_answer(exchange, server, answer, length)
            if not exchange.head.expects_continue:
                await sending
            if not exchange.is_sent:
                # The server has answered early, and the rest of the body will not be sent, or not be read.
                await self._client.end()
                return False
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        return not (exchange.head.closes or answer.closes or length == "until close")

    async def _send_request(self, exchange: _Exchange, server: _Side) -> None:
        head = exchange.head
        limit = self._body_bytes_until_reset(exchange)
        if limit is not None and limit < 0:
            self._cut(exchange, server)
        if not await self._send_up(exchange, server, head.raw):
            return
        async for piece in body_pieces(
            self._client.reader, head.body_length, piece_bytes=exchange.piece_bytes
        ):
            if head.expects_continue and exchange.num_body_bytes == 0:
                await asyncio.sleep(exchange.link.latency_up_seconds)
            allowed = piece if limit is None else piece[: limit - exchange.num_body_bytes]
            exchange.num_body_bytes += len(allowed)
            if not await self._send_up(exchange, server, allowed):
                return
            if len(allowed) < len(piece):
                self._cut(exchange, server)
        if isinstance(exchange.fault, Reset):
            self._cut(exchange, server)
        exchange.is_sent = True

    def _body_bytes_until_reset(self, exchange: _Exchange) -> int | None:
        """After how much of this body the connections are reset; less than 0: before the request."""
        limits = []
        if isinstance(exchange.fault, Reset):
            limits.append(exchange.fault.after_body_bytes)
        if exchange.link.reset_after_bytes_up is not None:
            sent = self._num_bytes_up + len(exchange.head.raw)
            limits.append(exchange.link.reset_after_bytes_up - sent)
        return min(limits, default=None)

    async def _send_up(self, exchange: _Exchange, server: _Side, data: bytes) -> bool:
        """Whether the server still reads. When it does not, it may have answered."""
        self._num_bytes_up += len(data)
        try:
            await server.write(data, exchange.link.bytes_per_second)
        except OSError:
            return False
        return True

    def _cut(self, exchange: _Exchange, server: _Side) -> None:
        exchange.record(None)
        server.reset()
        raise _Cut

    async def _receive_head(
        self, exchange: _Exchange, server: _Side, sending: asyncio.Task[None]
    ) -> AnswerHead:
        """The head of the final answer; interim ones are passed on."""
        while True:
            reading = asyncio.create_task(read_answer_head(server.reader))
            try:
                # Of a request that was cut, or that the client gave up, there is no answer.
                while not reading.done():
                    awaited = {reading} if sending.done() else {reading, sending}
                    await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                    if sending.done():
                        sending.result()
                head = reading.result()
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
            if not head.is_interim:
                return head
            await asyncio.sleep(exchange.link.latency_down_seconds)
            await self._client.write(head.raw, exchange.link.bytes_per_second)

    async def _send_answer(
        self, exchange: _Exchange, server: _Side, head: AnswerHead, length: BodyLength
    ) -> None:
        fault, link = exchange.fault, exchange.link
        limit = fault.after_body_bytes if isinstance(fault, LoseAnswer) else None
        pieces = body_pieces(server.reader, length, piece_bytes=exchange.piece_bytes)
        if isinstance(fault, LoseAnswer) and limit is None:
            async for _ in pieces:
                pass
            exchange.record(head.status)
            raise _Cut
        if isinstance(fault, Hold) and fault.answer:
            await _released(fault)
        await asyncio.sleep(link.latency_down_seconds)
        exchange.record(head.status)
        await self._client.write(head.raw, link.bytes_per_second)
        num_bytes = 0
        async for piece in pieces:
            allowed = piece if limit is None else piece[: limit - num_bytes]
            num_bytes += len(allowed)
            await self._client.write(allowed, link.bytes_per_second)
            if len(allowed) < len(piece):
                raise _Cut
        if limit is not None:
            raise _Cut

    async def _reach_server(self) -> _Side:
        """The connection to the server; a new one when it has closed the last one."""
        if self._server is not None and self._server.has_ended:
            await self._leave_server()
        if self._server is None:
            host, port = self._target
            reader, writer = await asyncio.open_connection(host, port, limit=MAX_HEAD_BYTES)
            self._server = _Side(reader, writer)
        return self._server

    async def _leave_server(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.close()


async def _released(hold: Hold) -> None:
    # Set by another thread, which knows nothing of this loop.
    while not hold.released.is_set():
        await asyncio.sleep(_RELEASE_POLL_SECONDS)
