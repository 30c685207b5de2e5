"""Copy: the same bytes in another place, or no checkpoint there at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load as stock_load

from dcp_ckpt import CheckpointConfig, Checkpointer, CopyReport, copy_checkpoint, open_checkpoint, verify
from dcp_ckpt.errors import (
    CheckpointError,
    CheckpointNotFound,
    CorruptCheckpoint,
    StorageError,
    StorageExists,
    StorageTransient,
)
from dcp_ckpt.format.digests import BLOCK_BYTES
from dcp_ckpt.lifecycle.runs import open_run
from dcp_ckpt.ops.copy import copy_between
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.base import Storage
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.testing.faults import FailAt, FaultyStorage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint

STEP = "step-00000010"
DATA_0 = "__0_0.e0001-s000001.distcp"
DATA_1 = "__1_0.e0001-s000001.distcp"
FRAGMENT_1 = "rank-00001.e0001-s000001.json"
MANIFEST = "manifest.json"


class Killed(Exception):
    """The process is gone: nothing that it does has any effect from here."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, whose two data files are of several windows."""
    run = tmp_path_factory.mktemp("run")
    write_tiny_checkpoint(LocalStorage(run), step=10, shape=(700, 7000))
    (run / STEP / ".metadata").write_bytes(b"for stock readers")
    return run


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "run")


@pytest.fixture(params=["disk", "object store"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "backup") if request.param == "disk" else MemoryStorage()


def content(storage: Storage, directory: str) -> dict[str, bytes]:
    prefix = f"{directory}/"
    return {info.key.removeprefix(prefix): storage.read(info.key) for info in storage.list(prefix)}


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def copy_to(run: Path, target: Storage, directory: str = "copy") -> CopyReport:
    return copy_between(LocalStorage(run), STEP, target, directory)


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def test_a_copy_is_the_same_bytes(run: Path, target: Storage) -> None:
    report = copy_to(run, target)
    assert content(target, "copy") == files(run / STEP)
    sizes = sum((run / STEP / name).stat().st_size for name in (DATA_0, DATA_1))
    assert (report.step, report.num_files) == (10, 5)
    assert (report.copied_bytes, report.kept_bytes) == (sizes, 0)
    assert report.notes == ()


def test_and_back_again(run: Path, target: Storage, tmp_path: Path) -> None:
    copy_to(run, target)
    copy_between(target, "copy", LocalStorage(tmp_path / "back"), STEP)
    assert files(tmp_path / "back" / STEP) == files(run / STEP)
    assert verify(tmp_path / "back" / STEP).ok


def test_a_run_need_not_have_metadata_for_stock_readers(run: Path, target: Storage) -> None:
    (run / STEP / ".metadata").unlink()
    copy_to(run, target)
    assert content(target, "copy") == files(run / STEP)


def test_progress_ends_at_the_whole(run: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = copy_checkpoint(run / STEP, tmp_path / "copy", progress=lambda *told: seen.append(told))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {report.copied_bytes}
    assert seen[-1][0] == report.copied_bytes
    assert len(seen) > 4


def test_where_it_lands(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    landed = {
        destination: os.path.relpath(
            copy_checkpoint(f"{run}@latest", f"{tmp_path}/{destination}").path, tmp_path
        )
        for destination in ("new", "new", "folder", "deep/new/", "deep/new", f"folder/{STEP}")
    }
    assert landed == {
        "new": "new",
        "folder": f"folder/{STEP}",
        "deep/new/": f"deep/new/{STEP}",
        "deep/new": f"deep/new/{STEP}",
        f"folder/{STEP}": f"folder/{STEP}",
    }
    copied = copy_checkpoint(tmp_path / "new", f"{tmp_path}/renamed/")
    assert copied.path == f"{tmp_path}/renamed/{STEP}", "a copy has its step's name again"
    assert copy_checkpoint(run / STEP, f"file://{tmp_path}/url").path == f"{tmp_path}/url"


def test_a_flipped_bit_is_not_copied_and_is_named(run: Path, target: Storage) -> None:
    flip(run / STEP / DATA_1, 3 * BLOCK_BYTES + 5)
    message = rf"source is damaged: block 3 \(bytes {3 * BLOCK_BYTES} to .*it holds model.weight; .*repeat it"
    with pytest.raises(CorruptCheckpoint, match=message) as caught:
        copy_to(run, target)
    assert caught.value.path == f"{run}/{STEP}/{DATA_1}"
    assert MANIFEST not in content(target, "copy")
    assert DATA_1 not in content(target, "copy")
    flip(run / STEP / DATA_1, 3 * BLOCK_BYTES + 5)
    report = copy_to(run, target)
    assert content(target, "copy") == files(run / STEP)
    assert report.copied_bytes > 0


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda step: os.truncate(step / DATA_0, 4096), CorruptCheckpoint, "truncated, 4096 of"),
        (lambda step: (step / DATA_0).unlink(), CorruptCheckpoint, "is missing"),
        (lambda step: (step / FRAGMENT_1).unlink(), CorruptCheckpoint, "is missing"),
        (lambda step: flip(step / FRAGMENT_1, 30), CorruptCheckpoint, "differs from its digest"),
        (lambda step: (step / MANIFEST).write_bytes(b"{}"), CorruptCheckpoint, "manifest"),
        (lambda step: (step / MANIFEST).unlink(), CheckpointNotFound, "no manifest"),
    ],
    ids=["truncated", "no data", "no fragment", "fragment", "manifest", "no manifest"],
)
def test_any_other_damage_gives_no_copy(
    run: Path, target: Storage, damage: object, error: type[CheckpointError], message: str
) -> None:
    damage(run / STEP)  # type: ignore[operator]
    with pytest.raises(error, match=message):
        copy_to(run, target)
    assert MANIFEST not in content(target, "copy")


