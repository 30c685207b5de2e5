"""The pure parts of the fault proxy: operations, choices of requests, and the ends of HTTP bodies."""

from __future__ import annotations

import asyncio

import pytest

from dcp_ckpt.testing.http_framing import (
    AnswerHead,
    BadFraming,
    BodyLength,
    RequestHead,
    body_pieces,
    read_answer_head,
    read_request_head,
)
from dcp_ckpt.testing.proxy_faults import SLOW_DOWN, Arrival, Decide, every_nth, first, no_faults, nth
from dcp_ckpt.testing.s3_operations import S3Operation, operation_of

NEXT_MESSAGE = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    ("request_line", "operation"),
    [
        ("PUT /bucket/a/b", "PUT"),
        ("PUT /bucket/a?partNumber=1&uploadId=x", "UPLOAD_PART"),
        ("PUT /bucket/a?tagging=", "OTHER"),
        ("PUT /bucket", "CREATE_BUCKET"),
        ("GET /bucket/a?partNumber=3", "GET"),
        ("GET /bucket/a?uploadId=x", "LIST_PARTS"),
        ("GET /bucket/?list-type=2&prefix=p%2Fq", "LIST"),
        ("GET /bucket?uploads", "LIST_UPLOADS"),
        ("GET /bucket?location", "OTHER"),
        ("GET /", "LIST_BUCKETS"),
        ("HEAD /bucket/a", "HEAD"),
        ("HEAD /bucket", "HEAD_BUCKET"),
        ("DELETE /bucket/a", "DELETE"),
        ("DELETE /bucket/a?uploadId=x", "ABORT_UPLOAD"),
        ("DELETE /bucket/", "DELETE_BUCKET"),
        ("POST /bucket/a?uploads", "CREATE_UPLOAD"),
        ("POST /bucket/a?uploadId=x", "COMPLETE_UPLOAD"),
        ("POST /bucket?delete", "DELETE_MANY"),
        ("POST /bucket/a", "OTHER"),
        ("OPTIONS /", "OTHER"),
    ],
)
def test_requests_are_told_apart(request_line: str, operation: str) -> None:
    head = RequestHead(f"{request_line} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert operation_of(head.method, head.path, head.query, head.headers) == operation


def test_copies_are_told_by_their_header() -> None:
    headers = {"x-amz-copy-source"}
    assert operation_of("PUT", "/b/k", "", headers) == S3Operation.COPY
    assert operation_of("PUT", "/b/k", "partNumber=1&uploadId=x", headers) == S3Operation.UPLOAD_PART_COPY


GETS_AND_PUTS = ["GET", "PUT", "PUT", "GET", "PUT", "PUT"]


@pytest.mark.parametrize(
    ("decide", "struck"),
    [
        (no_faults, []),
        (nth(2, SLOW_DOWN), [2]),
        (nth(2, SLOW_DOWN, kind=S3Operation.PUT), [3]),
        (first(3, SLOW_DOWN), [1, 2, 3]),
        (first(1, SLOW_DOWN, kind=S3Operation.PUT), [2]),
        (every_nth(3, SLOW_DOWN), [3, 6]),
        (every_nth(2, SLOW_DOWN, kind=S3Operation.PUT), [3, 6]),
        (every_nth(1, SLOW_DOWN, kind=S3Operation.LIST), []),
    ],
)
def test_faults_strike_the_requests_that_were_named(decide: Decide, struck: list[int]) -> None:
    arrivals = [
        Arrival(
            number=number,
            kind_number=GETS_AND_PUTS[:number].count(method),
            method=method,
            path="/bucket/key",
            query="",
            kind=S3Operation(method),
        )
        for number, method in enumerate(GETS_AND_PUTS, start=1)
    ]
    assert [arrival.number for arrival in arrivals if decide(arrival) is not None] == struck


@pytest.mark.parametrize("piece_bytes", [1, 3, 1000])
@pytest.mark.parametrize(
    ("body", "length"),
    [
        (b"", 0),
        (b"0123456789", 10),
        (b"0\r\n\r\n", "chunked"),
        (b"5\r\nabcde\r\n0a;name=value\r\n0123\r\n6789\r\n0\r\n\r\n", "chunked"),
        (b"3\r\nabc\r\n0\r\nx-amz-checksum-crc32: AAAA\r\n\r\n", "chunked"),
    ],
)
def test_a_body_ends_where_it_says(body: bytes, length: BodyLength, piece_bytes: int) -> None:
    async def take() -> tuple[bytes, bytes]:
        reader = asyncio.StreamReader()
        reader.feed_data(body + NEXT_MESSAGE)
        reader.feed_eof()
        pieces = [piece async for piece in body_pieces(reader, length, piece_bytes=piece_bytes)]
        return b"".join(pieces), (await read_answer_head(reader)).raw

    assert asyncio.run(take()) == (body, NEXT_MESSAGE)


@pytest.mark.parametrize(
    ("body", "length"),
    [(b"01234", 6), (b"5\r\nabc", "chunked"), (b"3\r\nabc\r\n0\r\n", "chunked"), (b"zz\r\n", "chunked")],
)
def test_a_body_that_breaks_off_is_an_error(body: bytes, length: BodyLength) -> None:
    async def take() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(body)
        reader.feed_eof()
        async for _ in body_pieces(reader, length, piece_bytes=100):
            pass

    with pytest.raises(BadFraming):
        asyncio.run(take())


@pytest.mark.parametrize(
    ("method", "status", "headers", "length"),
    [
        ("GET", 200, "Content-Length: 7\r\n", 7),
        ("GET", 206, "transfer-encoding: chunked\r\nContent-Length: 7\r\n", "chunked"),
        ("GET", 200, "", "until close"),
        ("HEAD", 200, "Content-Length: 7\r\n", 0),
        ("GET", 304, "Content-Length: 7\r\n", 0),
        ("DELETE", 204, "", 0),
        ("PUT", 100, "", 0),
    ],
)
def test_some_answers_have_no_body(method: str, status: int, headers: str, length: BodyLength) -> None:
    head = AnswerHead(f"HTTP/1.1 {status} Reason\r\n{headers}\r\n".encode())
    assert head.body_length(method) == length


def test_the_end_of_a_connection_is_no_request_and_half_a_head_is_an_error() -> None:
    async def take(data: bytes) -> RequestHead | None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await read_request_head(reader)

    assert asyncio.run(take(b"")) is None
    for broken in (b"GET / HT", b"hello\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n"):
        with pytest.raises(BadFraming):
            asyncio.run(take(broken))
