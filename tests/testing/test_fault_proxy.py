"""The fault proxy before a real server: it changes nothing, sees everything, and fails what it is told to."""

from __future__ import annotations

import hashlib
import http.client
import random
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError
from botocore.session import Session

from dcp_ckpt.testing.fault_proxy import FaultProxy, Request
from dcp_ckpt.testing.proxy_faults import (
    INTERNAL_ERROR,
    SLOW_DOWN,
    Arrival,
    Decide,
    Fault,
    Hang,
    Hold,
    Link,
    LoseAnswer,
    Reset,
    every_nth,
    first,
    nth,
)
from dcp_ckpt.testing.s3_operations import S3Operation
from dcp_ckpt.testing.s3_requests import S3Requests
from dcp_ckpt.testing.s3_server import S3Server
from tests.eventually import eventually

LOST = (ConnectionError, http.client.HTTPException)
PART_BYTES = 5 << 20


@pytest.fixture(scope="module")
def shared_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultProxy) -> FaultProxy:
    """Without faults, and with an empty log."""
    shared_proxy.set_faults()
    shared_proxy.reset_log()
    return shared_proxy


@pytest.fixture
def through(proxy: FaultProxy, s3_server: S3Server) -> S3Requests:
    """Requests that go through the proxy, each over a connection of its own."""
    return replace(s3_server.requests(), endpoint_url=proxy.endpoint_url)


@pytest.fixture
def direct(s3_server: S3Server) -> S3Requests:
    """Requests that do not."""
    return s3_server.requests()


@pytest.fixture
def key(s3_prefix: str) -> str:
    """`/bucket/key`; nothing is there yet."""
    return s3_prefix.removeprefix("s3:/") + "/object"


@pytest.fixture(scope="module")
def botocore_client(shared_proxy: FaultProxy, s3_server: S3Server) -> Iterator[Any]:
    """A client that asks once, keeps its connection, and gives up after a second."""
    client = Session().create_client(
        "s3",
        endpoint_url=shared_proxy.endpoint_url,
        aws_access_key_id=s3_server.access_key,
        aws_secret_access_key=s3_server.secret_key,
        region_name=s3_server.region,
        config=Config(retries={"total_max_attempts": 1}, read_timeout=1.0, s3={"addressing_style": "path"}),
    )
    yield client
    client.close()


def body_of(num_bytes: int) -> bytes:
    return random.Random(num_bytes).randbytes(num_bytes)


def statuses(proxy: FaultProxy) -> list[int | None]:
    return [request.status for request in proxy.requests()]


def test_every_request_is_logged_with_its_kind(
    proxy: FaultProxy, botocore_client: Any, s3_bucket: str, key: str
) -> None:
    where = {"Bucket": s3_bucket, "Key": key.removeprefix(f"/{s3_bucket}/")}
    part = body_of(PART_BYTES)
    botocore_client.put_object(**where, Body=b"12345")
    assert botocore_client.get_object(**where)["Body"].read() == b"12345"
    assert botocore_client.head_object(**where)["ContentLength"] == 5
    botocore_client.copy_object(Bucket=s3_bucket, Key=where["Key"] + "-copy", CopySource=where)
    botocore_client.list_objects_v2(Bucket=s3_bucket, Prefix=where["Key"])
    upload = {**where, "UploadId": botocore_client.create_multipart_upload(**where)["UploadId"]}
    etags = [botocore_client.upload_part(**upload, PartNumber=number, Body=part)["ETag"] for number in (1, 2)]
    botocore_client.list_parts(**upload)
    botocore_client.list_multipart_uploads(Bucket=s3_bucket)
    parts = [{"ETag": etag, "PartNumber": number} for number, etag in enumerate(etags, start=1)]
    botocore_client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    assert botocore_client.get_object(**where)["Body"].read() == part + part
    upload = {**where, "UploadId": botocore_client.create_multipart_upload(**where)["UploadId"]}
    botocore_client.abort_multipart_upload(**upload)
    botocore_client.delete_object(**where)
    botocore_client.delete_objects(Bucket=s3_bucket, Delete={"Objects": [{"Key": where["Key"] + "-copy"}]})

    assert [request.kind for request in proxy.requests()] == [
        *("PUT", "GET", "HEAD", "COPY", "LIST"),
        *("CREATE_UPLOAD", "UPLOAD_PART", "UPLOAD_PART", "LIST_PARTS", "LIST_UPLOADS", "COMPLETE_UPLOAD"),
        *("GET", "CREATE_UPLOAD", "ABORT_UPLOAD", "DELETE", "DELETE_MANY"),
    ]
    assert proxy.counts()[S3Operation.UPLOAD_PART] == 2
    assert all(status in (200, 204) for status in statuses(proxy))
    assert all(
        request.num_body_bytes >= PART_BYTES for request in proxy.requests() if request.kind == "UPLOAD_PART"
    )
    logged = proxy.requests()[0]
    assert (logged.method, logged.path, logged.query) == ("PUT", key, "")