def test_a_checkpoint_that_is_deleted_meanwhile_is_not_called_damaged(run: Path, target: Storage) -> None:
    def delete(number: int, operation: str, key: str) -> None:
        shutil.rmtree(run / STEP, ignore_errors=True)

    with pytest.raises(CheckpointNotFound, match="deleted while it was copied"):
        copy_to(run, FaultyStorage(target, delete))


def test_nothing_is_overwritten(run: Path, target: Storage) -> None:
    write_tiny_checkpoint(LocalStorage(run), step=20)
    copy_between(LocalStorage(run), "step-00000020", target, "copy")
    before = content(target, "copy")
    with pytest.raises(StorageExists, match="never overwrites"):
        copy_to(run, target)
    assert content(target, "copy") == before


def test_files_that_differ_are_all_named_and_left_alone(run: Path, target: Storage) -> None:
    target.make_directory("copy")
    target.put(f"copy/{DATA_1}", b"short")
    target.put(f"copy/{FRAGMENT_1}", b"mine")
    with pytest.raises(
        StorageExists, match=f"{re.escape(DATA_1)}, {re.escape(FRAGMENT_1)}: already there.*delete"
    ):
        copy_to(run, target)
    found = content(target, "copy")
    assert (found[DATA_1], found[FRAGMENT_1]) == (b"short", b"mine")
    assert found[DATA_0] == (run / STEP / DATA_0).read_bytes(), "what can be copied is"
    assert MANIFEST not in found
    target.delete([f"copy/{DATA_1}", f"copy/{FRAGMENT_1}"])
    report = copy_to(run, target)
    assert content(target, "copy") == files(run / STEP)
    assert report.kept_bytes == len(found[DATA_0])


def test_a_file_of_the_right_size_with_a_wrong_bit_is_found(run: Path, target: Storage) -> None:
    wrong = bytearray((run / STEP / DATA_0).read_bytes())
    wrong[-1] ^= 1
    target.put(f"copy/{DATA_0}", wrong)
    with pytest.raises(StorageExists, match=re.escape(DATA_0)):
        copy_to(run, target)
    assert MANIFEST not in content(target, "copy")


def test_a_finished_copy_is_checked_when_it_is_repeated(run: Path, target: Storage) -> None:
    first = copy_to(run, target)
    again = copy_to(run, target)
    assert (again.copied_bytes, again.kept_bytes) == (0, first.copied_bytes)


def test_a_disk_that_fails_half_way_leaves_no_checkpoint_and_the_rest_for_later(
    run: Path, tmp_path: Path
) -> None:
    """The second window of rank 1's file cannot be written."""
    segments: list[str] = []

    def fail(number: int, operation: str, key: str) -> Exception | None:
        if operation == "write_segment" and key.endswith(DATA_1):
            segments.append(key)
        return StorageError("no more") if len(segments) == 2 and operation == "write_segment" else None

    target = LocalStorage(tmp_path / "backup")
    with pytest.raises(StorageError, match=r"no more; the copy .*/backup/copy is not finished: repeat it"):
        copy_to(run, FaultyStorage(target, fail))
    assert len(segments) == 2
    assert {MANIFEST, DATA_1, FRAGMENT_1}.isdisjoint(content(target, "copy"))
    copy_to(run, target)
    assert content(target, "copy") == files(run / STEP)


