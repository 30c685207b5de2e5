"""Local files: the suite on every kind of file system, races of processes, crashes, full disks."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from dcp_ckpt.errors import (
    ConfigError,
    StorageError,
    StorageExists,
    StorageFull,
    StorageNotFound,
    StorageTransient,
    StorageUnsuitable,
)
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.storage.base import ByteRange
from dcp_ckpt.storage.keys import is_temporary
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.storage.system_calls import SystemCalls, start_writeback
from dcp_ckpt.testing.storage_suite import StorageSuite
from dcp_ckpt.testing.storage_write_suite import PAGE_BYTES, read_all_ranges

NUM_PROCESSES = 16


def refuse(code: int) -> Callable[..., NoReturn]:
    """A system call that this file system does not do."""

    def call(*arguments: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return call


def refuse_direct(fd: int, direct: bool) -> None:
    if direct:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def write_nothing_directly(fd: int, data: memoryview, offset: int) -> int:
    if is_direct(fd):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return os.pwrite(fd, data, offset)


NO_LINK = SystemCalls(link=refuse(errno.EPERM))
NO_ATOMIC_WAY = SystemCalls(link=refuse(errno.ENOTSUP), rename_without_replacing=refuse(errno.EINVAL))


class TestLocalStorage(StorageSuite):
    calls = SystemCalls()
    single_writer = False

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[Storage]:
        storage = LocalStorage(tmp_path / "deep/root", calls=self.calls, single_writer=self.single_writer)
        num_open = len(os.listdir("/proc/self/fd"))
        yield storage
        storage.close()
        assert len(os.listdir("/proc/self/fd")) == num_open

    def reopen(self, storage: Storage) -> Storage:
        # Without an atomic way one writer object is all that is promised.
        return storage if self.single_writer else open_storage(storage.url)


class TestWithoutHardLinks(TestLocalStorage):
    calls = NO_LINK


class TestWithoutAnyAtomicWay(TestLocalStorage):
    calls = NO_ATOMIC_WAY
    single_writer = True


class TestWithoutDirectIoAndReservation(TestLocalStorage):
    calls = SystemCalls(set_direct=refuse_direct, reserve_space=refuse(errno.ENOTSUP))


class TestDirectWritesRefused(TestLocalStorage):
    calls = SystemCalls(pwrite=write_nothing_directly)


class TestShortWrites(TestLocalStorage):
    calls = SystemCalls(pwrite=lambda fd, data, offset: os.pwrite(fd, data[:1000], offset))


# Exclusive creation.

CHILD = """
import sys
from dcp_ckpt.errors import StorageExists
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.storage.system_calls import SystemCalls
root, number, without_links = sys.argv[1:]
def no_link(source, target):
    raise PermissionError(1, "refused")
calls = SystemCalls(link=no_link) if int(without_links) else SystemCalls()
storage = LocalStorage(root, calls=calls)
"""
RACER = (
    CHILD
    + """
print("ready", flush=True)
sys.stdin.read()
try:
    storage.create_exclusive("manifest.json", number.encode() * 100_000)
    print("won")
except StorageExists:
    print("lost")
"""
)


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.parametrize("without_links", [0, 1], ids=["link", "rename"])
def test_one_of_many_processes_creates(tmp_path: Path, without_links: int) -> None:
    racers = [start(RACER, tmp_path, number, without_links) for number in range(NUM_PROCESSES)]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.close()
        results = [racer.stdout.read() for racer in racers if racer.stdout is not None]
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
            for stream in (racer.stdin, racer.stdout):
                assert stream is not None
                stream.close()
    assert sorted(results) == ["lost\n"] * (NUM_PROCESSES - 1) + ["won\n"]
    winner = results.index("won\n")
    assert (tmp_path / "manifest.json").read_bytes() == str(winner).encode() * 100_000
    assert os.listdir(tmp_path) == ["manifest.json"]


KILLED = """
import os, signal, sys
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.storage.system_calls import SystemCalls
def die(source, target):
    os.kill(os.getpid(), signal.SIGKILL)
