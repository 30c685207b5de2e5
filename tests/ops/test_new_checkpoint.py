"""A checkpoint that a command writes: whatever fails at whatever moment, there is a whole one, or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

import pytest
import torch

from dcp_ckpt import verify
from dcp_ckpt.errors import CheckpointError, CommitUnknown, StorageError, StorageFull
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.ops.new_checkpoint import write_checkpoint
from dcp_ckpt.ops.new_state import NewState, NewTensor, NewValue
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.testing.faults import FaultyStorage

STATE = NewState(
    tensors=[NewTensor(path=("w",), dtype="float32", shape=(300, 1000))],
    values=[NewValue(path=("lr",), encoded=0.5)],
)
OPERATIONS_MAX = 100


class ProcessEnded(BaseException):
    """No `Exception`: nobody lives on to handle it."""


def windows(numbers: Sequence[int]) -> Iterator[torch.Tensor]:
    for _ in numbers:
        yield from torch.arange(300_000.0).split(7000)


def write(storage: Storage, step: int) -> None:
    write_checkpoint(storage, STATE, windows, step=step, purpose="import", force=False, wait_seconds=0)


@pytest.mark.parametrize("ending", ["ends", "refused"])
def test_a_failure_at_every_operation(tmp_path: Path, ending: Literal["ends", "refused"]) -> None:
    """The run is whole, a step that was not reported as unknown or done is not there, and the next one is."""
    for number in range(1, OPERATIONS_MAX):
        run = tmp_path / str(number)
        with closing(open_storage(run)) as clean:
            write(clean, 1)
        counts = [0]

        def fault(
            _: int, operation: str, key: str, counts: list[int] = counts, number: int = number
        ) -> Exception | None:
            # The kernel lets go of the leases of a process that ends; this one lives on.
            counts[0] += operation != "close_lease"
            if (
                operation == "close_lease"
                or counts[0] < number
                or (ending == "refused" and counts[0] > number)
            ):
                return None
            if ending == "ends":
                raise ProcessEnded
            return StorageError(f"{operation} fails on purpose", path=key)

        told: BaseException | None = None
        with closing(open_storage(run)) as inner:
            try:
                write(FaultyStorage(inner, fault), 2)
            except (ProcessEnded, CheckpointError) as error:
                told = error
        with closing(open_storage(run)) as clean:
            steps = [entry.step for entry in read_catalogue(clean).entries]
            assert steps in ([1], [1, 2])
            if told is None:
                assert steps == [1, 2], number
            elif not isinstance(told, ProcessEnded | CommitUnknown):
                assert steps == [1], (number, told)
            write(clean, 3)
            assert read_catalogue(clean).entries[-1].step == 3
            assert {path.name for path in run.glob("step-*")} == {
                str(entry.directory) for entry in read_catalogue(clean).entries
            }
        assert verify(run).ok
        if counts[0] < number:
            break
    else:
        pytest.fail("it never came to its end")
    assert number > 8


def test_no_room_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(open_storage(tmp_path / "run")) as storage:
        monkeypatch.setattr(storage, "free_bytes", lambda: 1 << 20)
        with pytest.raises(StorageFull, match="1048576 bytes free"):
            write(storage, 1)
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_taken_gets_another_directory(tmp_path: Path) -> None:
    """That of a dead attempt: what its owner still does late never meets this one."""
    (tmp_path / "run/step-00000005").mkdir(parents=True)
    with closing(open_storage(tmp_path / "run")) as storage:
        write(storage, 5)
        (entry,) = read_catalogue(storage).entries
    assert str(entry.directory) == "step-00000005.e1"
