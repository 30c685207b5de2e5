"""Before the first step: a load ends with memory taken and space looked at, or says what no save could do."""

from __future__ import annotations

import errno
import mmap
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_ckpt import CheckpointConfig, Checkpointer, TrainState, load_checkpoint, verify
from dcp_ckpt.errors import StateError, StorageFull
from dcp_ckpt.save.memory import MemoryPool
from dcp_ckpt.save.preparation import Needs, Room, needs_problem

WAIT = 30.0
STATE_BYTES = 32 << 20
CONFIG = CheckpointConfig(keep=None, grace_seconds=0.0, timeout_seconds=WAIT)


def state(**more: Any) -> dict[str, Any]:
    return {"weight": torch.ones(STATE_BYTES // 4), "step": 0, **more}


def too_large() -> dict[str, Any]:
    """More than any machine has, though it takes four bytes here."""
    return {"weight": torch.zeros(1).expand(1 << 50)}


def num_faults() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def arenas() -> dict[int, str]:
    """The arenas of this process: inode -> one of its names in /proc."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.lexists(path) and "dcp_ckpt-arena" in os.readlink(path):
            found[os.stat(path).st_ino] = path
    return found


def faults_of_first_save(path: Path, *, load: bool) -> int:
    with Checkpointer(path, config=CONFIG) as checkpointer:
        if load:
            assert checkpointer.load(state()) is None
        live = state()
        before = num_faults()
        checkpointer.save(live, step=1)
        faults = num_faults() - before
    assert verify(path).ok
    return faults


def test_the_first_save_after_a_load_takes_no_fresh_pages(tmp_path: Path) -> None:
    num_pages = STATE_BYTES // mmap.PAGESIZE
    assert faults_of_first_save(tmp_path / "without", load=False) >= num_pages
    assert faults_of_first_save(tmp_path / "with", load=True) < num_pages / 10


def test_saves_use_the_arena_that_the_load_made(tmp_path: Path) -> None:
    live = state()
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        checkpointer.load(live)
        (made,) = arenas()
        checkpointer.save(live, step=1).result(WAIT)
        checkpointer.load(live)
        checkpointer.save(live, step=2).result(WAIT)
        assert list(arenas()) == [made]
    assert arenas() == {}


def test_a_state_that_grows_gives_the_old_memory_back_before_it_takes_new(tmp_path: Path) -> None:
    live = state()
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        checkpointer.load(live)
        checkpointer.save(live, step=1).result(WAIT)
        ((inode, path),) = arenas().items()
        old = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            assert os.fstat(old).st_blocks * 512 >= STATE_BYTES
            live["moment"] = torch.full((STATE_BYTES // 4,), 2.0)
            checkpointer.save(live, step=2).result(WAIT)
            # The writer of the save before has it mapped, and this test holds it: its pages are gone.
            assert os.fstat(old).st_blocks == 0
        finally:
            os.close(old)
        assert inode not in arenas()
    assert verify(tmp_path).ok
    restored: dict[str, Any] = {
        "weight": torch.zeros(STATE_BYTES // 4),
        "moment": torch.zeros(STATE_BYTES // 4),
        "step": None,
    }
    load_checkpoint(tmp_path / "step-00000002", restored)
    assert torch.equal(restored["weight"], live["weight"])
    assert torch.equal(restored["moment"], live["moment"])


def test_a_state_larger_than_memory_fails_the_load(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        with pytest.raises(StorageFull) as caught:
            checkpointer.load(too_large())
        assert caught.value.phase == "stage"
        assert "bytes needed" in caught.value.message
        assert "bytes available" in caught.value.message
        assert "MemAvailable" in caught.value.message or "memory." in caught.value.message
        assert arenas() == {}
        # Training on, the user may have made it smaller.
        checkpointer.save(state(), step=1).result(WAIT)


def test_growth_beyond_memory_fails_that_save_only(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        checkpointer.load(state())
        with pytest.raises(StorageFull) as caught:
            checkpointer.save(too_large(), step=1).result(WAIT)
        assert (caught.value.phase, caught.value.step) == ("stage", 1)
        checkpointer.save(state(), step=1).result(WAIT)
    assert verify(tmp_path).ok


@contextmanager
def limited_memory(num_bytes: int) -> Iterator[None]:
    """This process may map so much more."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_limit_of_the_process_fails_the_load(tmp_path: Path) -> None:
    live = {"weight": torch.ones(64 << 20)}
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        with limited_memory(128 << 20), pytest.raises(StorageFull) as caught:
            checkpointer.load(live)
        assert caught.value.errno == errno.ENOMEM
        assert "no memory for a staging arena" in caught.value.message
        assert "ulimit" in caught.value.message
        assert arenas() == {}
        checkpointer.load(live)
        assert len(arenas()) == 1


def test_a_state_that_cannot_be_saved_fails_the_load_by_name(tmp_path: Path) -> None:
    live = state(inner={"eye": torch.eye(3).to_sparse()})
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        with pytest.raises(StateError, match=r"inner\.eye"):
            checkpointer.load(live)
        del live["inner"]
        checkpointer.save(live, step=1).result(WAIT)


class NotYet:
    """Has no state before training has begun."""

    started = False

    def state_dict(self) -> dict[str, Any]:
        if not self.started:
            raise RuntimeError("not started")
        return {"position": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.started = True


def test_an_object_that_has_no_state_yet_fails_no_load(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = state(loader=NotYet())
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        assert checkpointer.load(live) is None
        assert "not started" in caplog.text
        live["loader"].started = True
        checkpointer.save(live, step=1).result(WAIT)


class Drawing:
    """Draws random numbers whenever it is asked for its state."""

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": (random.random(), float(torch.rand(())))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_getting_ready_draws_no_random_numbers(tmp_path: Path) -> None:
    live = TrainState(model=torch.nn.Linear(2, 2), extra={"drawing": Drawing()})
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        before = random.getstate(), torch.get_rng_state()
        assert checkpointer.load(live) is None
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])


def test_a_checkpoint_is_read_without_memory_or_space_to_save_it(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, config=CONFIG) as checkpointer:
        checkpointer.save(state(), step=1).result(WAIT)
    load_checkpoint(tmp_path / "step-00000001", state())
    assert arenas() == {}


# The verdict.


def room(free_bytes: int | None) -> Room:
    return Room(path="/disk/run", free_bytes=free_bytes, removable_bytes=0)


def ranks(*file_bytes: int, free_bytes: int | None, **more: Any) -> list[Needs]:
    return [
        Needs(rank=rank, file_bytes=size, room=room(free_bytes) if rank == 0 else None, **more)
        for rank, size in enumerate(file_bytes)
    ]


def test_all_ranks_files_together_must_fit() -> None:
    assert needs_problem(ranks(40, 60, free_bytes=100)) is None
    assert needs_problem(ranks(40, 60, free_bytes=None)) is None
    problem = needs_problem(ranks(40, 61, free_bytes=100))
    assert isinstance(problem, StorageFull)
    assert problem.path == "/disk/run"
    assert "101 bytes needed" in problem.message
    assert "100 bytes free" in problem.message


def test_memory_is_judged_before_space_and_errors_before_both() -> None:
    pools = (MemoryPool(identity="host", source="meminfo", available_bytes=10),)
    needs = ranks(40, 61, free_bytes=100, memory_bytes=6, pools=pools)
    problem = needs_problem(needs)
    assert problem is not None
    assert "12 bytes needed by rank(s) 0, 1" in problem.message
    fields = {"kind": "StateError", "message": "no", "rank": 1, "step": None, "phase": None, "path": None}
    problem = needs_problem([*needs, Needs(rank=2, error={**fields, "errno": None})])
    assert isinstance(problem, StateError)
    assert problem.rank == 1
