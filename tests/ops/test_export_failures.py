"""A failed or killed export leaves nothing that could be taken for an export."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_ckpt import export, open_checkpoint
from dcp_ckpt.errors import (
    CheckpointError,
    CorruptCheckpoint,
    LoadError,
    StorageError,
    StorageExists,
    StorageFull,
    StorageTransient,
)
from dcp_ckpt.ops.exporting.payloads import Payloads
from dcp_ckpt.ops.exporting.plan import ExportTensor
from dcp_ckpt.storage.keys import is_temporary
from dcp_ckpt.storage.local import LocalStorage
from dcp_ckpt.testing.interposition import PowerCut, PowerCutAt, SystemCall, interposed, watched_calls
from tests.failing_calls import failing
from tests.ops.exports import files, read_safetensors, same_bits, saved
from tests.small_disks import mounted_disk

MODEL = {f"layers.{number}": torch.full((64, 64), float(number)) for number in range(4)}
SHARDED: dict[str, Any] = {"max_shard_bytes": 40_000}
FORMATS = ["safetensors", "shards", "torch", "dcp"]


@pytest.fixture(autouse=True)
def hard_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports go to a file system of which every call is seen, with hard links unless a test says no."""
    calls = watched_calls(hard_links=getattr(request, "param", True))
    module = import_module("dcp_ckpt.ops.export")
    monkeypatch.setattr(module, "open_storage", lambda url: LocalStorage(url, calls=calls))


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("run"), {"model": MODEL})


def export_as(kind: str, ref: str, directory: Path, **options: Any) -> None:
    """Export below `directory` in one of FORMATS."""
    if kind == "shards":
        export(ref, directory, **SHARDED, **options)
    elif kind == "torch":
        export(ref, directory / "model.pt", format="torch", **options)
    else:
        export(ref, directory, format=kind, **options)  # type: ignore[arg-type]


def is_offered(kind: str, directory: Path) -> bool:
    """Whether a loader would take what is there for an export; then all of it must be right."""
    last = {
        "safetensors": "model.safetensors",
        "shards": "model.safetensors.index.json",
        "torch": "model.pt",
        "dcp": ".metadata",
    }[kind]
    return (directory / last).exists()


def read(kind: str, directory: Path) -> dict[str, torch.Tensor]:
    if kind == "torch":
        found: dict[str, torch.Tensor] = torch.load(directory / "model.pt", weights_only=True)
        return found
    if kind == "dcp":
        with open_checkpoint(directory) as checkpoint:
            return {name.removeprefix("model."): checkpoint.read_tensor(name) for name in checkpoint.tensors}
    return read_safetensors(directory)


def assert_right(kind: str, directory: Path) -> None:
    same_bits(read(kind, directory), MODEL)


class FailAt:
    """Lets one call below a directory fail; what cleans up afterwards works."""

    def __init__(self, number: int, root: Path) -> None:
        self._number = number
        self._pattern = f"{root}/*"
        self.count = 0

    def __call__(self, call: SystemCall) -> None:
        if call.after or not (call.matches(self._pattern) or call.matches(self._pattern[:-2])):
            return
        self.count += 1
        if self.count == self._number:
            raise OSError(errno.EIO, os.strerror(errno.EIO), call.paths[-1])


@pytest.mark.parametrize("hard_links", [True, False], ids=["links", "no links"], indirect=True)
@pytest.mark.parametrize("kind", FORMATS)
def test_whatever_call_fails_nothing_half_written_stays(kind: str, ref: str, tmp_path: Path) -> None:
    counting = FailAt(0, tmp_path / "0")
    with interposed(counting):
        export_as(kind, ref, tmp_path / "0")
    assert_right(kind, tmp_path / "0")
    assert counting.count > 8
    for number in range(1, counting.count + 1):
        out = tmp_path / str(number)
        with pytest.raises(StorageError) as caught, interposed(FailAt(number, out)):
            export_as(kind, ref, out)
        assert caught.value.errno == errno.EIO
        assert files(out) == {}, f"call {number} left something"


