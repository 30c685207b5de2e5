"""The machine: what it is, how fast it copies, writes and reads, and what processes weigh.

The limits are measured with the same bytes by the same ranks at once as everything else. Knows no
checkpointing system, but for the names of this project's writer process and staging memory in /proc.
"""

from __future__ import annotations

import mmap
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.workload import State, buffer_of

__all__ = [
    "Limits",
    "bytes_read",
    "describe",
    "fields_of",
    "staging_bytes",
    "writer_pids",
    "writer_pss_bytes",
]

IO_BYTES = 8 << 20
RATES = ("memcpy", "direct_write", "buffered_write", "direct_read", "cached_read")
PACKAGES = (
    *("torch", "dcp_ckpt", "msgspec", "xxhash", "fsspec"),
    *("torch_checkpointing", "torchsnapshot", "safetensors"),
)


class Limits:
    """What this rank can do at best with as many bytes as its state has. Use it as a context manager.

    Args:
        directory: where files are written; one of each kind, removed at the end.
    """

    def __init__(self, directory: Path, state: State, *, rank: int) -> None:
        self._state = state
        self._copies = [torch.empty_like(tensor) for tensor in state.locals]
        self._direct = directory / f"direct-{rank}"
        self._buffered = directory / f"buffered-{rank}"
        # Not zeros, which some disks do not write; anonymous memory, which is aligned for direct access.
        self._chunk = mmap.mmap(-1, IO_BYTES)
        self._chunk.write(os.urandom(IO_BYTES))

    def memcpy(self) -> None:
        torch._foreach_copy_(self._copies, self._state.locals)

    def direct_write(self) -> None:
        with _opened(self._direct, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT) as file:
            for offset in range(0, self._state.local_bytes, IO_BYTES):
                os.pwrite(file, self._chunk, offset)
            os.fsync(file)

    def direct_read(self) -> None:
        """Of what `direct_write` wrote."""
        with _opened(self._direct, os.O_RDONLY | os.O_DIRECT) as file:
            for offset in range(0, self._state.local_bytes, IO_BYTES):
                os.preadv(file, [self._chunk], offset)

    def buffered_write(self) -> None:
        with _opened(self._buffered, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
            for tensor in self._state.locals:
                _write_all(file, memoryview(buffer_of(tensor)).cast("B"))
            os.fsync(file)

    def cached_read(self) -> None:
        """Of what `buffered_write` wrote, into memory for all of it."""
        with _opened(self._buffered, os.O_RDONLY) as file:
            offset = 0
            for tensor in self._copies:
                offset += os.preadv(file, [buffer_of(tensor)], offset)

    def close(self) -> None:
        """Remove the files. Idempotent."""
        for path in (self._direct, self._buffered):
            path.unlink(missing_ok=True)

    def __enter__(self) -> Limits:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def bytes_read() -> int:
    """Bytes that this process has read with read calls so far, from the page cache or from the disk."""
    return fields_of(Path("/proc/self/io"))["rchar"]


def staging_bytes() -> int:
    """Memory behind this process's staging arenas."""
    found = {}  # by inode: a mapping holds a descriptor of its own
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(descriptor).startswith("/memfd:dcp_ckpt-arena"):
                status = descriptor.stat()
                found[status.st_ino] = status.st_blocks * 512
        except FileNotFoundError:  # closed while being listed
            continue
    return sum(found.values())


def writer_pids() -> list[int]:
    """The writer processes that this process started."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"dcp_ckpt.writer" in (directory / "cmdline").read_bytes():
                found.append(int(directory.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def writer_pss_bytes(pid: int) -> int:
    """The proportional share of a process, without shared memory: that is the arena, counted on its own."""
    fields = fields_of(Path(f"/proc/{pid}/smaps_rollup"))
    return (fields["Pss_Anon"] + fields["Pss_File"]) << 10


def fields_of(path: Path) -> dict[str, int]:
    """The `name: number` lines of a file in /proc."""
    pairs = (line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return {name: int(value.split()[0]) for name, value in pairs if value.split()[0].isdecimal()}


def describe(
    directory: Path, medians: Mapping[tuple[str, str], float], state_bytes: int
) -> dict[str, object]:
    """What must be known to compare two results."""
    rates = {
        f"{metric}_bytes_per_second": state_bytes / seconds
        for (metric, system), seconds in medians.items()
        if system == "machine" and metric in RATES and seconds
    }
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": pages,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": _versions(PACKAGES),
        "file_system": _file_system(directory),
        "rates": rates,
    }


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _file_system(directory: Path) -> dict[str, str]:
    """Type and device of the mount that holds the directory."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    holding = [mount for mount in mounts if directory.resolve().is_relative_to(mount[1])]
    if not holding:
        return {}
    device, point, kind = max(holding, key=lambda mount: len(mount[1]))[:3]
    return {"type": kind, "device": device, "mounted_at": point}
