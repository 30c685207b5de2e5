"""How much memory this process may still take: what the kernel and its control groups say, and the verdict.

Owns the reading of /proc and of the control group files, and the pure decision whether a need fits. Linux
only, like the arena; where nothing can be read nothing is refused. Called when arenas are made.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcp_ckpt.errors import StorageFull

__all__ = [
    "MemoryNeed",
    "MemoryPool",
    "available_memory",
    "control_groups",
    "group_available",
    "host_available",
    "memory_shortage",
    "require_memory",
]

_UNLIMITED_BYTES = 1 << 60
"""Version 1 writes "no limit" as the greatest multiple of a page."""


@dataclass(frozen=True, kw_only=True)
class MemoryPool:
    """Memory that processes share: a host's, or what the members of one control group may use.

    Args:
        identity: equal for two processes exactly when they draw on the same pool.
        source: where the number comes from, for messages.
        available_bytes: what may still be taken, caches that the kernel gives up and swap included.
    """

    identity: str
    source: str
    available_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """What one rank is about to take, and from where."""

    rank: int
    num_bytes: int
    pools: tuple[MemoryPool, ...]


def memory_shortage(needs: Sequence[MemoryNeed]) -> StorageFull | None:
    """Why these ranks cannot take what they need, all together; None when they can. Pure.

    A pool is compared with the sum of all ranks that share it. Of several looks at a pool the best one
    counts: a refusal that is wrong stops a training that would have worked.
    """
    pools = {pool.identity: pool for need in needs for pool in need.pools}
    for identity in pools:
        looks = [(need, pool) for need in needs for pool in need.pools if pool.identity == identity]
        needed = sum(need.num_bytes for need, _ in looks)
        best = max((pool for _, pool in looks), key=lambda pool: pool.available_bytes)
        if needed > best.available_bytes:
            ranks = [need.rank for need, _ in looks if need.num_bytes]
            return StorageFull(
                f"not enough memory to stage a checkpoint: {needed} bytes needed by rank(s) "
                f"{', '.join(map(str, ranks))}, {best.available_bytes} bytes available ({best.source}); give "
                "the job more memory, or shard the state over more hosts",
                rank=ranks[0],
                phase="stage",
            )
    return None


def require_memory(num_bytes: int, *, rank: int) -> None:
    """Make sure that this rank alone can take so much now. Reads a few small files.

    Raises:
        StorageFull: it cannot.
    """
    shortage = memory_shortage([MemoryNeed(rank=rank, num_bytes=num_bytes, pools=available_memory())])
    if shortage is not None:
        raise shortage


def available_memory(*, proc: Path = Path("/proc")) -> tuple[MemoryPool, ...]:
    """The pools of this process: the host's, and one for each control group around it that has a limit."""
    meminfo = _read(proc / "meminfo")
    host = _read(proc / "sys/kernel/random/boot_id").strip() or socket.gethostname()
    pools = []
    available = host_available(meminfo, arcstats=_read(proc / "spl/kstat/zfs/arcstats"))
    if available is not None:
        source = f"MemAvailable and SwapFree in {proc / 'meminfo'}"
        pools.append(MemoryPool(identity=host, source=source, available_bytes=available))
    free_swap = _table(meminfo).get("SwapFree:", 0) << 10
    for group in control_groups(_read(proc / "self/cgroup"), _read(proc / "self/mountinfo")):
        files = {name: _read(group / name) for name in _GROUP_FILES}
        available = group_available(files, free_swap_bytes=free_swap)
        if available is not None:
            limit = "memory.max" if files["memory.max"] else "memory.limit_in_bytes"
            # By inode: inside of a container every group may have the same path.
            identity = f"{host} {limit} {group.stat().st_ino}"
            pools.append(MemoryPool(identity=identity, source=str(group / limit), available_bytes=available))
    return tuple(pools)


