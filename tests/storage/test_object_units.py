"""What object storage decides without a store: merged reads, parts, delays, errors, URLs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from hypothesis import example, given
from hypothesis import strategies as st

from dcp_ckpt.errors import (
    CheckpointError,
    ConfigError,
    StorageError,
    StorageExists,
    StorageFull,
    StorageNotFound,
    StorageTransient,
    StorageUnsuitable,
)
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.base import ByteRange
from dcp_ckpt.storage.objects.fetch import FETCH_BYTES, GAP_BYTES, Filling, memory_for, merge_ranges
from dcp_ckpt.storage.objects.retry import RetryPolicy
from dcp_ckpt.storage.objects.s3_body import RequestBody
from dcp_ckpt.storage.objects.s3_errors import from_client_library, from_response
from dcp_ckpt.storage.objects.upload import part_bytes_for
from dcp_ckpt.testing.storage_write_suite import NUM_RACERS, race, try_to_create

MIB = 1 << 20
PATH = "s3://bucket/run/object"
SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCY"

ranges_strategy = st.lists(
    st.builds(
        ByteRange,
        key=st.sampled_from(["a", "b/c"]),
        offset=st.integers(0, 40 * MIB),
        num_bytes=st.one_of(st.integers(0, 5000), st.integers(0, 12 * MIB)),
    ),
    max_size=40,
)


@given(ranges_strategy)
def test_every_range_is_fetched_once_and_no_fetch_is_too_large(ranges: list[ByteRange]) -> None:
    fetches = merge_ranges(ranges)
    members = [number for fetch in fetches for number in fetch.members]
    assert sorted(members) == [number for number, item in enumerate(ranges) if item.num_bytes]
    for fetch in fetches:
        parts = [ranges[number] for number in fetch.members]
        assert {part.key for part in parts} == {fetch.key}
        assert fetch.offset == min(part.offset for part in parts)
        assert fetch.offset + fetch.num_bytes == max(part.offset + part.num_bytes for part in parts)
        assert fetch.num_bytes <= FETCH_BYTES or len(fetch.members) == 1
        assert _largest_gap(parts) <= GAP_BYTES
    assert [(fetch.key, fetch.offset) for fetch in fetches] == sorted(
        (fetch.key, fetch.offset) for fetch in fetches
    )


def _largest_gap(parts: list[ByteRange]) -> int:
    """The most bytes between two neighbours that nobody asked for."""
    end, gap = parts[0].offset, 0
    for part in sorted(parts, key=lambda part: part.offset):
        gap = max(gap, part.offset - end)
        end = max(end, part.offset + part.num_bytes)
    return gap


def test_neighbours_share_a_request_and_strangers_do_not() -> None:
    near = [ByteRange(key="a", offset=number * MIB, num_bytes=4096) for number in range(4)]
    far = ByteRange(key="a", offset=3 * MIB + 4096 + GAP_BYTES + 1, num_bytes=1)
    other = ByteRange(key="b", offset=0, num_bytes=1)
    fetches = merge_ranges([other, *near, far])
    assert [(fetch.key, fetch.members) for fetch in fetches] == [
        ("a", (1, 2, 3, 4)),
        ("a", (5,)),
        ("b", (0,)),
    ]


def offered(offset: int, memory: bytearray, **options: Any) -> ByteRange:
    view = memoryview(memory)
    middle = len(memory) // 2
    parts = [view[:middle], view[middle:middle], view[middle:]]
    return ByteRange(key="a", offset=offset, num_bytes=len(memory), into=lambda: parts, **options)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20)), min_size=1, max_size=8),
    st.lists(st.integers(1, 30), min_size=1),
)
def test_an_answer_lands_in_the_memory_of_its_ranges(layout: list[tuple[int, int]], cuts: list[int]) -> None:
    memory = [bytearray(num_bytes) for _, num_bytes in layout]
    ranges, end = [], 3
    for (gap, _), target in zip(layout, memory, strict=True):
        ranges.append(offered(end + gap, target))
        end += gap + len(target)
    content = bytes(number % 251 for number in range(end))
    (fetch,) = merge_ranges(ranges)
    parts = memory_for(fetch, ranges)
    assert parts is not None
    filling, answer = Filling(parts), content[fetch.offset :]
    while answer:
        for size in cuts:
            filling.add(answer[:size])
            answer = answer[size:]
    assert filling.num_bytes == fetch.num_bytes
    for item, target in zip(ranges, memory, strict=True):
        assert target == content[item.offset : item.offset + item.num_bytes]
    with pytest.raises(ValueError, match="more than were asked for"):
        filling.add(b"x")


def test_memory_is_borrowed_only_where_nothing_waits_for_it_and_nothing_is_needed_twice() -> None:
    plain = offered(0, bytearray(4))
    for second in (
        offered(4, bytearray(4), into_per_thread=True),
        offered(2, bytearray(4)),
        ByteRange(key="a", offset=4, num_bytes=4),
    ):
        ranges = [plain, second]
        (fetch,) = merge_ranges(ranges)
        assert memory_for(fetch, ranges) is None


@given(st.integers(1, 200 << 30) | st.integers(1, 64 * MIB))
@example(900 * MIB + 1)  # 100 parts of 9 MiB and one byte
@example(16 * MIB + 1)
def test_parts_fit_the_rules_of_s3(size_bytes: int) -> None:
    part_bytes = part_bytes_for(size_bytes)
    num_parts = -(-size_bytes // part_bytes)
    assert num_parts <= 10_000
    assert part_bytes >= 5 * MIB
    assert part_bytes % MIB == 0
    last = size_bytes - (num_parts - 1) * part_bytes
    assert num_parts == 1 or last >= part_bytes // 16, "a small rest would cost a request of its own"
    assert part_bytes <= 32 * MIB or num_parts > 8000, "parts are no larger than they must be"


@given(
    attempt=st.integers(1, 5000),
    elapsed=st.floats(0, 300),
    draw=st.floats(0, 1, exclude_max=True),
    reached=st.booleans(),
)
def test_delays_grow_up_to_a_limit_and_end_at_the_deadline(
    attempt: int, elapsed: float, draw: float, reached: bool
) -> None:
    policy = RetryPolicy(
        deadline_seconds=100.0, first_contact_seconds=10.0, first_delay_seconds=0.1, most_delay_seconds=5.0
    )
    delay = policy.delay(attempt, elapsed_seconds=elapsed, reached=reached, draw=draw)
    whole = min(0.1 * 2 ** min(attempt - 1, 50), 5.0)
    limit = 100.0 if reached else 10.0
    if delay is None:
        assert elapsed + whole > limit
    else:
        assert whole / 2 <= delay <= whole
        assert elapsed + delay <= limit


def test_a_wrong_address_is_told_within_seconds_by_default() -> None:
    policy = RetryPolicy()
    assert policy.first_contact_seconds < 10
    assert policy.delay(1, elapsed_seconds=9.9, reached=False, draw=0.0) is None
    assert policy.delay(1, elapsed_seconds=9.9, reached=True, draw=0.0) is not None
    brief = RetryPolicy(deadline_seconds=2.0)
    assert brief.delay(1, elapsed_seconds=2.0, reached=False, draw=0.0) is None


def answer(code: str, status: int) -> dict[str, Any]:
    error = {"Code": code, "Message": SECRET, "StringToSign": SECRET, "AWSAccessKeyId": SECRET}
    return {"Error": error, "ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    ("code", "status", "kind", "advice"),
    [
        ("SlowDown", 503, StorageTransient, ""),
        ("ServiceUnavailable", 503, StorageTransient, ""),
        ("InternalError", 500, StorageTransient, ""),
        ("InternalError", 200, StorageTransient, ""),  # CompleteMultipartUpload may say so late
        ("RequestTimeout", 400, StorageTransient, ""),
        ("ConditionalRequestConflict", 409, StorageTransient, ""),
        ("OperationAborted", 409, StorageTransient, ""),
        ("", 502, StorageTransient, ""),
        ("504", 504, StorageTransient, ""),
        ("429", 429, StorageTransient, ""),
        ("PreconditionFailed", 412, StorageExists, "taken"),
        ("412", 412, StorageExists, "taken"),
        ("NoSuchKey", 404, StorageNotFound, "no such object"),
        ("404", 404, StorageNotFound, "no such object"),
        ("NoSuchUpload", 404, StorageNotFound, ""),
        ("NoSuchBucket", 404, StorageError, "never created here"),
        ("InvalidAccessKeyId", 403, StorageError, "AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", 403, StorageError, "AWS_SECRET_ACCESS_KEY"),
        ("ExpiredToken", 400, StorageError, "renew"),
        ("AccessDenied", 403, StorageError, "permissions"),
        ("403", 403, StorageError, "AWS_SECRET_ACCESS_KEY"),
        ("RequestTimeTooSkewed", 403, StorageError, "clock"),
        ("PermanentRedirect", 301, StorageError, "AWS_DEFAULT_REGION"),
        ("301", 301, StorageError, "AWS_DEFAULT_REGION"),
        ("AuthorizationHeaderMalformed", 400, StorageError, "AWS_DEFAULT_REGION"),
        ("EntityTooLarge", 400, StorageFull, "no more bytes"),
        ("XMinioStorageFull", 507, StorageFull, "no more bytes"),
        ("NotImplemented", 501, StorageUnsuitable, "cannot do this"),
        ("InvalidRange", 416, StorageError, "InvalidRange"),
    ],
)
def test_what_the_store_answers(code: str, status: int, kind: type[StorageError], advice: str) -> None:
    error = from_response(answer(code, status), operation="GET", path=PATH)
    assert type(error) is kind
    assert advice in error.message
    assert error.path == PATH
    assert SECRET not in str(error)


@pytest.mark.parametrize(
    ("error", "kind", "advice"),
    [
        (boto.NoCredentialsError(), StorageError, "AWS_ACCESS_KEY_ID"),
        (boto.PartialCredentialsError(provider="env", cred_var="x"), StorageError, "AWS_SECRET_ACCESS_KEY"),
        (boto.CredentialRetrievalError(provider="p", error_msg=SECRET), StorageError, "AWS_PROFILE"),
        (boto.ProfileNotFound(profile="train"), ConfigError, "AWS_PROFILE"),
        (boto.NoRegionError(), ConfigError, "AWS_DEFAULT_REGION"),
        (boto.ConfigParseError(path="/home/me/.aws/config"), ConfigError, "/home/me/.aws/config"),
        (ValueError("Invalid endpoint: nowhere"), ConfigError, "nowhere"),
        (boto.SSLError(endpoint_url="https://x", error="self-signed"), StorageError, "certificate"),
        (ResponseParserError("<html>"), StorageError, "AWS_ENDPOINT_URL"),
        (boto.EndpointConnectionError(endpoint_url="http://x"), StorageTransient, "AWS_ENDPOINT_URL"),
        (boto.ConnectTimeoutError(endpoint_url="http://x"), StorageTransient, "AWS_ENDPOINT_URL"),
        (boto.ReadTimeoutError(endpoint_url="http://x"), StorageTransient, ""),
        (boto.ConnectionClosedError(endpoint_url="http://x"), StorageTransient, ""),
        (aiohttp.ClientPayloadError(), StorageTransient, ""),
        (ConnectionResetError(), StorageTransient, ""),
        (TimeoutError(), StorageTransient, ""),
        (KeyError("ETag"), StorageError, "not understood"),  # no trouble of the network: asked only once
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_the_client_library_raises(error: Exception, kind: type[CheckpointError], advice: str) -> None:
    translated = from_client_library(error, operation="PUT", path=PATH)
    assert type(translated) is kind
    assert advice in translated.message
    assert SECRET not in str(translated)


def test_urls_say_what_is_opened() -> None:
    for url, opened in (
        ("s3://bucket", "s3://bucket"),
        ("S3://bucket/runs/", "s3://bucket/runs"),
        ("s3a://bucket/runs", "s3a://bucket/runs"),
        ("s3+single-writer://bucket/runs/a", "s3+single-writer://bucket/runs/a"),
        ("memory://place/runs", "memory://place/runs"),
    ):
        storage = open_storage(url)
        assert storage.url == opened
        assert storage.capabilities.exclusive_create == ("single-writer" not in url)
        assert storage.capabilities.shared == ("memory" not in url)
        assert not storage.capabilities.directories
        assert not storage.capabilities.lease_ends_with_holder
        storage.close()
        storage.close()


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3:///runs", "s3://bucket/../other", "s3://bucket/a//b", "nonesuch://x", "s3://bucket/./a"],
)
def test_bad_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        open_storage(url)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory through fsspec: one of the file systems of which nothing is known."""
    monkeypatch.chdir(tmp_path.parent)
    return tmp_path.name


