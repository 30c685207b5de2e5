"""The recording of a disk sees every call that changes a tree, and says so when something else changed it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dcp_ckpt.testing.interposition import SystemCall
from dcp_ckpt.testing.power_loss import recorded
from dcp_ckpt.testing.volatile_disk import NUM_EXTREMES

WRITE = os.O_WRONLY | os.O_CREAT


def tree(root: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in root.rglob("*")
    }


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, WRITE)
    os.write(descriptor, data)
    os.close(descriptor)


def change_everything(root: Path) -> None:
    """One of each call, twice over in part."""
    os.mkdir(root / "a")
    os.mkdir(root / "b")
    descriptor = os.open(root / "a" / "f", WRITE)
    os.pwrite(descriptor, b"world", 6)
    os.write(descriptor, b"hello")
    os.write(descriptor, b" ")
    os.ftruncate(descriptor, 9)
    os.close(descriptor)
    os.link(root / "a" / "f", root / "a" / "g")
    os.rename(root / "a" / "f", root / "b" / "f")
    write(root / "b" / "old", b"replaced")
    os.replace(root / "b" / "f", root / "b" / "old")
    os.replace(root / "b" / "old", root / "a" / "g")  # two names of one file: both stay
    write(root / "gone", b"x")
    os.unlink(root / "gone")
    write(root / "emptied", b"x")
    os.close(os.open(root / "emptied", os.O_WRONLY | os.O_TRUNC))
    os.rename(root / "a", root / "c")
    os.mkdir(root / "a")
    os.rmdir(root / "a")


def test_every_call_is_seen(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    with recorded(root) as recording:
        change_everything(root)
        for path in [root, *root.rglob("*")]:
            sync(path)
    for seed in range(NUM_EXTREMES + 5):
        recording.lose_power(tmp_path / str(seed), moment=recording.num_moments, seed=seed)
        assert tree(tmp_path / str(seed)) == tree(root)


def test_what_was_there_before_is_durable(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    (root / "d").mkdir(parents=True)
    (root / "d" / "f").write_bytes(b"content")
    os.link(root / "d" / "f", root / "again")
    before = tree(root)
    with recorded(root) as recording:
        os.unlink(root / "again")
    recording.lose_power(tmp_path / "nothing", moment=1, seed=0)
    assert tree(tmp_path / "nothing") == before
    assert (tmp_path / "nothing" / "again").samefile(tmp_path / "nothing" / "d" / "f")


def test_each_moment_has_what_was_told_until_then(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    with recorded(root) as recording:
        recording.tell("begun")
        write(root / "f", b"x")
        recording.tell("written")
        sync(root)
        recording.tell("named")
    assert recording.num_moments == 3, "created, written, synced"
    assert [recording.told(moment) for moment in range(4)] == [
        ["begun"],
        ["begun"],
        ["begun", "written"],
        ["begun", "written", "named"],
    ]
    found = []
    for moment in range(4):
        recording.lose_power(tmp_path / str(moment), moment=moment, seed=0)
        found.append(tree(tmp_path / str(moment)))
    assert found == [{}, {}, {}, {"f": b""}]


def test_an_unseen_change_is_found_out(tmp_path: Path) -> None:
    def change_unseen() -> None:
        with recorded(tmp_path):
            (tmp_path / "f").write_bytes(b"not through `os`")

    with pytest.raises(RuntimeError, match="unseen"):
        change_unseen()


def test_syncs_can_be_left_out(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    with recorded(root, without_syncs_of="*/disk") as recording:
        write(root / "f", b"x")
        sync(root / "f")
        sync(root)
    recording.lose_power(tmp_path / "left", moment=recording.num_moments, seed=0)
    assert tree(tmp_path / "left") == {}


def test_a_call_that_fails_changes_nothing_and_a_sync_that_fails_settles_nothing(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()

    def refuse(call: SystemCall) -> None:
        if not call.after and call.name in ("fsync", "unlink") and call.paths[0].endswith("/f"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), call.paths[0])

    with recorded(root, see=refuse) as recording:
        write(root / "f", b"x")
        sync(root)
        with pytest.raises(OSError, match="Input/output"):
            os.unlink(root / "f")
        with pytest.raises(OSError, match="Input/output"):
            sync(root / "f")
    recording.lose_power(tmp_path / "left", moment=recording.num_moments, seed=0)
    assert tree(tmp_path / "left") == {"f": b""}


def test_what_lies_elsewhere_is_not_recorded(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    with recorded(root) as recording:
        write(tmp_path / "elsewhere", b"x")
        sync(tmp_path)
    assert recording.num_moments == 0