def host_available(meminfo: str, *, arcstats: str = "") -> int | None:
    """What /proc/meminfo says may be taken before the host runs out, in bytes; None where it does not say.

    Args:
        meminfo: the text of /proc/meminfo.
        arcstats: that of /proc/spl/kstat/zfs/arcstats: MemAvailable does not count the cache of ZFS, which
            shrinks like any other.
    """
    fields = _table(meminfo)
    if "MemAvailable:" not in fields:
        return None
    sizes = {words[0]: int(words[2]) for words in map(str.split, arcstats.splitlines()) if _is_size(words)}
    cache = max(sizes.get("size", 0) - sizes.get("c_min", 0), 0)
    return ((fields["MemAvailable:"] + fields.get("SwapFree:", 0)) << 10) + cache


_GROUP_FILES = (
    "memory.max",
    "memory.current",
    "memory.swap.max",
    "memory.swap.current",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "memory.stat",
)


def group_available(files: Mapping[str, str], *, free_swap_bytes: int = 0) -> int | None:
    """What a control group may still take, in bytes; None when it has no limit.

    Counted as available is what the kernel gives up before it kills: file cache and reclaimable slab, as
    MemAvailable does for a host, and the swap that version 2 grants the group.

    Args:
        files: the texts of the group's files by name; empty where a file is missing.
        free_swap_bytes: what the host has.
    """
    stat = _table(files.get("memory.stat", ""))
    if (limit := _number(files.get("memory.max", ""))) is not None:
        used = _number(files.get("memory.current", "")) or 0
        names: tuple[str, ...] = ("inactive_file", "active_file", "slab_reclaimable")
        swap = _swap_left(files, free_swap_bytes)
    elif (limit := _number(files.get("memory.limit_in_bytes", ""))) is not None:
        used = _number(files.get("memory.usage_in_bytes", "")) or 0
        names = ("total_inactive_file", "total_active_file")
        swap = 0
    if limit is None or limit >= _UNLIMITED_BYTES:
        return None
    reclaimable = min(sum(stat.get(name, 0) for name in names), used)
    return max(limit - used + reclaimable, 0) + swap


def _swap_left(files: Mapping[str, str], free_swap_bytes: int) -> int:
    limit = _number(files.get("memory.swap.max", ""))
    if limit is None:
        # "max", or a kernel that does not count swap by group.
        return free_swap_bytes
    used = _number(files.get("memory.swap.current", "")) or 0
    return max(min(limit - used, free_swap_bytes), 0)


def control_groups(membership: str, mountinfo: str) -> list[Path]:
    """The directories of the control groups around a process that count its memory, innermost first.

    Args:
        membership: the text of /proc/self/cgroup.
        mountinfo: that of /proc/self/mountinfo.
    """
    paths = dict(_memory_hierarchies(membership))
    groups: list[Path] = []
    for root, mount_point, kind in _group_mounts(mountinfo):
        if kind not in paths:
            continue
        top = Path(mount_point)
        path = Path(paths[kind])
        # A container may see its own group as the root of the mount, under a path of the host.
        inside = path.is_relative_to(root) and ".." not in path.parts
        directory = top / path.relative_to(root) if inside else top
        while directory != top:
            groups.append(directory)
            directory = directory.parent
        groups.append(top)
    return groups


def _memory_hierarchies(membership: str) -> Iterator[tuple[str, str]]:
    for line in membership.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield "cgroup2", path
        elif "memory" in controllers.split(","):
            yield "cgroup", path


def _group_mounts(mountinfo: str) -> Iterator[tuple[str, str, str]]:
    """Root, mount point and file system type of the mounts that count memory, each hierarchy once."""
    seen = set()
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        fields, kinds = mount.split(), source.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        counts = kinds[0] == "cgroup2" or (kinds[0] == "cgroup" and "memory" in kinds[2].split(","))
        if counts and kinds[0] not in seen:
            seen.add(kinds[0])
            yield fields[3], fields[4], kinds[0]


def _table(text: str) -> dict[str, int]:
    """Lines of a name and a number."""
    rows = (line.split() for line in text.splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdecimal()}


def _is_size(words: Sequence[str]) -> bool:
    return len(words) == 3 and words[2].isdecimal()


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
