"""verify: every kind of damage is found, all of it at once, and named by what it touches."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dcp_ckpt.errors import CheckpointNotFound, FormatTooNew, StorageError, StorageTransient
from dcp_ckpt.format.digests import BLOCK_BYTES
from dcp_ckpt.format.fragment import Fragment
from dcp_ckpt.ops.checkpoint import open_checkpoint
from dcp_ckpt.ops.touched import FileMap
from dcp_ckpt.ops.verify import Problem, verify
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.storage.base import ByteRange
from dcp_ckpt.storage.forwarding import ForwardingStorage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint
from tests.cli.commands import invoke

DATA_0 = "__0_0.e0001-s000001.distcp"
DATA_1 = "__1_0.e0001-s000001.distcp"
FRAGMENT_0 = "rank-00000.e0001-s000001.json"
FRAGMENT_1 = "rank-00001.e0001-s000001.json"
STEP = "step-00000010"
VALUES = ("optim.betas", "optim.lr", "optim.schedule")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, each of whose two data files has more than one block."""
    run = tmp_path_factory.mktemp("run")
    write_tiny_checkpoint(open_storage(run), step=10, shape=(1000, 600))
    return run


@pytest.fixture
def step(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original / STEP, tmp_path / STEP)
    return tmp_path / STEP


def problems(step: Path) -> tuple[Problem, ...]:
    report = verify(step)
    assert not report.ok
    return report.problems


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def fragment(step: Path, rank: int) -> Fragment:
    with open_checkpoint(step) as checkpoint:
        return checkpoint.fragment(rank)


def test_a_whole_checkpoint_is_fine_by_every_name(step: Path) -> None:
    for target in (step, f"{step.parent}@latest", f"{step.parent}@10", step.parent, str(step) + "/"):
        report = verify(target)
        assert report.ok
        assert [checked.step for checked in report.checkpoints] == [10]
        assert report.checkpoints[0].num_files == 5
        sizes = [path.stat().st_size for path in step.iterdir() if path.name != "manifest.json"]
        assert report.checkpoints[0].num_bytes == sum(sizes)


def test_a_flipped_bit_is_named_by_file_block_bytes_and_tensor(step: Path) -> None:
    flip(step / DATA_1, 700_000)
    (problem,) = problems(step)
    assert (problem.kind, problem.path, problem.block) == ("block", f"{STEP}/{DATA_1}", 0)
    assert (problem.start, problem.stop) == (0, BLOCK_BYTES)
    assert (problem.tensors, problem.values) == (("model.weight",), ())
    assert str(problem) == (
        f"{STEP}/{DATA_1}: block 0, bytes 0 to {BLOCK_BYTES}: differs from its digest; "
        "touches tensor model.weight"
    )


def test_the_last_short_block_and_the_values_in_it_are_checked(step: Path) -> None:
    size = (step / DATA_0).stat().st_size
    flip(step / DATA_0, size - 1)
    (problem,) = problems(step)
    assert (problem.block, problem.start, problem.stop) == (1, BLOCK_BYTES, size)
    assert problem.tensors == ("model.bias", "model.empty", "model.weight")
    assert problem.values == VALUES


def test_all_problems_are_reported_at_once(step: Path) -> None:
    flip(step / DATA_0, 0)
    flip(step / DATA_0, BLOCK_BYTES)
    (step / DATA_1).unlink()
    found = [(problem.kind, problem.block) for problem in problems(step)]
    assert found == [("block", 0), ("block", 1), ("missing", None)]


def test_a_missing_file_names_everything_in_it(step: Path) -> None:
    (step / DATA_0).unlink()
    (problem,) = problems(step)
    assert problem.kind == "missing"
    assert problem.tensors == ("model.bias", "model.empty", "model.weight")
    assert problem.values == VALUES


