"""A disk that fills up: the save fails with its reason, nothing partial stays, and later saves work."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_ckpt import CheckpointConfig, Checkpointer, LatestN
from dcp_ckpt.errors import StorageError, StorageFull
from tests.crash.run_files import committed_steps, debris, files_below, require_all_verify
from tests.small_disks import fill, mounted_disk

DISK_BYTES = 48 << 20
STATE_BYTES = 9 << 20
ROOM_BYTES = 1 << 20
CONFIG = CheckpointConfig(grace_seconds=0.0, timeout_seconds=30.0)

pytestmark = pytest.mark.distributed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path / "disk", size_bytes=DISK_BYTES) as disk:
        yield disk


def state(step: int) -> dict[str, Any]:
    return {"weight": torch.full((STATE_BYTES // 4,), float(step)), "step": step}


def larger(step: int) -> dict[str, Any]:
    return {**state(step), "moment": torch.zeros(STATE_BYTES // 4)}


def numbers_of(error: StorageFull) -> tuple[int, int]:
    """Needed and free bytes, as the message has them."""
    found = re.search(r"(\d+) bytes needed\D+(\d+) bytes free", error.message)
    assert found is not None, error.message
    return int(found[1]), int(found[2])


def files_of_step(run: Path, step: int) -> list[str]:
    return [name for name in files_below(run) if name.startswith(f"step-{step:08d}")]


def test_a_full_disk_fails_the_save_before_anything_is_written(small_disk: Path) -> None:
    run = small_disk / "run"
    with Checkpointer(run, config=CONFIG) as checkpointer:
        checkpointer.save(state(1), step=1).result()
        filler = fill(small_disk, room_bytes=ROOM_BYTES)
        with pytest.raises(StorageFull) as caught:
            checkpointer.save(state(2), step=2).result()
        assert (caught.value.errno, caught.value.rank, caught.value.step) == (errno.ENOSPC, 0, 2)
        assert caught.value.phase == "stage"
        assert caught.value.path == str(run)
        needed, free = numbers_of(caught.value)
        assert STATE_BYTES <= needed < STATE_BYTES + (1 << 20)
        assert free <= ROOM_BYTES
        assert files_of_step(run, 2) == []
        assert debris(run) == []
        require_all_verify(run)
        filler.unlink()
        checkpointer.save(state(2), step=2).result()
    assert committed_steps(run) == [1, 2]
    require_all_verify(run)
    assert debris(run) == []


def test_a_state_that_outgrew_the_disk_is_found_by_the_writer(small_disk: Path) -> None:
    run = small_disk / "run"
    with Checkpointer(run, config=CONFIG) as checkpointer:
        checkpointer.save(state(1), step=1).result()
        filler = fill(small_disk, room_bytes=STATE_BYTES + (2 << 20))
        # The last checkpoint would fit once more; that this one is larger is not known before it is staged.
        with pytest.raises(StorageFull) as caught:
            checkpointer.save(larger(2), step=2).result()
        assert (caught.value.errno, caught.value.rank) == (errno.ENOSPC, 0)
        assert "step-00000002/__0_0" in (caught.value.path or "")
        needed, free = numbers_of(caught.value)
        assert needed >= 2 * STATE_BYTES > free
        assert debris(run) == []
        require_all_verify(run)
        filler.unlink()
        checkpointer.save(larger(2), step=2).result()
    assert committed_steps(run) == [1, 2]
    require_all_verify(run)
    assert debris(run) == []


def test_a_full_disk_fails_the_load(small_disk: Path) -> None:
    run = small_disk / "run"
    with Checkpointer(run, config=CONFIG) as checkpointer:
        checkpointer.save(state(1), step=1).result()
    filler = fill(small_disk, room_bytes=ROOM_BYTES)
    live = state(0)
    with Checkpointer(run, config=CONFIG) as checkpointer:
        with pytest.raises(StorageFull) as caught:
            checkpointer.load(live)
        assert caught.value.path == str(run)
        needed, free = numbers_of(caught.value)
        assert needed >= STATE_BYTES > free
        assert torch.equal(live["weight"], state(1)["weight"]), "all is loaded"
        filler.unlink()
        assert checkpointer.load(live) is not None
        checkpointer.save(live, step=2).result()
    require_all_verify(run)


def test_a_disk_for_what_is_kept_and_one_more_is_enough(small_disk: Path) -> None:
    # Four checkpoints would fit; retention keeps two, and the files of a third wait for readers.
    run = small_disk / "run"
    config = CheckpointConfig(keep=LatestN(2), grace_seconds=0.5, timeout_seconds=30.0)
    fill(small_disk, room_bytes=3 * STATE_BYTES + (3 << 20))
    with Checkpointer(run, config=config) as checkpointer:
        checkpointer.load(state(0))
        for step in range(1, 6):
            checkpointer.save(state(step), step=step)
    assert committed_steps(run) == [4, 5]
    require_all_verify(run)
    assert debris(run) == []


@pytest.mark.parametrize(("num_fit", "warns"), [(3, False), (2, True)])
def test_too_little_room_for_retention_is_told_once_at_the_load(
    small_disk: Path, caplog: pytest.LogCaptureFixture, num_fit: int, warns: bool
) -> None:
    run = small_disk / "run"
    fill(small_disk, room_bytes=num_fit * STATE_BYTES + (2 << 20))
    with Checkpointer(run, config=CheckpointConfig(keep=LatestN(2), timeout_seconds=30.0)) as checkpointer:
        checkpointer.load(state(0))
    told = [record.getMessage() for record in caplog.records if "LatestN(n=2)" in record.getMessage()]
    assert len(told) == warns
    if told:
        assert "2 checkpoints and one more while saving" in told[0]
        assert str(run) in told[0]


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
