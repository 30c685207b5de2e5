"""Object storage while the network and the store fail: right bytes in the end, or an error in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from dcp_ckpt.errors import StorageError, StorageExists, StorageTransient
from dcp_ckpt.storage.base import ByteRange
from dcp_ckpt.storage.objects.opening import open_object_storage
from dcp_ckpt.storage.objects.retry import RetryPolicy
from dcp_ckpt.storage.objects.s3 import AnswerTimes
from dcp_ckpt.storage.objects.storage import ObjectStorage
from dcp_ckpt.testing.fault_proxy import FaultProxy
from dcp_ckpt.testing.proxy_faults import (
    INTERNAL_ERROR,
    SLOW_DOWN,
    Answer,
    Arrival,
    Decide,
    Fault,
    Hang,
    LoseAnswer,
    Reset,
    first,
)
from dcp_ckpt.testing.s3_operations import S3Operation
from dcp_ckpt.testing.s3_server import S3Server
from dcp_ckpt.testing.storage_write_suite import read_all_ranges

PATIENT = RetryPolicy(deadline_seconds=60.0, first_delay_seconds=0.01, most_delay_seconds=0.05)
ONCE = RetryPolicy(deadline_seconds=0.0)
LARGE_BYTES = 16 << 20  # two parts
DENIED = Answer(status=403, code="AccessDenied")

FAULTS: dict[str, Fault] = {
    "503": SLOW_DOWN,
    "500": INTERNAL_ERROR,
    "reset before": Reset(),
    "reset in the body": Reset(after_body_bytes=2),
    "reset after the body": Reset(after_body_bytes=1 << 40),
    "answer lost": LoseAnswer(),
    "answer cut": LoseAnswer(after_body_bytes=2),
}


@pytest.fixture(scope="module")
def shared_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultProxy, s3_environment: dict[str, str], monkeypatch) -> FaultProxy:
    """Without faults, with an empty log, and where the environment leads to."""
    shared_proxy.set_faults()
    shared_proxy.reset_log()
    monkeypatch.setenv("AWS_ENDPOINT_URL", shared_proxy.endpoint_url)
    return shared_proxy


@pytest.fixture
def opened(s3_prefix: str, proxy: FaultProxy) -> Iterator[Callable[..., ObjectStorage]]:
    """Opens the same empty place with other settings; closes what was opened."""
    storages: list[ObjectStorage] = []

    def open_it(retry: RetryPolicy = PATIENT, answer_times: AnswerTimes | None = None) -> ObjectStorage:
        storages.append(open_object_storage(s3_prefix, retry=retry, answer_times=answer_times))
        return storages[-1]

    yield open_it
    proxy.set_faults()
    for storage in storages:
        storage.close()


@pytest.fixture
def storage(opened: Callable[..., ObjectStorage]) -> ObjectStorage:
    return opened()


@pytest.fixture(scope="module")
def large() -> memoryview:
    return memoryview(bytes(range(256)) * (LARGE_BYTES // 256))


def upload(storage: ObjectStorage, key: str, data: memoryview) -> None:
    writer = storage.open_writer(key, size_bytes=len(data), direct=False)
    try:
        for start in range(0, len(data), writer.segment_bytes):
            writer.write_segment(start, data[start : start + writer.segment_bytes])
        writer.finish()
    except BaseException:
        writer.abort()
        raise


def unfinished(storage: ObjectStorage) -> list[str]:
    """Keys of uploads that were neither completed nor aborted."""
    keys: list[str] = []

    def look(key: str) -> bool:
        keys.append(key)
        return False

    storage.abort_uploads("", look)
    return keys


def twice(fault: Fault) -> Decide:
    """The first two requests of every kind."""
    return lambda arrival: fault if arrival.kind_number <= 2 else None


def untouched(proxy: FaultProxy, kinds: set[str], fault: Fault) -> set[str]:
    """Of `kinds`, what never met the fault: it would have been asked at least three times."""
    if fault == FAULTS["answer cut"]:
        kinds = kinds - {"HEAD", "DELETE", "ABORT_UPLOAD", "UPLOAD_PART"}  # there is nothing to cut
    return {kind for kind in kinds if proxy.counts()[S3Operation(kind)] <= 2}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_every_operation_succeeds_in_the_end(storage, proxy, fault):
    proxy.set_faults(twice(fault))
    for key in ("a", "b", "c", "d/e"):
        storage.create_exclusive(key, key.encode() * 3)
    storage.put("a", b"replaced")
    assert storage.read("a") == b"replaced"
    assert storage.size("d/e") == 9
    ranges = [ByteRange(key=key, offset=1, num_bytes=2) for key in ("b", "c")]
    assert read_all_ranges(storage, ranges) == [b"bb", b"cc"]
    assert [(info.key, info.size_bytes) for info in storage.list("")] == [
        ("a", 8),
        ("b", 3),
        ("c", 3),
        ("d/e", 9),
    ]
    assert storage.list_names("") == ["a", "b", "c", "d/"]
    storage.delete(["a"])
    storage.delete(["b", "c", "d/e"])
    assert storage.list("") == []
    assert unfinished(storage) == []
    assert not untouched(
        proxy, {"PUT", "GET", "HEAD", "LIST", "DELETE", "DELETE_MANY", "LIST_UPLOADS"}, fault
    )


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_large_objects_arrive_whole_or_not_at_all(storage, proxy, large, fault):
    proxy.set_faults(twice(fault))
    upload(storage, "large", large)
    writer = storage.open_writer("aborted", size_bytes=len(large), direct=False)
    writer.write_segment(0, large[: writer.segment_bytes])
    writer.abort()
    assert not untouched(proxy, {"CREATE_UPLOAD", "UPLOAD_PART", "COMPLETE_UPLOAD", "ABORT_UPLOAD"}, fault)
    proxy.set_faults()
    assert [(info.key, info.size_bytes) for info in storage.list("")] == [("large", len(large))]
    whole = ByteRange(key="large", offset=0, num_bytes=len(large))
    assert read_all_ranges(storage, [whole]) == [large]
    if fault in (SLOW_DOWN, INTERNAL_ERROR, Reset()):
        # Elsewhere an answer that names an upload may be lost; that one stays, without parts.
        assert unfinished(storage) == []


def test_a_lost_answer_does_not_hide_who_created(storage, proxy):
    storage.put("warm", b"so that the next request goes over a kept connection")
    proxy.set_faults(first(1, LoseAnswer(), kind=S3Operation.PUT))
    storage.create_exclusive("ours", b"ours")
    assert storage.read("ours") == b"ours"
    storage.put("theirs", b"theirs")
    proxy.set_faults(first(1, LoseAnswer(), kind=S3Operation.PUT))
    with pytest.raises(StorageExists):
        storage.create_exclusive("theirs", b"ours")
    assert storage.read("theirs") == b"theirs"
    proxy.set_faults()
    # Without a lost answer, equal bytes are somebody else's.
    with pytest.raises(StorageExists):
        storage.create_exclusive("theirs", b"theirs")


def test_nothing_is_sent_again_behind_our_back(opened, proxy):
    """The HTTP client would repeat a PUT whose kept connection breaks, and find its own object in the way."""
    storage = opened(ONCE)
    storage.put("warm", b"so that the next request goes over a kept connection")
    proxy.reset_log()
    proxy.set_faults(first(1, LoseAnswer(), kind=S3Operation.PUT))
    with pytest.raises(StorageTransient):
        storage.create_exclusive("ours", b"ours")
    assert [(request.kind, request.status) for request in proxy.requests()] == [("PUT", 200)]
    assert storage.read("ours") == b"ours"


def test_a_large_object_of_somebody_else_is_not_replaced(storage, proxy, large):
    storage.put("large", b"theirs")
    proxy.set_faults(first(1, LoseAnswer(), kind=S3Operation.COMPLETE_UPLOAD))
    with pytest.raises(StorageExists):
        upload(storage, "large", large)
    assert storage.read("large") == b"theirs"
    assert unfinished(storage) == []


@pytest.mark.parametrize("fault", [SLOW_DOWN, Reset()], ids=["503", "reset"])
def test_a_store_that_stays_down_is_given_up_at_the_deadline(opened, proxy, fault):
    storage = opened(RetryPolicy(deadline_seconds=1.0, first_contact_seconds=0.1, first_delay_seconds=0.05))
    storage.put("a", b"it has answered before")
    proxy.reset_log()
    proxy.set_faults(lambda arrival: fault)
    started = time.monotonic()
    with pytest.raises(StorageTransient, match=r"gave up after [0-9]+ attempts in [0-9]+ s"):
        storage.read("a")
    assert 0.3 < time.monotonic() - started < 5.0
    # 0.05 s doubles at each attempt: it neither hammers nor gives up early.
    # The HTTP client may send a GET twice when the connection breaks.
    assert 3 <= proxy.counts()["GET"] <= 14


def test_silence_counts_as_failure(opened, proxy):
    policy = RetryPolicy(deadline_seconds=1.0, first_delay_seconds=0.05)
    storage = opened(policy, answer_times=AnswerTimes(connect_seconds=1.0, answer_seconds=0.3))
    storage.put("a", b"it has answered before")
    proxy.reset_log()
    proxy.set_faults(lambda arrival: Hang())
    for act in (lambda: storage.read("a"), lambda: storage.create_exclusive("b", b"b")):
        started = time.monotonic()
        with pytest.raises(StorageTransient):
            act()
        assert time.monotonic() - started < 5.0
    assert proxy.counts()["GET"] >= 2
    proxy.set_faults(first(2, Hang()))
    storage.create_exclusive("b", b"b")
    assert storage.read("b") == b"b"


def test_a_lease_is_not_waited_for_as_long_as_data(opened, proxy, caplog):
    storage = opened(RetryPolicy(deadline_seconds=1.0))
    proxy.set_faults(lambda arrival: Hang())
    started = time.monotonic()
    with storage.hold_lease("lease"):
        assert time.monotonic() - started < 10.0, "an answer is waited for up to 30 s"
        assert "a lease is not there yet" in caplog.text
        proxy.set_faults()


def nth_part(number: int, fault: Fault) -> Decide:
    """Whenever part `number` is sent."""

    def decide(arrival: Arrival) -> Fault | None:
        is_it = arrival.kind == "UPLOAD_PART" and f"partNumber={number}" in arrival.query.split("&")
        return fault if is_it else None

    return decide


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_refused_part_leaves_nothing(storage, proxy, large, number):
    proxy.set_faults(nth_part(number, DENIED))
    data = memoryview(bytes(large) + bytes(LARGE_BYTES // 2))
    with pytest.raises(StorageError, match="AccessDenied"):
        upload(storage, "large", data)
    proxy.set_faults()
    assert storage.list("") == []
    assert unfinished(storage) == []
    upload(storage, "large", large)
    assert storage.size("large") == len(large)


@pytest.mark.parametrize("kind", ["CREATE_UPLOAD", "COMPLETE_UPLOAD"])
def test_an_upload_that_cannot_begin_or_end_leaves_nothing(storage, proxy, large, kind):
    proxy.set_faults(first(1, DENIED, kind=S3Operation(kind)))
    with pytest.raises(StorageError, match="AccessDenied"):
        upload(storage, "large", large)
    assert storage.list("") == []
    assert unfinished(storage) == []


@pytest.mark.parametrize("num_segments", [0, 1, 2])
def test_an_aborted_upload_leaves_nothing(storage, proxy, large, num_segments):
    writer = storage.open_writer("large", size_bytes=len(large), direct=False)
    for number in range(num_segments):
        start = number * writer.segment_bytes
        writer.write_segment(start, large[start : start + writer.segment_bytes])
    writer.abort()
    writer.abort()
    assert storage.list("") == []
    assert unfinished(storage) == []
    assert proxy.counts()["ABORT_UPLOAD"] == (num_segments > 0)
    storage.create_exclusive("large", b"the name is free")


def test_an_abort_that_fails_raises_nothing(storage, proxy, large, caplog):
    writer = storage.open_writer("large", size_bytes=len(large), direct=False)
    writer.write_segment(0, large[: writer.segment_bytes])
    proxy.set_faults(lambda arrival: DENIED)
    writer.abort()
    assert "an unfinished upload stays behind" in caplog.text
    proxy.set_faults()
    assert unfinished(storage) == ["large"], "what is left can be found"
    assert storage.abort_uploads("", lambda key: key == "large") == ["large"]
    assert unfinished(storage) == []


def test_what_consume_raises_ends_the_read_and_leaves_the_storage_usable(storage, proxy):
    for number in range(20):
        storage.put(f"{number}", b"data")

    def consume(number: int, data: memoryview) -> None:
        raise ZeroDivisionError

    ranges = [ByteRange(key=f"{number}", offset=0, num_bytes=4) for number in range(20)]
    with pytest.raises(ZeroDivisionError):
        storage.read_ranges(ranges, consume, concurrency=4)
    assert read_all_ranges(storage, ranges, concurrency=4) == [b"data"] * 20