LocalStorage(sys.argv[1], calls=SystemCalls(link=die)).create_exclusive("manifest.json", b"whole")
"""


def test_a_kill_before_the_publish_leaves_a_whole_temporary_file_and_no_name(tmp_path: Path) -> None:
    child = start(KILLED, tmp_path)
    with child:
        child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    storage = LocalStorage(tmp_path)
    (name,) = storage.list_names("")
    assert is_temporary(name)
    assert name.startswith(".manifest.json.")
    assert storage.read(name) == b"whole"
    storage.create_exclusive("manifest.json", b"again")
    storage.delete([name])
    assert storage.list_names("") == ["manifest.json"]


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.EIO, "broken"), StorageTransient),
        (OSError(errno.ETIMEDOUT, "no answer"), StorageTransient),
        (OSError(errno.EDQUOT, "quota"), StorageFull),
    ],
    ids=["interrupt", "device", "network", "quota"],
)
def test_a_failed_publish_leaves_nothing(
    tmp_path: Path, failure: BaseException, expected: type[BaseException]
) -> None:
    def fail(source: str, target: str) -> None:
        raise failure

    storage = LocalStorage(tmp_path, calls=SystemCalls(link=fail))
    with pytest.raises(expected):
        storage.create_exclusive("a", b"x")
    assert os.listdir(tmp_path) == []


def test_a_repeated_request_is_not_taken_for_a_rival(tmp_path: Path) -> None:
    def link_and_lose_the_answer(source: str, target: str) -> None:
        os.link(source, target)
        raise FileExistsError(errno.EEXIST, "exists")

    storage = LocalStorage(tmp_path, calls=SystemCalls(link=link_and_lose_the_answer))
    storage.create_exclusive("a", b"x")
    assert os.listdir(tmp_path) == ["a"]
    with pytest.raises(StorageExists):
        storage.create_exclusive("a", b"y")


def test_a_file_system_without_an_atomic_way_is_refused(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, calls=NO_ATOMIC_WAY)
    with pytest.raises(StorageUnsuitable, match="single_writer"):
        storage.create_exclusive("a", b"x")
    assert not storage.capabilities.exclusive_create
    assert os.listdir(tmp_path) == []
    vouched = LocalStorage(tmp_path, calls=NO_ATOMIC_WAY, single_writer=True)
    vouched.create_exclusive("a", b"x")
    assert not vouched.capabilities.exclusive_create


@pytest.mark.parametrize("calls", [SystemCalls(), NO_LINK], ids=["link", "rename"])
def test_capabilities_are_tried_out_and_leave_nothing(tmp_path: Path, calls: SystemCalls) -> None:
    missing = LocalStorage(tmp_path / "missing", calls=calls)
    assert missing.capabilities.exclusive_create
    assert os.listdir(tmp_path) == []
    storage = LocalStorage(tmp_path, calls=calls)
    assert storage.capabilities.exclusive_create
    assert storage.capabilities.directories
    assert storage.capabilities.lease_ends_with_holder
    assert os.listdir(tmp_path) == []


def test_nothing_is_published_in_a_directory_that_was_moved_away(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.make_directory("step")

    def move_then_link(source: str, target: str) -> None:
        storage.rename_directory("step", "trash/step")
        os.link(source, target)

    late = LocalStorage(tmp_path, calls=SystemCalls(link=move_then_link))
    with pytest.raises(StorageNotFound):
        late.create_exclusive("step/manifest.json", b"x")
    assert storage.list_names("") == ["trash/"]


def test_bytes_are_read_into_the_memory_that_is_offered(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("a", b"0123456789")
    left, right = bytearray(4), bytearray(3)
    offered = ByteRange(
        key="a", offset=2, num_bytes=7, into=lambda: [memoryview(left), memoryview(b""), memoryview(right)]
    )
    assert read_all_ranges(storage, [offered]) == [b""]
    assert (bytes(left), bytes(right)) == (b"2345", b"678")


# Where the root is not what it should be.


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    root = tmp_path / "missing"
    storage = LocalStorage(root)
    for read in (
        lambda: storage.read("a"),
        lambda: storage.size("a"),
        lambda: storage.read_ranges(
            [ByteRange(key="a", offset=0, num_bytes=1)], lambda *_: None, concurrency=1
        ),
    ):
        with pytest.raises(StorageNotFound, match=f"no storage at {root}"):
            read()
    assert not root.exists()


def test_a_root_below_a_file_is_refused_with_path_and_errno(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    storage = LocalStorage(tmp_path / "file/run")
    for write in (
        lambda: storage.put("a", b""),
        lambda: storage.make_directory("a"),
        lambda: storage.open_writer("a", size_bytes=0, direct=False),
        lambda: storage.hold_lease("a"),
    ):
        with pytest.raises(StorageError) as caught:
            write()
        assert caught.value.errno == errno.ENOTDIR
        assert str(tmp_path / "file/run/a") in str(caught.value)


UNPRIVILEGED = """
import os, pickle, sys
from dcp_ckpt.storage.local import LocalStorage
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    LocalStorage(sys.argv[1]).put("a", b"x")
except Exception as error:
    sys.stdout.write(pickle.dumps(error).hex())