@pytest.mark.parametrize("keep_bytes", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1])
def test_truncation_names_the_lost_bytes_and_still_checks_the_rest(step: Path, keep_bytes: int) -> None:
    size = (step / DATA_0).stat().st_size
    os.truncate(step / DATA_0, keep_bytes)
    (problem,) = problems(step)
    assert problem.kind == "truncated"
    assert f"{keep_bytes} of {size} bytes" in problem.message
    assert (problem.start, problem.stop) == (keep_bytes // BLOCK_BYTES * BLOCK_BYTES, size)
    assert problem.values == VALUES
    if keep_bytes >= BLOCK_BYTES:
        flip(step / DATA_0, 5000)
        assert [one.kind for one in problems(step)] == ["truncated", "block"]


def test_trailing_bytes_are_found_though_every_block_is_right(step: Path) -> None:
    with open(step / DATA_1, "ab") as file:
        file.write(b"garbage")
    (problem,) = problems(step)
    assert (problem.kind, problem.tensors) == ("trailing", ())
    assert "7 bytes too many" in problem.message


def test_swapped_files_are_found(step: Path) -> None:
    (step / DATA_0).rename(step / "saved")
    (step / DATA_1).rename(step / DATA_0)
    (step / "saved").rename(step / DATA_1)
    paths = {problem.path for problem in problems(step)}
    assert paths == {f"{STEP}/{DATA_0}", f"{STEP}/{DATA_1}"}


def test_swapped_fragments_are_found(step: Path) -> None:
    (step / FRAGMENT_0).rename(step / "saved")
    (step / FRAGMENT_1).rename(step / FRAGMENT_0)
    (step / "saved").rename(step / FRAGMENT_1)
    assert [(one.kind, one.path) for one in problems(step)] == [
        ("fragment", f"{STEP}/{FRAGMENT_0}"),
        ("fragment", f"{STEP}/{FRAGMENT_1}"),
    ]


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda path: flip(path, 30), "fragment"),
        (lambda path: os.truncate(path, 10), "fragment"),
        (lambda path: os.truncate(path, 0), "fragment"),
        (lambda path: path.write_bytes(path.read_bytes() + b" "), "fragment"),
        (lambda path: path.unlink(), "missing"),
    ],
    ids=["flip", "truncate", "empty", "trailing", "missing"],
)
def test_a_damaged_fragment_is_found_and_sizes_are_checked_without_it(
    step: Path, damage: Callable[[Path], None], kind: str
) -> None:
    damage(step / FRAGMENT_1)
    os.truncate(step / DATA_1, 5)
    assert [(one.kind, one.path) for one in problems(step)] == [
        (kind, f"{STEP}/{FRAGMENT_1}"),
        ("truncated", f"{STEP}/{DATA_1}"),
    ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.replace(b'"world_size":2', b'"world_size":1'),
        lambda data: data.replace(b'"step":10', b'"step":11'),
        lambda data: data.replace(b"e0001-s000001", b"../../../e-s1"),
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"[]",
    ],
    ids=["world", "step", "traversal", "truncated", "empty", "list"],
)
def test_an_edited_manifest_is_found_by_every_name(step: Path, damage: Callable[[bytes], bytes]) -> None:
    manifest = step / "manifest.json"
    manifest.write_bytes(damage(manifest.read_bytes()))
    for target in (step, f"{step.parent}@10", step.parent):
        (problem,) = verify(target).problems
        assert problem.kind == "manifest"
        assert problem.path.endswith(f"{STEP}/manifest.json")


def test_a_run_reports_each_checkpoint_and_what_it_skipped(step: Path) -> None:
    storage = open_storage(step.parent)
    write_tiny_checkpoint(storage, step=20)
    write_tiny_checkpoint(storage, step=30)
    write_tiny_checkpoint(storage, step=40, commit=False)
    newer = step.parent / "step-00000050" / "manifest.json"
    newer.parent.mkdir()
    newer.write_bytes(b'{"format":"dcp_ckpt.manifest","format_version":2}')
    flip(step.parent / "step-00000020" / DATA_0, 100)
    report = verify(step.parent)
    assert [(one.step, len(one.problems)) for one in report.checkpoints] == [(10, 0), (20, 1), (30, 0)]
    assert [skipped.directory for skipped in report.skipped] == ["step-00000040", "step-00000050"]
    assert "no manifest" in report.skipped[0].reason
    assert "upgrade" in report.skipped[1].reason