@pytest.mark.parametrize("kind", FORMATS)
def test_killed_at_any_moment_it_is_whole_or_no_export(kind: str, ref: str, tmp_path: Path) -> None:
    counting = PowerCutAt(0, root=tmp_path / "0")
    with interposed(counting):
        export_as(kind, ref, tmp_path / "0")
    for number in range(1, counting.num_moments + 1):
        out = tmp_path / str(number)
        with pytest.raises(PowerCut), interposed(PowerCutAt(number, root=out)):
            export_as(kind, ref, out)
        if is_offered(kind, out):
            assert_right(kind, out)
        if number % 7 == 0:
            # What the first try left is not in the way of a second one.
            export_as(kind, ref, out, force=True)
            assert_right(kind, out)


@pytest.mark.parametrize("kind", FORMATS)
def test_killed_while_it_replaces_another_nothing_is_mixed(kind: str, ref: str, tmp_path: Path) -> None:
    """What is offered is the old export or the new one; a single file is one of the two at any moment."""
    export_as(kind, ref, tmp_path / "old", dtype="float64")
    counting = PowerCutAt(0, root=tmp_path / "0")
    shutil.copytree(tmp_path / "old", tmp_path / "0")
    with interposed(counting):
        export_as(kind, ref, tmp_path / "0", force=True)
    offered = set()
    for number in range(1, counting.num_moments + 1):
        out = tmp_path / str(number)
        shutil.copytree(tmp_path / "old", out)
        with pytest.raises(PowerCut), interposed(PowerCutAt(number, root=out)):
            export_as(kind, ref, out, force=True)
        if not is_offered(kind, out):
            assert kind in ("shards", "dcp")
            continue
        found = read(kind, out)
        dtype = found["layers.0"].dtype
        offered.add(dtype)
        same_bits(found, {name: tensor.to(dtype) for name, tensor in MODEL.items()})
    assert offered == {torch.float64, torch.float32}


