"""What may still be taken of memory, read from files as kernels write them, and whether it is enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcp_ckpt.errors import StorageFull
from dcp_ckpt.save.memory import (
    MemoryNeed,
    MemoryPool,
    available_memory,
    control_groups,
    group_available,
    host_available,
    memory_shortage,
    require_memory,
)

MIB = 1 << 20
MEMINFO = """\
MemTotal:       24684092 kB
MemFree:         1338724 kB
MemAvailable:    4194304 kB
Buffers:            1560 kB
Cached:          2983600 kB
SwapCached:            0 kB
HugePages_Total:       0
SwapTotal:       1048576 kB
SwapFree:         524288 kB
"""
ARCSTATS = """\
13 1 0x01 123 33456 4315326546 8236423412
name                            type data
hits                            4    123456
c_min                           4    1073741824
size                            4    3221225472
"""
MOUNTS_V2 = (
    "24 1 0:23 / /proc rw,nosuid shared:5 - proc proc rw\n"
    "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
)
MOUNTS_V1 = (
    "30 25 0:25 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755\n"
    "33 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "34 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "35 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)
MEMBER_V1 = "9:name=systemd:/\n5:cpu,cpuacct:/jobs\n4:memory:/jobs/7\n0::/\n"


def test_a_host_gives_what_is_available_and_its_swap() -> None:
    assert host_available(MEMINFO) == (4194304 + 524288) << 10


def test_the_cache_of_zfs_is_given_up_down_to_its_least_size() -> None:
    assert host_available(MEMINFO, arcstats=ARCSTATS) == ((4194304 + 524288) << 10) + 2 * 1024 * MIB


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "MemAvailable: lots\n", "\x00"])
def test_a_host_that_does_not_say_has_no_number(text: str) -> None:
    assert host_available(text) is None


def test_a_group_of_version_2_gives_its_limit_less_what_it_cannot_give_up() -> None:
    files = {
        "memory.max": f"{1000 * MIB}\n",
        "memory.current": f"{900 * MIB}\n",
        "memory.stat": (
            f"anon {300 * MIB}\nfile {500 * MIB}\ninactive_file {200 * MIB}\nactive_file {250 * MIB}\n"
            f"slab_reclaimable {10 * MIB}\nslab_unreclaimable {5 * MIB}\n"
        ),
    }
    assert group_available(files) == 560 * MIB
    # Swap that the group may use, as far as the host has it.
    assert group_available(files, free_swap_bytes=70 * MIB) == 630 * MIB
    swap = {"memory.swap.max": f"{64 * MIB}\n", "memory.swap.current": f"{4 * MIB}\n"}
    assert group_available(files | swap, free_swap_bytes=70 * MIB) == 620 * MIB
    assert group_available(files | {"memory.swap.max": "0\n"}, free_swap_bytes=70 * MIB) == 560 * MIB


def test_a_group_of_version_1_counts_all_below_it() -> None:
    files = {
        "memory.limit_in_bytes": f"{1000 * MIB}\n",
        "memory.usage_in_bytes": f"{900 * MIB}\n",
        "memory.stat": (
            f"inactive_file {1 * MIB}\nactive_file {1 * MIB}\nhierarchical_memory_limit {1000 * MIB}\n"
            f"total_inactive_file {200 * MIB}\ntotal_active_file {100 * MIB}\n"
        ),
    }
    assert group_available(files) == 400 * MIB


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"memory.max": "max\n", "memory.current": "5\n"},
        {"memory.limit_in_bytes": "9223372036854771712\n", "memory.usage_in_bytes": "5\n"},
        {"memory.max": "nonsense\n"},
    ],
)
def test_a_group_without_limit_has_no_number(files: dict[str, str]) -> None:
    assert group_available(files) is None


def test_a_group_over_its_limit_gives_nothing() -> None:
    assert group_available({"memory.max": "1000\n", "memory.current": "2000\n"}) == 0


def test_what_a_group_can_give_up_is_never_more_than_it_uses() -> None:
    files = {"memory.max": "1000", "memory.current": "100", "memory.stat": "inactive_file 5000\n"}
    assert group_available(files) == 1000


def test_groups_are_walked_from_the_process_to_the_top() -> None:
    assert [str(path) for path in control_groups("0::/jobs.slice/7/trainer\n", MOUNTS_V2)] == [
        "/sys/fs/cgroup/jobs.slice/7/trainer",
        "/sys/fs/cgroup/jobs.slice/7",
        "/sys/fs/cgroup/jobs.slice",
        "/sys/fs/cgroup",
    ]


def test_both_versions_at_once() -> None:
    assert [str(path) for path in control_groups(MEMBER_V1, MOUNTS_V1)] == [
        "/sys/fs/cgroup/memory/jobs/7",
        "/sys/fs/cgroup/memory/jobs",
        "/sys/fs/cgroup/memory",
        "/sys/fs/cgroup/unified",
    ]


def test_a_container_sees_its_own_group_as_the_top() -> None:
    # Without a namespace of its own: the path is the host's, and so is the root of the mount.
    mounts = "34 30 0:29 /docker/c0ffee /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    top = [Path("/sys/fs/cgroup/memory")]
    assert control_groups("4:memory:/docker/c0ffee\n", mounts) == top
    below = control_groups("4:memory:/docker/c0ffee/inner\n", mounts)
    assert below == [Path("/sys/fs/cgroup/memory/inner"), *top]
    assert control_groups("4:memory:/elsewhere\n", mounts) == top
    assert control_groups("0::/../../other\n", MOUNTS_V2) == [Path("/sys/fs/cgroup")]


@pytest.mark.parametrize("text", ["", "nonsense\n", "0::/\n"])
def test_where_nothing_is_mounted_there_are_no_groups(text: str) -> None:
    assert control_groups(text, "") == []


def lay_out(root: Path, *, group_limit: str, parent_limit: str) -> Path:
    """A /proc whose process is in group `a/b` of a version 2 hierarchy; returns it."""
    proc, groups = root / "proc", root / "groups"
    texts = {
        proc / "meminfo": MEMINFO,
        proc / "sys/kernel/random/boot_id": "b007\n",
        proc / "self/cgroup": "0::/a/b\n",
        proc / "self/mountinfo": f"35 24 0:30 / {groups} rw - cgroup2 cgroup2 rw\n",
        groups / "a/memory.max": parent_limit,
        groups / "a/memory.current": "0\n",
        groups / "a/b/memory.max": group_limit,
        groups / "a/b/memory.current": "0\n",
        groups / "a/b/memory.swap.max": "0\n",
        groups / "a/memory.swap.max": "0\n",
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc


def test_every_limit_around_the_process_is_a_pool(tmp_path: Path) -> None:
    pools = available_memory(proc=lay_out(tmp_path, group_limit="max\n", parent_limit=f"{64 * MIB}\n"))
    assert [pool.available_bytes for pool in pools] == [(4194304 + 524288) << 10, 64 * MIB]
    assert pools[1].source == str(tmp_path / "groups/a/memory.max")
    # The parent's limit is the same pool for a process in a sibling.
    (tmp_path / "proc/self/cgroup").write_text("0::/a\n")
    (again,) = (pool for pool in available_memory(proc=tmp_path / "proc") if "groups" in pool.source)
    assert again.identity == pools[1].identity


def test_nothing_to_read_is_nothing_to_refuse(tmp_path: Path) -> None:
    assert available_memory(proc=tmp_path) == ()
    assert memory_shortage([MemoryNeed(rank=0, num_bytes=1 << 60, pools=())]) is None


def pool(name: str, available_bytes: int) -> MemoryPool:
    return MemoryPool(identity=name, source=f"file of {name}", available_bytes=available_bytes)


def need(rank: int, num_bytes: int, *pools: MemoryPool) -> MemoryNeed:
    return MemoryNeed(rank=rank, num_bytes=num_bytes, pools=pools)


def test_ranks_that_share_a_pool_are_added_up() -> None:
    host = pool("host a", 100)
    assert memory_shortage([need(rank, 25, host) for rank in range(4)]) is None
    shortage = memory_shortage([need(rank, 26, host) for rank in range(4)])
    assert isinstance(shortage, StorageFull)
    assert shortage.rank == 0
    for part in ("104 bytes needed", "rank(s) 0, 1, 2, 3", "100 bytes available", "file of host a"):
        assert part in shortage.message


def test_other_hosts_and_groups_do_not_count() -> None:
    assert memory_shortage([need(0, 90, pool("host a", 100)), need(1, 90, pool("host b", 100))]) is None
    host = pool("host a", 1000)
    groups = [pool("group 1", 100), pool("group 2", 100)]
    needs = [need(0, 90, host, groups[0]), need(1, 90, host, groups[1])]
    assert memory_shortage(needs) is None
    shortage = memory_shortage([*needs, need(2, 20, host, groups[1])])
    assert shortage is not None
    assert "rank(s) 1, 2" in shortage.message
    assert "file of group 2" in shortage.message


def test_the_best_look_counts_and_a_rank_without_need_is_not_blamed() -> None:
    needs = [need(0, 0, pool("host", 5)), need(1, 50, pool("host", 60)), need(2, 0, pool("host", 70))]
    assert memory_shortage(needs) is None
    shortage = memory_shortage([*needs, need(3, 21, pool("host", 1))])
    assert shortage is not None
    assert "rank(s) 1, 3" in shortage.message


def test_this_process_may_take_a_page_and_not_everything() -> None:
    require_memory(4096, rank=3)
    with pytest.raises(StorageFull) as caught:
        require_memory(1 << 60, rank=3)
    assert caught.value.rank == 3
    assert str(1 << 60) in caught.value.message