def test_what_is_not_there_is_not_damage(step: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "none", f"{tmp_path}/none@latest", f"{step.parent}@99"):
        with pytest.raises(CheckpointNotFound):
            verify(target)
    assert not (tmp_path / "none").exists()


def test_a_newer_version_is_not_damage(step: Path) -> None:
    manifest = step / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"format_version":1', b'"format_version":2'))
    with pytest.raises(FormatTooNew):
        verify(step)


def test_a_directory_in_place_of_a_file_does_not_stop_the_rest(step: Path) -> None:
    (step / FRAGMENT_0).unlink()
    (step / FRAGMENT_0).mkdir()
    flip(step / DATA_1, 0)
    kinds = [problem.kind for problem in problems(step)]
    assert kinds[-1] == "block"
    assert len(kinds) == 2


class Denied(ForwardingStorage):
    """Nobody may read anything but the manifest and the fragments."""

    def __init__(self, inner: Storage, error: StorageError) -> None:
        super().__init__(inner)
        self._error = error

    def read_ranges(self, ranges: Sequence[ByteRange], *_: Any, **__: Any) -> None:
        raise self._error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StorageError("denied", errno=errno.EACCES), "unchecked"),
        (StorageTransient("slow down"), "unchecked"),
        (StorageError("bad disk", errno=errno.EIO), "unreadable"),
    ],
)
def test_what_may_not_be_read_is_told_apart_from_damage(
    step: Path, monkeypatch: pytest.MonkeyPatch, error: StorageError, kind: str
) -> None:
    monkeypatch.setattr(
        sys.modules[verify.__module__], "open_storage", lambda url: Denied(open_storage(url), error)
    )
    report = verify(step)
    assert {problem.kind for problem in report.problems} == {kind}
    assert not report.ok
    assert report.is_damaged == (kind == "unreadable")
    assert invoke("verify", step).exit_code == (4 if kind == "unreadable" else 1)


def test_progress_reaches_all_bytes_whatever_is_wrong(step: Path) -> None:
    total = sum(path.stat().st_size for path in step.glob("*.distcp"))
    (step / DATA_0).unlink()
    flip(step / DATA_1, 0)
    for target in (step, step.parent):
        told: list[tuple[int, int]] = []
        verify(target, progress=lambda done, of, told=told: told.append((done, of)))  # type: ignore[misc]
        assert {of for _, of in told} == {total}
        assert [done for done, _ in told] == sorted(done for done, _ in told)
        assert told[-1][0] == total
        assert len(told) > 3  # by blocks, not by files


def test_a_long_list_of_names_is_cut_in_text_only() -> None:
    names = tuple(f"tensor{number:02}" for number in range(30))
    problem = Problem(kind="block", path="file", message="differs", tensors=names)
    assert str(problem).endswith("tensor tensor09 and 20 more")
    assert problem.tensors == names


def test_bytes_are_traced_back_to_names(step: Path) -> None:
    first = fragment(step, 0)
    file_map = FileMap(first, 0)
    for chunk in first.chunks:
        stop = chunk.container_offset + chunk.container_bytes
        assert file_map.touched(chunk.container_offset, chunk.container_offset + 1).tensors == (chunk.tensor,)
        assert file_map.touched(stop - 1, stop).tensors == (chunk.tensor,)
    end = max(chunk.container_offset + chunk.container_bytes for chunk in first.chunks)
    padding = file_map.touched(end, end + 1)
    assert (padding.tensors, padding.values) == ((), ())
    assert FileMap(None, 0).touched(0, 1 << 30).tensors == ()
    assert FileMap(first, 1).touched(0, 1 << 30).tensors == ()
