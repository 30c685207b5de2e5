"""What object storage sends: few requests, many at once, from memory that is not copied, hashed by nobody."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from dcp_ckpt.errors import StorageExists, StorageUnsuitable
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.storage.base import Buffer, ByteRange
from dcp_ckpt.storage.objects.fetch import merge_ranges
from dcp_ckpt.storage.objects.lease import LeaseTimes
from dcp_ckpt.storage.objects.retry import RetryingClient, RetryPolicy
from dcp_ckpt.storage.objects.s3 import AnswerTimes, S3Client
from dcp_ckpt.storage.objects.storage import ObjectStorage
from dcp_ckpt.testing.fault_proxy import FaultProxy
from dcp_ckpt.testing.proxy_faults import Answer, Arrival, Fault, Link
from dcp_ckpt.testing.s3_server import S3Server
from dcp_ckpt.testing.storage_write_suite import read_all_ranges

MIB = 1 << 20
IN_FLIGHT = 16
LARGE_BYTES = 32 * MIB  # four parts

# Prints how much the most resident memory grew, in bytes, while it wrote 256 MiB, while it read them, and
# while it read them into memory of its own.
MEMORY_PROGRAM = """\
import mmap, sys
from pathlib import Path
from dcp_ckpt.storage import ByteRange, open_storage

SIZE = 256 << 20
RANGE = 4 << 20

def most_resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

def growth(act):
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident
    before = most_resident()
    act()
    return most_resident() - before

def write():
    writer = storage.open_writer("large", size_bytes=SIZE, direct=False)
    for start in range(0, SIZE, writer.segment_bytes):
        writer.write_segment(start, arena[start : start + writer.segment_bytes])
    writer.finish()

def read():
    found = []
    ranges = [ByteRange(key="large", offset=start, num_bytes=RANGE) for start in range(0, SIZE, RANGE)]
    storage.read_ranges(ranges, lambda number, data: found.append(len(data)), concurrency=4)
    assert sum(found) == SIZE

def read_into():
    def offer(start):
        part = target[start : start + RANGE]
        return ByteRange(key="large", offset=start, num_bytes=RANGE, into=lambda: [part])

    ranges = [offer(start) for start in range(0, SIZE, RANGE)]
    storage.read_ranges(ranges, lambda number, data: None, concurrency=4)
    assert target == arena