def test_other_stores_are_refused_for_shared_writing(place: str) -> None:
    with closing(open_storage(f"local://{place}")) as storage:
        with pytest.raises(StorageUnsuitable, match=r"local\+single-writer://"):
            storage.require_exclusive_create()
        with pytest.raises(StorageUnsuitable):
            storage.create_exclusive("a", b"1")
        assert storage.list("") == []


def test_other_stores_serve_a_single_writer(place: str) -> None:
    with closing(open_storage(f"local+single-writer://{place}")) as storage:
        storage.require_exclusive_create()
        storage.create_exclusive("a", b"1")
        with pytest.raises(StorageExists):
            storage.create_exclusive("a", b"2")
        assert storage.read("a") == b"1"


def test_of_many_storages_in_memory_one_creates() -> None:
    storages = [open_storage("memory://race") for _ in range(NUM_RACERS)]
    for key in map(str, range(20)):

        def attempt(racer: int, key: str = key) -> bool:
            return try_to_create(storages[racer], key, racer)

        winners = race(attempt)
        assert len(winners) == 1
        assert storages[0].read(key) == bytes(winners)
        storages[0].delete([key])


def test_a_body_goes_out_in_pieces_and_only_once() -> None:
    data = bytes(range(256)) * 5000
    body = RequestBody(memoryview(data))
    assert len(body) == len(data)
    pieces = asyncio.run(collected(body))
    assert b"".join(pieces) == data
    assert len(pieces) > 1
    # A second time would be a repetition of which `RetryingClient` knows nothing.
    with pytest.raises(ConnectionError):
        asyncio.run(collected(body))
    body.seek(0)
    assert b"".join(asyncio.run(collected(body))) == data
    assert not RequestBody(b"")


async def collected(body: RequestBody) -> list[bytes]:
    pieces: AsyncIterator[memoryview] = body.__aiter__()
    return [bytes(piece) async for piece in pieces]