def test_a_large_body_passes_unchanged(
    proxy: FaultProxy, through: S3Requests, direct: S3Requests, key: str
) -> None:
    body = body_of(64 << 20)
    assert through.send("PUT", key, body=body).status == 200
    expected = hashlib.sha256(body).digest()
    for requests in (direct, through):
        assert hashlib.sha256(requests.send("GET", key).body).digest() == expected
    put, get = proxy.requests()
    assert (put.num_body_bytes, get.num_body_bytes) == (len(body), 0)


def test_connections_are_kept_and_chunked_bodies_end(proxy: FaultProxy, key: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(proxy.endpoint_url).netloc, timeout=10)
    connection.connect()
    first_socket = connection.sock
    try:
        for _ in range(3):
            # Not signed, so refused; the connection goes on behind the end of the body.
            connection.request("PUT", key, body=iter([b"abc", b"defg"]), encode_chunked=True)
            answer = connection.getresponse()
            assert answer.status == 403
            answer.read()
            assert connection.sock is first_socket
    finally:
        connection.close()
    assert statuses(proxy) == [403, 403, 403]


def test_latency_is_added_to_every_request(
    proxy: FaultProxy, through: S3Requests, botocore_client: Any, s3_bucket: str
) -> None:
    botocore_client.head_bucket(Bucket=s3_bucket)
    proxy.set_faults(link=Link(latency_up_seconds=0.2, latency_down_seconds=0.1))
    start = time.monotonic()
    botocore_client.head_bucket(Bucket=s3_bucket)
    kept_seconds = time.monotonic() - start
    through.send("HEAD", f"/{s3_bucket}")
    new_seconds = time.monotonic() - start - kept_seconds
    assert kept_seconds >= 0.3
    assert new_seconds >= 0.6


def test_a_bandwidth_is_kept_in_both_directions(proxy: FaultProxy, through: S3Requests, key: str) -> None:
    rate = 2.5e6
    body = body_of(4 << 20)
    proxy.set_faults(link=Link(bytes_per_second=rate))
    for method, sent in (("PUT", body), ("GET", b"")):
        start = time.monotonic()
        assert through.send(method, key, body=sent).status == 200
        measured = len(body) / (time.monotonic() - start)
        assert 0.7 * rate < measured < 1.3 * rate


@pytest.mark.parametrize("after_body_bytes", [0, 100_000])
def test_a_request_that_is_cut_has_no_effect(
    proxy: FaultProxy, through: S3Requests, direct: S3Requests, key: str, after_body_bytes: int
) -> None:
    cut = Reset(after_body_bytes=after_body_bytes)
    proxy.set_faults(nth(1, cut, kind=S3Operation.PUT))
    with pytest.raises(LOST):
        through.send("PUT", key, body=body_of(1 << 20))
    assert direct.send("GET", key).status == 404
    assert proxy.requests() == [
        Request(
            method="PUT",
            path=key,
            query="",
            kind=S3Operation.PUT,
            num_body_bytes=after_body_bytes,
            status=None,
        )
    ]
    assert through.send("PUT", key, body=b"again").status == 200


def test_a_lost_answer_leaves_the_effect(
    proxy: FaultProxy, through: S3Requests, direct: S3Requests, key: str
) -> None:
    proxy.set_faults(first(1, LoseAnswer()))
    create = {"If-None-Match": "*"}
    with pytest.raises(LOST):
        through.send("PUT", key, headers=create, body=b"first")
    assert direct.send("GET", key).body == b"first"
    assert through.send("PUT", key, headers=create, body=b"second").status == 412
    assert statuses(proxy) == [200, 412]


def test_an_answer_can_be_cut_in_its_body(
    proxy: FaultProxy, through: S3Requests, direct: S3Requests, key: str
) -> None:
    direct.send("PUT", key, body=body_of(1 << 20))
    proxy.set_faults(nth(1, LoseAnswer(after_body_bytes=1000), kind=S3Operation.GET))
    with pytest.raises(LOST):
        through.send("GET", key)
    assert through.send("GET", key).body == body_of(1 << 20)


def test_slow_down_is_what_clients_take_for_it(
    proxy: FaultProxy, botocore_client: Any, direct: S3Requests, s3_bucket: str, key: str
) -> None:
    where = {"Bucket": s3_bucket, "Key": key.removeprefix(f"/{s3_bucket}/")}
    proxy.set_faults(first(1, SLOW_DOWN, kind=S3Operation.PUT))
    with pytest.raises(ClientError) as caught:
        botocore_client.put_object(**where, Body=body_of(1 << 20))
    assert caught.value.response["Error"]["Code"] == "SlowDown"
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 503
    assert direct.send("GET", key).status == 404
    botocore_client.put_object(**where, Body=b"x")
    assert statuses(proxy) == [503, 200]