mapped = mmap.mmap(-1, SIZE)
mapped.write(b"\\x5a" * SIZE)
arena = memoryview(mapped)
storage = open_storage(sys.argv[1])
storage.put("warm", b"imports and connections are not what is measured")
print(growth(write), growth(read))
target = memoryview(bytearray(b"\\xff" * SIZE))
print(growth(read_into))
storage.close()
"""


@pytest.fixture
def proxy(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_environment["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        yield proxy


@pytest.fixture
def storage(proxy: FaultProxy, s3_prefix: str) -> Iterator[Storage]:
    with closing(open_storage(s3_prefix)) as storage:
        yield storage


def upload(storage: Storage, key: str, num_bytes: int) -> bytes:
    data = random.Random(num_bytes).randbytes(MIB) * (num_bytes // MIB)
    writer = storage.open_writer(key, size_bytes=num_bytes, direct=False)
    for start in range(0, num_bytes, writer.segment_bytes):
        writer.write_segment(start, memoryview(data)[start : start + writer.segment_bytes])
    writer.finish()
    return data


def most_at_once(proxy: FaultProxy, kind: str) -> Callable[[], int]:
    """Watches requests on a slow network: how many of `kind` are under way at the same moment, at most."""
    under_way: list[int] = []

    def watch(arrival: Arrival) -> Fault | None:
        if arrival.kind == kind:
            num_ended = sum(request.kind == kind for request in proxy.requests())
            under_way.append(arrival.kind_number - num_ended)
        return None

    proxy.reset_log()
    proxy.set_faults(watch, link=Link(latency_up_seconds=0.5, latency_down_seconds=0.5))
    return lambda: max(under_way)


def test_reads_are_merged_and_run_at_once(storage, proxy):
    data = upload(storage, "large", LARGE_BYTES)
    near = [ByteRange(key="large", offset=start, num_bytes=4096) for start in range(0, 4 * MIB, 64 << 10)]
    assert read_all_ranges(storage, near, concurrency=2) == [
        data[item.offset : item.offset + item.num_bytes] for item in near
    ]
    far = [ByteRange(key="large", offset=number * 2 * MIB, num_bytes=MIB // 2) for number in range(IN_FLIGHT)]
    at_once = most_at_once(proxy, "GET")
    assert read_all_ranges(storage, far, concurrency=2) == [
        data[item.offset : item.offset + item.num_bytes] for item in far
    ]
    # Some go over kept connections, and end about when the others have theirs.
    assert at_once() > IN_FLIGHT // 2
    assert proxy.counts()["GET"] == len(merge_ranges(far)) == IN_FLIGHT
    proxy.set_faults()
    proxy.reset_log()
    read_all_ranges(storage, near, concurrency=2)
    assert proxy.counts() == {"GET": len(merge_ranges(near))}
    assert len(merge_ranges(near)) == 1


def test_parts_go_up_at_once(storage, proxy):
    at_once = most_at_once(proxy, "UPLOAD_PART")
    upload(storage, "large", LARGE_BYTES)
    assert at_once() >= 3
    assert proxy.counts() == {"CREATE_UPLOAD": 1, "UPLOAD_PART": 4, "COMPLETE_UPLOAD": 1}


def test_memory_is_bounded_and_the_arena_is_not_copied(s3_prefix):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEMORY_PROGRAM, s3_prefix],
        stdout=subprocess.PIPE,
        text=True,
        timeout=100,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    written, read, read_into = map(int, done.stdout.split())
    assert written < 32 * MIB, "parts are sent from the arena"
    assert read < IN_FLIGHT * 8 * MIB + 32 * MIB, "fetches in flight, and no more"
    assert read_into < 16 * MIB, "answers arrive where they belong"


def test_payloads_are_not_hashed_again(storage, proxy):
    upload(storage, "large", 16 * MIB)
    storage.create_exclusive("small", b"12345")
    storage.put("small", b"12345")
    bodies = [request for request in proxy.requests() if request.kind in ("PUT", "UPLOAD_PART")]
    assert [request.num_body_bytes for request in bodies if request.kind == "PUT"] == [5, 5]
    assert [request.num_body_bytes for request in bodies if request.kind == "UPLOAD_PART"] == [8 * MIB] * 2
    for request in bodies:
        assert request.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
        hashes = [
            name for name in request.headers if "checksum" in name or name in ("content-md5", "x-amz-trailer")
        ]
        assert not hashes
        assert "authorization" not in request.headers, "the log holds no signature"


def test_listings_and_deletions_come_in_pages(storage, proxy):
    names = [f"{number:04}" for number in range(1100)]  # a page and a batch hold 1000
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        list(pool.map(lambda name: storage.put(f"many/{name}", b"1"), names))
    proxy.reset_log()
    assert [info.key for info in storage.list("")] == [f"many/{name}" for name in names]
    assert storage.list_names("many/") == names
    assert proxy.counts() == {"LIST": 4}
    storage.delete([f"many/{name}" for name in names])
    assert proxy.counts()["DELETE_MANY"] == 2
    assert storage.list("") == []


def test_prefixes_may_hold_what_urls_quote(proxy, s3_prefix):
    with closing(open_storage(f"{s3_prefix}/my run+é&x=1 %41#?")) as storage:
        data = upload(storage, "a b/large", 16 * MIB)
        storage.create_exclusive("a+b", b"small")
        assert [info.key for info in storage.list("")] == ["a b/large", "a+b"]
        assert storage.list_names("") == ["a b/", "a+b"]
        assert storage.size("a b/large") == len(data)
        writer = storage.open_writer("a b/aborted", size_bytes=16 * MIB, direct=False)
        writer.write_segment(0, memoryview(data)[: 8 * MIB])
        assert storage.abort_uploads("", lambda key: key == "a b/aborted") == ["a b/aborted"]
        writer.abort()
        storage.delete(["a b/large", "a+b"])
        assert storage.list("") == []


class IgnoringClient(S3Client):
    """Like the gateways that accept `If-None-Match: *` and do not look at it."""

    async def put(self, key: str, data: Buffer, *, only_if_absent: bool) -> None:
        await super().put(key, data, only_if_absent=False)


def stored(server: S3Server, url: str) -> bytes:
    """The listing of everything below `url`, hidden names too."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return server.requests().send("GET", f"/{bucket}", query={"list-type": "2", "prefix": prefix}).body


def test_a_store_that_ignores_conditions_is_refused(s3_prefix, s3_server):
    bucket, _, prefix = s3_prefix.removeprefix("s3://").partition("/")
    client = RetryingClient(IgnoringClient(bucket, prefix, AnswerTimes()), RetryPolicy())
    storage = ObjectStorage(client, client, url=s3_prefix, single_writer=False, lease_times=LeaseTimes())
    with closing(storage):
        with pytest.raises(StorageUnsuitable, match=r"s3\+single-writer://") as caught:
            storage.require_exclusive_create()
        assert "ignores it" in caught.value.message
    assert b"<Key>" not in stored(s3_server, s3_prefix)


def test_a_store_that_keeps_conditions_is_probed_once(storage, proxy, s3_prefix, s3_server):
    storage.require_exclusive_create()
    num_requests = len(proxy.requests())
    storage.require_exclusive_create()
    assert len(proxy.requests()) == num_requests == 3
    assert b"<Key>" not in stored(s3_server, s3_prefix)


def refuse_conditions(arrival: Arrival) -> Fault | None:
    return Answer(status=501, code="NotImplemented") if "if-none-match" in arrival.headers else None


def test_a_store_that_refuses_conditions_needs_the_opt_in(storage, proxy, s3_prefix):
    proxy.set_faults(refuse_conditions)
    with pytest.raises(StorageUnsuitable, match=r"s3\+single-writer://"):
        storage.require_exclusive_create()
    with closing(open_storage(s3_prefix.replace("s3://", "s3+single-writer://"))) as single:
        single.require_exclusive_create()
        single.create_exclusive("small", b"first")
        data = upload(single, "large", 16 * MIB)
        with pytest.raises(StorageExists):
            single.create_exclusive("small", b"second")
        with pytest.raises(StorageExists):
            upload(single, "large", 16 * MIB)
        with pytest.raises(StorageExists):
            upload(single, "small", MIB)
        assert single.read("small") == b"first"
        assert single.read("large") == data
