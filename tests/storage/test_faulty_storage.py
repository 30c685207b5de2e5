"""Faults strike at every operation that changes something, before or after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dcp_ckpt.errors import StorageError, StorageTransient
from dcp_ckpt.storage import Storage
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.testing.faults import FaultyStorage, fail_nth
from dcp_ckpt.testing.storage_suite import StorageSuite

OPERATIONS = [
    ("make_directory", "d"),
    ("create_exclusive", "d/a"),
    ("put", "d/b"),
    ("open_writer", "d/c"),
    ("write_segment", "d/c"),
    ("finish", "d/c"),
    ("open_writer", "d/e"),
    ("abort", "d/e"),
    ("hold_lease", "d/lease"),
    ("close_lease", "d/lease"),
    ("rename_directory", "d"),
    ("delete", "n/a"),
    ("delete", "n/b"),
    ("remove_directory", "n"),
]


def change_everything(storage: Storage) -> None:
    """Every kind of operation once, in the order of OPERATIONS."""
    storage.make_directory("d")
    storage.create_exclusive("d/a", b"a")
    storage.put("d/b", b"b")
    writer = storage.open_writer("d/c", size_bytes=1, direct=False)
    writer.write_segment(0, memoryview(b"c"))
    writer.finish()
    storage.open_writer("d/e", size_bytes=1, direct=False).abort()
    with storage.hold_lease("d/lease"):
        pass
    storage.rename_directory("d", "n")
    storage.delete(["n/a", "n/b"])
    storage.remove_directory("n")


class TestFaultlessStorage(StorageSuite):
    """Without a fault the wrapper changes nothing."""

    @pytest.fixture
    def storage(self) -> Storage:
        return FaultyStorage(MemoryStorage(), lambda number, operation, key: None)


def test_every_operation_is_counted_and_named(tmp_path: Path) -> None:
    seen: list[tuple[int, str, str]] = []
    storage = FaultyStorage(LocalStorage(tmp_path), lambda *operation: seen.append(operation))
    change_everything(storage)
    assert seen == [(number, *operation) for number, operation in enumerate(OPERATIONS, start=1)]
    assert storage.num_operations == len(OPERATIONS)
    assert [info.key for info in storage.list("")] == ["n/c", "n/lease"]


@pytest.mark.parametrize("number", range(1, len(OPERATIONS) + 1))
def test_a_fault_strikes_before_the_operation(tmp_path: Path, number: int) -> None:
    storage = FaultyStorage(LocalStorage(tmp_path), fail_nth(number, StorageTransient("on purpose")))
    if OPERATIONS[number - 1][0] == "abort":
        change_everything(storage)
        assert [info.key for info in storage.list("n/")] == ["n/c", "n/e", "n/lease"]
        return
    with pytest.raises(StorageTransient, match="on purpose"):
        change_everything(storage)
    assert storage.num_operations == number


def test_a_lost_answer_leaves_the_effect() -> None:
    inner = MemoryStorage()
    storage = FaultyStorage(inner, fail_nth(1, StorageTransient("lost")), answer_lost=True)
    with pytest.raises(StorageTransient):
        storage.create_exclusive("a", b"x")
    assert inner.read("a") == b"x"
    with pytest.raises(StorageError):
        storage.create_exclusive("a", b"y")


KILL = """
import sys
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.testing.faults import FaultyStorage, kill_nth
storage = FaultyStorage(LocalStorage(sys.argv[1]), kill_nth(int(sys.argv[2])))
storage.make_directory("d")
for name in ("1", "2", "3"):
    storage.create_exclusive(f"d/{name}", name.encode())
"""


@pytest.mark.parametrize("number", [1, 2, 4])
def test_the_process_dies_at_the_chosen_operation(tmp_path: Path, number: int) -> None:
    child = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path), str(number)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
    )
    assert child.returncode == -signal.SIGKILL
    assert LocalStorage(tmp_path).list_names("d/") == ["1", "2", "3"][: max(0, number - 2)]