"""


def test_a_root_that_may_not_be_written_is_refused_with_path_and_errno(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    root.chmod(0o500)
    child = start(UNPRIVILEGED, root)
    with child:
        output, _ = child.communicate(timeout=60)
    error = pickle.loads(bytes.fromhex(output))
    assert type(error) is StorageError
    assert error.errno == errno.EACCES
    assert str(root / "a") in str(error)
    assert "permissions" in str(error)


# Space.


def test_too_little_space_is_found_before_writing(tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    needed = usage.total + (1 << 40)
    with pytest.raises(StorageFull, match=f"{needed} bytes needed, [0-9]+ bytes free"):
        LocalStorage(tmp_path).open_writer("a", size_bytes=needed, direct=True)
    assert os.listdir(tmp_path) == []


def test_a_quota_is_found_before_writing(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, calls=SystemCalls(reserve_space=refuse(errno.EDQUOT)))
    with pytest.raises(StorageFull, match="quota"):
        storage.open_writer("a", size_bytes=PAGE_BYTES, direct=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_is_never_finished(tmp_path: Path, code: int) -> None:
    storage = LocalStorage(tmp_path, calls=SystemCalls(pwrite=refuse(code)))
    writer = storage.open_writer("a", size_bytes=PAGE_BYTES, direct=False)
    expected = StorageFull if code == errno.ENOSPC else StorageError
    with pytest.raises(expected, match="cannot write"):
        writer.write_segment(0, memoryview(bytes(PAGE_BYTES)))
    for _ in range(2):
        with pytest.raises(StorageError, match="earlier write failed"):
            writer.finish()
    writer.abort()
    assert os.listdir(tmp_path) == []


FULL_DISK = """
import sys
from dcp_ckpt.errors import StorageFull
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.storage.system_calls import SystemCalls
def unsupported(fd, size_bytes):
    raise OSError(95, "unsupported")
MIB = 1 << 20
storage = LocalStorage(sys.argv[1])
storage.put("small", b"x")
def must_be_full(write):
    try:
        write()
    except StorageFull:
        return
    sys.exit("found room")