@pytest.mark.parametrize("kind", FORMATS)
def test_damage_found_on_the_way_leaves_nothing(kind: str, ref: str, tmp_path: Path) -> None:
    run = Path(ref.partition("@")[0])
    shutil.copytree(run, tmp_path / "run")
    (data,) = (tmp_path / "run").glob("step-*/*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match="differs from its digest"):
        export_as(kind, f"{tmp_path / 'run'}@10", tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_what_is_there_is_replaced_only_when_asked(ref: str, tmp_path: Path) -> None:
    for kind in FORMATS:
        out = tmp_path / kind
        export_as(kind, ref, out)
        (out / "config.json").write_text("mine")
        before = files(out)
        with pytest.raises(StorageExists, match="is there already; choose another place, or replace it"):
            export_as(kind, ref, out)
        assert files(out) == before
        export_as(kind, ref, out, force=True)
        assert files(out).keys() == before.keys()
        assert_right(kind, out)


def test_files_of_an_older_export_do_not_stay_beside_the_new_one(ref: str, tmp_path: Path) -> None:
    """Loaders prefer the one file to the index, and would read the old model."""
    export(ref, tmp_path, dtype="bf16")
    export(ref, tmp_path, **SHARDED, force=True)
    assert "model.safetensors" not in files(tmp_path)
    assert_right("shards", tmp_path)
    export(ref, tmp_path, force=True)
    assert files(tmp_path).keys() == {"model.safetensors"}
    assert_right("safetensors", tmp_path)


def test_a_name_that_is_taken_meanwhile_is_not_replaced(ref: str, tmp_path: Path) -> None:
    def take(done: int, total: int) -> None:
        if done == total:
            (tmp_path / "model.safetensors").write_text("another's")

    with pytest.raises(StorageExists):
        export(ref, tmp_path, progress=take)
    assert files(tmp_path) == {"model.safetensors": b"another's"}


def test_what_came_beside_it_meanwhile_is_seen(ref: str, tmp_path: Path) -> None:
    """Loaders prefer the one file, whoever wrote it."""

    def export_another(done: int, total: int) -> None:
        if done == total:
            export(ref, tmp_path, dtype="bf16")

    with pytest.raises(StorageExists):
        export(ref, tmp_path, **SHARDED, progress=export_another)
    assert files(tmp_path).keys() == {"model.safetensors"}
    (tmp_path / "model.safetensors").unlink()
    export(ref, tmp_path, **SHARDED, progress=export_another, force=True)
    assert_right("shards", tmp_path)


def test_two_that_replace_at_once_are_not_mixed(
    ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One index would name the shards of both, and nothing would tell that they are of two models."""
    monkeypatch.setattr("dcp_ckpt.storage.directories._LONGEST_LOCK_SECONDS", 0.0)
    tried: list[SystemCall] = []

    def replace_as_well(call: SystemCall) -> None:
        if call.name == "replace" and call.after and not tried:
            tried.append(call)
            with suppress(StorageTransient):  # cannot lock the directory
                export(ref, tmp_path, dtype="float64", max_shard_bytes=80_000, force=True)

    with interposed(replace_as_well):
        export(ref, tmp_path, **SHARDED, force=True)
    assert tried
    assert_right("shards", tmp_path)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_has_replaced_another_stays_when_the_last_sync_fails(
    kind: str, ref: str, tmp_path: Path
) -> None:
    """The old export is gone by then, and the new one is whole."""
    export_as(kind, ref, tmp_path, dtype="float64")
    last = {"torch": "model.pt", "dcp": ".metadata"}.get(kind, "model.safetensors")
    last += ".index.json" if kind == "shards" else ""
    is_replaced = False

    def fail_behind(call: SystemCall) -> None:
        nonlocal is_replaced
        is_replaced |= call.name == "replace" and call.after and call.matches(f"{tmp_path}/{last}")
        if is_replaced and call.name == "fsync" and not call.after:
            raise OSError(errno.EIO, os.strerror(errno.EIO), call.paths[-1])

    with pytest.raises(StorageError), interposed(fail_behind):
        export_as(kind, ref, tmp_path, force=True)
    assert_right(kind, tmp_path)


def test_what_the_progress_raises_ends_it(ref: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(ref, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    seen.clear()
    report = export(ref, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (report.num_bytes, report.num_bytes)


def test_a_tensor_that_memory_cannot_hold_is_named(ref: str) -> None:
    name, shape = "model.layers.0", (1 << 45, 64)
    with open_checkpoint(ref) as checkpoint:
        source = checkpoint.source()
        source.tensors[name] = replace(source.tensors[name], shape=list(shape))  # type: ignore[index]
        tensor = ExportTensor(
            name="w", path=("w",), stored=name, stored_dtype="float32", dtype="float32", shape=shape
        )
        with pytest.raises(LoadError, match=rf"no memory to read {name}, which has \d+ bytes"):
            next(Payloads(source, [tensor]).read([tensor]))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path / "disk", size_bytes=65_536) as disk:
        yield disk


def test_a_disk_without_room_is_found_before_anything_is_written(ref: str, small_disk: Path) -> None:
    with pytest.raises(
        StorageFull, match=r"no room for the export: \d+ bytes needed, \d+ bytes free"
    ) as caught:
        export(ref, small_disk / "out")
    assert caught.value.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == []
    export(ref, small_disk / "out", include="model.layers.0")
    assert read_safetensors(small_disk / "out").keys() == {"layers.0"}


def test_a_disk_that_fills_up_on_the_way_is_named(ref: str, tmp_path: Path) -> None:
    with (
        failing("pwrite", f"{tmp_path}/out/*", errno.ENOSPC),
        pytest.raises(StorageFull, match="bytes needed"),
    ):
        export(ref, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_temporary_names_are_those_that_others_know(ref: str, tmp_path: Path) -> None:
    seen: set[str] = set()
    with pytest.raises(CheckpointError), failing("fsync", f"{tmp_path}/*.tmp", errno.EIO):
        export(
            ref, tmp_path, progress=lambda done, total: seen.update(path.name for path in tmp_path.iterdir())
        )
    assert seen
    assert all(map(is_temporary, seen))