def test_errors_strike_every_nth_and_the_numbers_start_anew(
    proxy: FaultProxy, through: S3Requests, s3_bucket: str, key: str
) -> None:
    proxy.set_faults(every_nth(2, INTERNAL_ERROR))
    answers = [through.send("PUT", key, body=b"x") for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 500, 200, 500]
    assert answers[1].error_code == "InternalError"
    assert through.send("HEAD", key).status == 200
    assert through.send("HEAD", key).status == 500
    proxy.set_faults(every_nth(2, INTERNAL_ERROR))
    assert through.send("PUT", key, body=b"x").status == 200


def test_a_request_that_hangs_ends_with_the_patience_of_the_client(
    proxy: FaultProxy, botocore_client: Any, direct: S3Requests, s3_bucket: str, key: str
) -> None:
    where = {"Bucket": s3_bucket, "Key": key.removeprefix(f"/{s3_bucket}/")}
    proxy.set_faults(first(1, Hang()))
    with pytest.raises(ReadTimeoutError):
        botocore_client.put_object(**where, Body=b"x")
    assert direct.send("GET", key).status == 404
    assert statuses(proxy) == [None]
    botocore_client.put_object(**where, Body=b"x")


@pytest.mark.parametrize("answer", [False, True], ids=["request", "answer"])
def test_a_request_is_held_until_it_is_released(
    proxy: FaultProxy, through: S3Requests, direct: S3Requests, key: str, answer: bool
) -> None:
    released = threading.Event()
    arrived = threading.Event()
    found: list[int] = []

    def hold(arrival: Arrival) -> Fault:
        arrived.set()
        return Hold(released=released, answer=answer)

    proxy.set_faults(hold)
    thread = threading.Thread(target=lambda: found.append(through.send("PUT", key, body=b"x").status))
    thread.start()
    try:
        assert arrived.wait(10)
        if answer:
            assert eventually(lambda: direct.send("GET", key).status == 200, timeout_seconds=10)
        assert direct.send("GET", key).status == (200 if answer else 404)
        assert found == []
    finally:
        released.set()
        thread.join(10)
    assert found == [200]
    assert direct.send("GET", key).body == b"x"


def test_a_connection_is_reset_when_it_has_carried_enough(
    proxy: FaultProxy, botocore_client: Any, s3_bucket: str, key: str
) -> None:
    where = {"Bucket": s3_bucket, "Key": key.removeprefix(f"/{s3_bucket}/")}
    proxy.set_faults(first(1, Reset()))
    with pytest.raises(ConnectionClosedError):
        botocore_client.head_bucket(Bucket=s3_bucket)
    # From here on a new connection, whose bytes are counted from nothing.
    proxy.set_faults(link=Link(reset_after_bytes_up=250_000))
    proxy.reset_log()
    body = body_of(100_000)
    botocore_client.put_object(**where, Body=body)
    botocore_client.put_object(**where, Body=body)
    with pytest.raises(ConnectionClosedError):
        botocore_client.put_object(**where, Body=body)
    botocore_client.put_object(**where, Body=body)
    assert statuses(proxy) == [200, 200, None, 200]
    assert 0 < proxy.requests()[2].num_body_bytes < 50_000


def test_a_server_that_is_down_is_a_lost_connection() -> None:
    # Bound, so that nobody else gets the port; not listening, so that connections are refused.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with FaultProxy(f"http://127.0.0.1:{taken.getsockname()[1]}") as proxy:
            requests = S3Requests(
                endpoint_url=proxy.endpoint_url, access_key="a", secret_key="b", region="us-east-1"
            )
            with pytest.raises(LOST):
                requests.send("GET", "/bucket/key")
            assert statuses(proxy) == [None]


def test_closing_ends_what_hangs(s3_server: S3Server) -> None:
    hanging = threading.Event()

    def hang(arrival: Arrival) -> Fault:
        hanging.set()
        return Hang()

    decide: Decide = hang
    proxy = FaultProxy(s3_server.endpoint_url, decide=decide)
    requests = replace(s3_server.requests(), endpoint_url=proxy.endpoint_url)
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            requests.send("GET", "/bucket/key")
        except BaseException as error:
            raised.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert hanging.wait(10)
    proxy.close()
    asking.join(10)
    assert not asking.is_alive()
    assert isinstance(raised[0], LOST)
    with pytest.raises(ConnectionRefusedError):
        requests.send("GET", "/bucket/key")
    proxy.close()
