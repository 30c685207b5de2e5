"""A disk that fills up: the save fails with its reason, nothing partial stays, and later saves work."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_ckpt import CheckpointConfig, Checkpointer
from dcp_ckpt.errors import StorageError, StorageFull
from tests.crash.run_files import committed_steps, debris, require_all_verify

DISK_BYTES = 48 << 20
STATE_BYTES = 9 << 20
ROOM_BYTES = 1 << 20
CONFIG = CheckpointConfig(grace_seconds=0.0, timeout_seconds=30.0)

pytestmark = pytest.mark.distributed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "disk"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "dcp_ckpt-test", str(target)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if result.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {result.stderr.strip()}")
    yield target
    subprocess.run(["umount", str(target)], check=True, timeout=20)


def state(step: int) -> dict[str, Any]:
    return {"weight": torch.full((STATE_BYTES // 4,), float(step)), "step": step}


def fill(disk: Path) -> Path:
    """Take all space but a little."""
    filler = disk / "filler"
    statistics = os.statvfs(disk)
    with filler.open("wb") as file:
        file.write(bytes(statistics.f_bavail * statistics.f_frsize - ROOM_BYTES))
    return filler


def test_a_full_disk_fails_the_save_and_harms_nothing(small_disk: Path) -> None:
    run = small_disk / "run"
    with Checkpointer(run, config=CONFIG) as checkpointer:
        checkpointer.save(state(1), step=1).result()
        filler = fill(small_disk)
        with pytest.raises(StorageFull) as caught:
            checkpointer.save(state(2), step=2).result()
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.rank == 0
        assert "step-00000002/__0_0" in (caught.value.path or "")
        assert str(small_disk) in str(caught.value)
        assert debris(run) == []
        require_all_verify(run)
        filler.unlink()
        checkpointer.save(state(2), step=2).result()
    assert committed_steps(run) == [1, 2]
    require_all_verify(run)
    assert debris(run) == []


def test_a_file_size_limit_of_the_writer_is_reported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Checkpointer(run, config=CONFIG) as checkpointer:
        checkpointer.save(state(1), step=1).result()
        writer = writer_pid()
        _, hard = resource.prlimit(writer, resource.RLIMIT_FSIZE)
        resource.prlimit(writer, resource.RLIMIT_FSIZE, (ROOM_BYTES, hard))
        with pytest.raises(StorageError) as caught:
            checkpointer.save(state(2), step=2).result()
        assert caught.value.errno == errno.EFBIG
        assert "step-00000002/__0_0" in (caught.value.path or "")
        assert debris(run) == []
        resource.prlimit(writer, resource.RLIMIT_FSIZE, (hard, hard))
        checkpointer.save(state(2), step=2).result()
    assert committed_steps(run) == [1, 2]
    require_all_verify(run)
    assert debris(run) == []


def writer_pid() -> int:
    """The one child of this process that is a writer."""
    children = Path("/proc/self/task").glob("*/children")
    pids = [int(pid) for path in children for pid in path.read_text().split()]
    writers = [pid for pid in pids if b"dcp_ckpt.writer" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(writers) == 1
    return writers[0]
