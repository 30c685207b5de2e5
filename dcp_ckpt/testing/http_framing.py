"""Where HTTP/1.1 messages begin and end in a stream of bytes, so that they can be passed on unchanged.

Owns the rules of RFC 9112 for heads and bodies, as far as S3 clients and servers use them. Must not know what
a message says. Called by `fault_proxy`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal
from urllib.parse import urlsplit

__all__ = [
    "MAX_HEAD_BYTES",
    "AnswerHead",
    "BadFraming",
    "BodyLength",
    "RequestHead",
    "body_pieces",
    "read_answer_head",
    "read_request_head",
]

MAX_HEAD_BYTES = 1 << 20
"""The `limit` that the stream readers need; also bounds what a reader buffers."""

BodyLength = int | Literal["chunked", "until close"]

_END_OF_HEAD = b"\r\n\r\n"
_NO_BODY_STATUSES = (204, 304)


class BadFraming(ValueError):
    """What came is no HTTP/1.1 message."""


@dataclass(frozen=True)
class _Head:
    """Everything up to the empty line: `raw` as it came."""

    raw: bytes

    @cached_property
    def start_line(self) -> list[str]:
        return self.raw.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)

    @cached_property
    def headers(self) -> dict[str, str]:
        """By name in lower case; the last one of a name, which is enough for those that frame."""
        lines = self.raw.decode("latin-1").split("\r\n")[1:-2]
        pairs = (line.partition(":") for line in lines)
        return {name.strip().lower(): value.strip() for name, _, value in pairs}

    @property
    def closes(self) -> bool:
        """Whether this is the last message of its direction on the connection."""
        return self.headers.get("connection", "").lower() == "close"

    def _declared_length(self) -> BodyLength | None:
        if self.headers.get("transfer-encoding", "").lower().endswith("chunked"):
            return "chunked"
        length = self.headers.get("content-length")
        if length is None:
            return None
        if not length.isdecimal():
            raise BadFraming(f"Content-Length {length!r}")
        return int(length)


class RequestHead(_Head):
    """The head of a request."""

    @property
    def method(self) -> str:
        return self.start_line[0]

    @property
    def path(self) -> str:
        return urlsplit(self.start_line[1]).path

    @property
    def query(self) -> str:
        return urlsplit(self.start_line[1]).query

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for `100 Continue` before it sends the body."""
        return self.headers.get("expect", "").lower() == "100-continue"

    @property
    def body_length(self) -> BodyLength:
        return self._declared_length() or 0


class AnswerHead(_Head):
    """The head of an answer."""

    @property
    def status(self) -> int:
        return int(self.start_line[1])

    @property
    def is_interim(self) -> bool:
        """Whether another answer to the same request follows, as after `100 Continue`."""
        return 100 <= self.status < 200

    def body_length(self, method: str) -> BodyLength:
        """The length of the body of an answer to a request of this method."""
        if method == "HEAD" or self.is_interim or self.status in _NO_BODY_STATUSES:
            return 0
        declared = self._declared_length()
        return "until close" if declared is None else declared


async def read_request_head(reader: asyncio.StreamReader) -> RequestHead | None:
    """The next request, or None when the client has closed the connection.

    Raises:
        BadFraming: it is none.
    """
    try:
        head = RequestHead(await _read_head(reader))
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise BadFraming("the connection ended in the head of a request") from error
        return None
    if len(head.start_line) != 3 or head.start_line[2] != "HTTP/1.1":
        raise BadFraming(f"request line {head.start_line}")
    return head


async def read_answer_head(reader: asyncio.StreamReader) -> AnswerHead:
    """The next answer.

    Raises:
        BadFraming: it is none, or the connection ended before it.
    """
    try:
        head = AnswerHead(await _read_head(reader))
    except asyncio.IncompleteReadError as error:
        raise BadFraming("the connection ended before the answer") from error
    if len(head.start_line) < 2 or not head.start_line[1].isdecimal():
        raise BadFraming(f"status line {head.start_line}")
    return head


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(_END_OF_HEAD)
    except asyncio.LimitOverrunError as error:
        raise BadFraming(f"a head of more than {MAX_HEAD_BYTES} bytes") from error


async def body_pieces(
    reader: asyncio.StreamReader, length: BodyLength, *, piece_bytes: int
) -> AsyncIterator[bytes]:
    """A body as it comes, framing included, in pieces of at most `piece_bytes` bytes.

    Raises:
        BadFraming: the connection ended before the body, or a chunk has no length.
    """
    if length == "chunked":
        async for piece in _chunked_pieces(reader, piece_bytes):
            yield piece
    elif length == "until close":
        while piece := await reader.read(piece_bytes):
            yield piece
    else:
        async for piece in _fixed_pieces(reader, length, piece_bytes):
            yield piece


async def _fixed_pieces(reader: asyncio.StreamReader, length: int, piece_bytes: int) -> AsyncIterator[bytes]:
    left = length
    while left:
        piece = await reader.read(min(left, piece_bytes))
        if not piece:
            raise BadFraming(f"the connection ended {left} bytes before the end of a body")
        left -= len(piece)
        yield piece


async def _chunked_pieces(reader: asyncio.StreamReader, piece_bytes: int) -> AsyncIterator[bytes]:
    size = -1
    while size != 0:
        line = await _read_line(reader)
        yield line
        try:
            size = int(line.split(b";")[0], 16)
        except ValueError as error:
            raise BadFraming(f"chunk length {line!r}") from error
        if size:
            async for piece in _fixed_pieces(reader, size + len(b"\r\n"), piece_bytes):
                yield piece
    # Trailers, up to an empty line.
    line = b""
    while line != b"\r\n":
        line = await _read_line(reader)
        yield line


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise BadFraming("the connection ended in a chunked body, or a line of it is too long") from error