def test_a_lost_answer_is_asked_for_again(run: Path, target: Storage) -> None:
    def lose(number: int, operation: str, key: str) -> Exception | None:
        return StorageTransient("?") if operation == "create_exclusive" and number % 2 else None

    copy_to(run, FaultyStorage(target, lose, answer_lost=True))
    assert content(target, "copy") == files(run / STEP)


def kill_at(moment: int, *, spared: Sequence[str]) -> FailAt:
    return lambda number, operation, key: Killed() if number >= moment and operation not in spared else None


@pytest.mark.parametrize("kind", ["disk", "object store"])
def test_killed_anywhere_there_is_a_whole_copy_or_none(tmp_path: Path, kind: str) -> None:
    write_tiny_checkpoint(LocalStorage(tmp_path), step=10)

    def make(moment: int) -> Storage:
        return LocalStorage(tmp_path / f"backup-{moment}") if kind == "disk" else MemoryStorage()

    # An object store shows nothing of an upload that nobody finished.
    spared = () if kind == "disk" else ("abort",)
    for moment in range(1, 100):
        target = make(moment)
        try:
            copy_to(tmp_path, FaultyStorage(target, kill_at(moment, spared=spared)))
        except Killed:
            pass
        else:
            break
        found = content(target, "copy")
        if MANIFEST in found:
            assert {**found, ".metadata": b""} == {**files(tmp_path / STEP), ".metadata": b""}
        try:
            copy_to(tmp_path, target)
        except StorageExists as error:
            # A disk shows files that were half-written; they are named, and only their owner deletes them.
            assert kind == "disk"
            target.delete([f"copy/{name}" for name in (DATA_0, DATA_1) if name in error.message])
            copy_to(tmp_path, target)
        assert content(target, "copy") == files(tmp_path / STEP)
    assert moment > 8


def test_a_target_that_refuses_a_document_gets_no_manifest(tmp_path: Path) -> None:
    write_tiny_checkpoint(LocalStorage(tmp_path), step=10)
    target = MemoryStorage()

    def deny(number: int, operation: str, key: str) -> Exception | None:
        return StorageError("denied") if key.endswith(FRAGMENT_1) else None

    with pytest.raises(StorageError, match="denied"):
        copy_to(tmp_path, FaultyStorage(target, deny))
    assert MANIFEST not in content(target, "copy")


def test_what_the_run_around_it_makes_of_a_copy(tmp_path: Path) -> None:
    first, second = open_run(tmp_path), open_run(tmp_path, resume="never")
    write_tiny_checkpoint(open_storage(first.path), step=10, run_id=first.run_id)
    (note,) = copy_checkpoint(f"{first.path}@10", f"{second.path}/").notes
    assert f"{second.path} is another run" in note
    assert verify(f"{second.path}/{STEP}").ok
    with pytest.raises(CorruptCheckpoint, match="another run"):
        open_checkpoint(f"{second.path}@10")
    assert copy_checkpoint(f"{first.path}@10", tmp_path / "backup").notes == ()
    shutil.rmtree(Path(first.path) / STEP)
    (note,) = copy_checkpoint(tmp_path / "backup", f"{first.path}/").notes
    assert "pin it" in note
    with open_checkpoint(f"{first.path}@10") as checkpoint:
        assert checkpoint.manifest.step == 10
    (note,) = copy_checkpoint(tmp_path / "backup", f"{first.path}/aside").notes
    assert "does not count it" in note


def test_stock_dcp_loads_a_copy(tmp_path: Path) -> None:
    state = {"weight": torch.arange(600_000, dtype=torch.float32).reshape(600, 1000), "step": torch.tensor(7)}
    with Checkpointer(tmp_path / "run", config=CheckpointConfig(timeout_seconds=60.0)) as checkpointer:
        checkpointer.save(dict(state), step=3).result(60)
    copied = copy_checkpoint(f"{tmp_path}/run@3", f"{tmp_path}/copy/").path
    shutil.rmtree(tmp_path / "run")
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    stock_load(loaded, checkpoint_id=copied)
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor)