must_be_full(lambda: storage.put("small", bytes(3 * MIB)))
must_be_full(lambda: storage.create_exclusive("large", bytes(3 * MIB)))
first = storage.open_writer("first", size_bytes=3 * MIB // 2, direct=False)
must_be_full(lambda: storage.open_writer("second", size_bytes=MIB, direct=False))
first.abort()
blind = LocalStorage(sys.argv[1], calls=SystemCalls(reserve_space=unsupported))
writers = [blind.open_writer(name, size_bytes=3 * MIB // 2, direct=False) for name in ("a", "b")]
writers[0].write_segment(0, memoryview(bytes(3 * MIB // 2)))
must_be_full(lambda: writers[1].write_segment(0, memoryview(bytes(3 * MIB // 2))))
writers[1].abort()
writers[0].finish()
assert storage.read("small") == b"x"
assert storage.list_names("") == ["a", "small"], storage.list_names("")
print("done")
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    # A mount of its own, gone with the child.
    mount = 'mount -t tmpfs -o size=2m none "$1" && exec "$2" -c "$3" "$1"'
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*inside, "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True).returncode
    ):
        pytest.skip("no private mounts here")
    child = subprocess.run(
        [*inside, "sh", "-c", mount, "sh", tmp_path, sys.executable, FULL_DISK],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (child.stdout, child.stderr) == ("done\n", "")


# Large files.


def test_aligned_parts_bypass_the_page_cache_and_the_rest_does_not(tmp_path: Path) -> None:
    writes: list[tuple[int, int, bool]] = []

    def record(fd: int, data: memoryview, offset: int) -> int:
        writes.append((offset, len(data), is_direct(fd)))
        return os.pwrite(fd, data, offset)

    storage = LocalStorage(tmp_path, calls=SystemCalls(pwrite=record))
    if not storage.capabilities.direct_io:
        pytest.skip("no direct I/O here")
    with mmap.mmap(-1, 4 * PAGE_BYTES) as memory, memoryview(memory) as data:
        writer = storage.open_writer("a", size_bytes=9 * PAGE_BYTES + 1, direct=True)
        writer.write_segment(0, data)
        writer.write_segment(4 * PAGE_BYTES, data[: 2 * PAGE_BYTES + 5])
        writer.write_segment(7 * PAGE_BYTES, data[: 2 * PAGE_BYTES])
        writer.write_segment(9 * PAGE_BYTES, data[:1])
        writer.finish()
    assert writes == [
        (0, 4 * PAGE_BYTES, True),
        (4 * PAGE_BYTES, 2 * PAGE_BYTES, True),
        (6 * PAGE_BYTES, 5, False),
        (7 * PAGE_BYTES, 2 * PAGE_BYTES, True),
        (9 * PAGE_BYTES, 1, False),
    ]


def test_a_file_that_shrank_is_not_finished(tmp_path: Path) -> None:
    writer = LocalStorage(tmp_path).open_writer("a", size_bytes=100, direct=False)
    writer.write_segment(0, memoryview(bytes(100)))
    os.truncate(tmp_path / "a", 99)
    with pytest.raises(StorageError, match="99 of 100 bytes"):
        writer.finish()
    writer.abort()
    assert os.listdir(tmp_path) == []


def test_files_are_closed_as_soon_as_their_ranges_are_read(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for number in range(100):
        storage.put(f"{number:03d}", b"x")
    ranges = [ByteRange(key=f"{number:03d}", offset=0, num_bytes=1) for number in range(100)]
    num_open: list[int] = []
    storage.read_ranges(ranges, lambda *_: num_open.append(len(os.listdir("/proc/self/fd"))), concurrency=4)
    assert max(num_open) - min(num_open) < 20


# Links.


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.write_bytes(b"outside")
    storage = LocalStorage(root)
    for name in ("a", "b", "c", "d"):
        (root / name).symlink_to(outside)
    with pytest.raises(StorageExists):
        storage.create_exclusive("a", b"x")
    with pytest.raises(StorageExists):
        storage.open_writer("b", size_bytes=0, direct=False)
    with pytest.raises(StorageError) as caught:
        storage.hold_lease("c")
    assert caught.value.errno == errno.ELOOP
    storage.put("d", b"x")
    assert storage.read("d") == b"x"
    assert outside.read_bytes() == b"outside"


def test_a_loop_of_links_is_listed_once(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("a/b", b"x")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "a/dangling").symlink_to(tmp_path / "missing")
    assert [info.key for info in storage.list("")] == ["a/b"]
    assert storage.list_names("a/") == ["b", "loop/"]


# Leases.

HOLDER = (
    CHILD
    + """
with storage.hold_lease("epochs/1.lease"):
    print("held", flush=True)
    sys.stdin.read()
"""
)


@pytest.mark.parametrize("end", ["close", "kill"])
def test_a_lease_ends_with_its_process_however_that_ends(tmp_path: Path, end: str) -> None:
    storage = LocalStorage(tmp_path)
    with start(HOLDER, tmp_path, 0, 0) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert storage.lease_is_held("epochs/1.lease")
        with storage.hold_lease("epochs/1.lease"):
            if end == "kill":
                holder.kill()
            holder.communicate(timeout=60)
            assert storage.lease_is_held("epochs/1.lease")
    assert not storage.lease_is_held("epochs/1.lease")
    assert storage.list_names("epochs/") == ["1.lease"]


# Opening by name.


@pytest.mark.parametrize("name", ["plain", "with space", "100%25", "a?b#c"])
def test_the_url_opens_the_same_place_in_another_process(tmp_path: Path, name: str) -> None:
    for single_writer in (False, True):
        storage = LocalStorage(tmp_path / name, single_writer=single_writer)
        storage.put("a", b"x")
        again = open_storage(storage.url)
        assert again.read("a") == b"x"
        assert again.url == storage.url
        below = open_storage(f"{storage.url}/run-001")
        below.put("b", b"y")
        assert storage.read("run-001/b") == b"y"
    assert open_storage((tmp_path / name).as_uri()).read("a") == b"x"
    assert open_storage(tmp_path / name).read("a") == b"x"


def test_a_relative_path_is_fixed_when_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = open_storage("runs")
    monkeypatch.chdir("/")
    storage.put("a", b"x")
    assert (tmp_path / "runs/a").read_bytes() == b"x"


@pytest.mark.parametrize(
    "url", ["", "s3://", "nosuch://bucket", "s3://bucket/../x", "file://host/x", "file://x"]
)
def test_what_cannot_be_opened_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        open_storage(url)


def test_storage_needs_neither_torch_nor_numpy() -> None:
    script = "import sys, dcp_ckpt.storage.local; print({'torch', 'numpy', 'fsspec'} & set(sys.modules))"
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert output.stdout == "set()\n"


@pytest.mark.parametrize("refusal", [None, errno.ENOSYS, errno.EINVAL], ids=str)
def test_what_goes_through_the_page_cache_is_on_its_way_to_the_disk_at_once(
    tmp_path: Path, refusal: int | None
) -> None:
    begun: list[tuple[int, int]] = []

    def begin(fd: int, offset: int, num_bytes: int) -> None:
        begun.append((offset, num_bytes))
        if refusal is not None:
            raise OSError(refusal, os.strerror(refusal))
        start_writeback(fd, offset, num_bytes)

    writer = LocalStorage(tmp_path, calls=SystemCalls(start_writeback=begin)).open_writer(
        "a", size_bytes=3000, direct=False
    )
    writer.write_segment(0, memoryview(b"a" * 2000))
    writer.write_segment(2000, memoryview(b"b" * 1000))
    writer.finish()
    assert begun == [(0, 2000), (2000, 1000)]
    assert (tmp_path / "a").read_bytes() == b"a" * 2000 + b"b" * 1000


def test_a_disk_that_fails_in_between_fails_the_file(tmp_path: Path) -> None:
    calls = SystemCalls(start_writeback=refuse(errno.EIO))
    writer = LocalStorage(tmp_path, calls=calls).open_writer("a", size_bytes=10, direct=False)
    with pytest.raises(StorageError) as raised:
        writer.write_segment(0, memoryview(bytes(10)))
    assert raised.value.errno == errno.EIO
    writer.abort()
    assert not (tmp_path / "a").exists()
