"""Damage on the way of a load: found before it counts, named, passed over by "latest" and by nothing else."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_ckpt import CheckpointConfig, Checkpointer, LatestN, verify
from dcp_ckpt.coordination import SoloChannel
from dcp_ckpt.errors import CorruptCheckpoint
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.epoch import Tombstone, encode_epoch
from dcp_ckpt.format.manifest import decode_manifest
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.lifecycle.runs import RunDocument
from dcp_ckpt.load.choose import Which
from dcp_ckpt.load.loader import Loader
from dcp_ckpt.load.report import LoadReport
from dcp_ckpt.load.stored import StoredCheckpoint
from dcp_ckpt.ops.checkpoint import open_checkpoint
from dcp_ckpt.state.train_state import components_of
from dcp_ckpt.storage import open_storage
from dcp_ckpt.storage.memory import MemoryStorage
from dcp_ckpt.testing.tiny import TINY_RUN_ID, tiny_weight, write_tiny_checkpoint
from tests.hostile.damage import (
    BYTES,
    DATA,
    FRAGMENT,
    MANIFESTS,
    TABLES,
    Damage,
    append,
    edit_fragment,
    flip_payload,
    with_tensor,
)

SHAPE = (1000, 600)
ROWS = 4
NEW, OLD = "step-00000020", "step-00000010"
CONFIG = CheckpointConfig(keep=None, grace_seconds=0.0, timeout_seconds=20.0)
ALL = BYTES | TABLES | MANIFESTS


def cases(damages: Mapping[str, Damage]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("damage", damages.values(), ids=damages)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tiny old checkpoint and one of two ranks whose files have two blocks each."""
    path = tmp_path_factory.mktemp("original") / "run"
    storage = open_storage(path)
    document = RunDocument(
        run_id=TINY_RUN_ID, number=1, name=None, created_at="t", config={}, parent=None, host="h", git=None,
        versions={},
    )  # fmt: skip
    storage.put("run.json", encode_json(document))
    for step in (10, 20):
        write_tiny_checkpoint(storage, step=step, shape=SHAPE)
    return path


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def blank() -> dict[str, Any]:
    return {
        "model": {
            "weight": torch.full(SHAPE, -1.0),
            "bias": torch.zeros(3, dtype=torch.bfloat16),
            "count": torch.zeros((), dtype=torch.int64),
            "empty": torch.zeros(0, 2),
        },
        "optim": {"betas": None, "lr": None, "schedule": None},
    }


def load(run: Path, state: dict[str, Any], which: Which = "latest") -> LoadReport | None:
    storage = open_storage(run)
    loader = Loader(storage, str(run), SoloChannel(), CONFIG, tag="load")
    return loader.load(lambda: components_of(state), which, lambda: read_catalogue(storage))


def require_whole(state: dict[str, Any]) -> None:
    assert state["model"]["weight"].numpy().tobytes() == tiny_weight(SHAPE)
    assert (state["model"]["bias"].tolist(), state["model"]["count"].item()) == ([0.5, -1.0, 2.0], 7)
    assert state["optim"] == {
        "betas": (0.9, 0.999),
        "lr": 0.001,
        "schedule": {"epoch": 2, "warm": True},
    }


def files_of(directory: Path) -> dict[str, tuple[bool, int]]:
    """What stands in a directory, links and pipes included."""
    return {path.name: (path.is_symlink(), path.lstat().st_ino) for path in directory.iterdir()}


def marks_of(run: Path, step: str) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in (run / "marks" / step).glob("*"))


def test_without_damage_the_newest_is_loaded(run):
    state = blank()
    report = load(run, state)
    assert report is not None
    assert (report.step, report.rejected) == (20, ())
    require_whole(state)
    assert verify(run).ok


@cases(ALL)
def test_damage_is_named_by_all_and_passed_over_by_latest_alone(run, caplog, damage):
    damage.act(run / NEW)
    before = files_of(run / NEW)
    # By verify, which reads everything.
    verified = verify(run)
    assert {one.directory for one in verified.checkpoints if one.problems} == {NEW}
    assert any(damage.names in str(problem) for problem in verified.problems)
    # By a load of that very step: nothing else is loaded in its place.
    state = blank()
    with pytest.raises(CorruptCheckpoint) as caught:
        load(run, state, 20)
    assert damage.names in str(caught.value)
    assert NEW in str(caught.value)
    assert state["optim"] == blank()["optim"], "values are put back after everything was checked"
    assert not (run / "marks").exists()
    # By an automatic load, which goes on with the one before.
    with caplog.at_level(logging.WARNING, logger="dcp_ckpt"):
        report = load(run, state)
    assert report is not None
    assert report.step == 10
    require_whole(state)
    (rejected,) = report.rejected
    assert NEW in rejected.path
    is_no_checkpoint = damage in MANIFESTS.values()
    assert damage.names in rejected.reason or is_no_checkpoint
    assert any(NEW in record.getMessage() for record in caplog.records)
    assert marks_of(run, NEW) == ([] if is_no_checkpoint else ["bad"])
    assert marks_of(run, OLD) == []
    assert files_of(run / NEW) == before, "it is kept as it is"


def test_a_tensor_of_another_dtype_is_not_read_over_its_end(run):
    edit_fragment(0, with_tensor(dtype="float64"), sign=True)(run / NEW)
    assert not verify(run).ok
    with open_checkpoint(run / NEW) as checkpoint, pytest.raises(CorruptCheckpoint, match="do not fit into"):
        checkpoint.read_tensor("model.weight")


def test_the_message_says_tensor_file_and_bytes(run):
    flip_payload(1, "model.weight")(run / NEW)
    with pytest.raises(CorruptCheckpoint) as caught:
        load(run, blank(), 20)
    assert "block 0 (bytes 0 to 1048576) differs from its digest; it holds model.weight" in str(caught.value)
    assert caught.value.path == f"{NEW}/{DATA[1]}"


def test_bytes_after_the_end_are_not_read_and_verify_tells_of_them(run):
    for name in DATA:
        append(name, b"garbage")(run / NEW)
    state = blank()
    report = load(run, state)
    assert report is not None
    assert (report.step, report.rejected) == (20, ())
    require_whole(state)
    assert [(problem.kind, problem.tensors) for problem in verify(run).problems] == [("trailing", ())] * 2


def test_bytes_after_a_fragment_are_not_read_and_verify_tells_of_them(run):
    append(FRAGMENT[1], b" ")(run / NEW)
    state = blank()
    report = load(run, state)
    assert report is not None
    assert report.step == 20
    require_whole(state)
    assert [problem.kind for problem in verify(run).problems] == ["fragment"]


def test_without_verify_only_the_report_says_so(run):
    flip_payload(0, "model.weight")(run / NEW)
    storage = open_storage(run)
    config = CheckpointConfig(verify=False, timeout_seconds=20.0)
    state = blank()
    loader = Loader(storage, str(run), SoloChannel(), config, tag="load")
    report = loader.load(lambda: components_of(state), "latest", lambda: read_catalogue(storage))
    assert report is not None
    assert report.step == 20
    assert "verify=False" in report.unverified[0]


def test_nothing_is_started_over_damage(run):
    for step in (OLD, NEW):
        flip_payload(0, "model.weight")(run / step)
    for _ in range(2):  # found by reading, then by the marks
        with pytest.raises(CorruptCheckpoint):
            load(run, blank())
    assert marks_of(run, OLD) == marks_of(run, NEW) == ["bad"]


def test_what_is_marked_bad_stays_and_does_not_count(run):
    """Retention goes on around it: the marked one stays on disk, and two that are whole."""
    write_tiny_checkpoint(open_storage(run), step=15, shape=SHAPE)
    flip_payload(0, "model.weight")(run / NEW)
    config = CheckpointConfig(keep=LatestN(2), grace_seconds=0.0, timeout_seconds=20.0)
    state = blank()

    def kept(checkpointer: Checkpointer) -> list[str]:
        checkpointer.prune()
        return [info.path.rpartition("/")[2] for info in checkpointer.checkpoints()]

    with Checkpointer(run, config=config) as checkpointer:
        report = checkpointer.load(state)
        assert report is not None
        assert report.step == 15
        assert kept(checkpointer) == [OLD, "step-00000015", NEW], "the marked one is not one of the two"
        for step in (16, 20, 21):
            checkpointer.save(state, step=step).result(20)
        resumed = "step-00000015"
        assert kept(checkpointer) == [resumed, NEW, f"{NEW}.e2", "step-00000021"]
    assert marks_of(run, NEW) == ["bad"]
    with Checkpointer(run, config=config) as checkpointer:
        report = checkpointer.load(state)
        assert report is not None
        assert report.step == 21
        checkpointer.save(state, step=24).result(20)
        assert kept(checkpointer) == [NEW, "step-00000021", "step-00000024"]
    require_whole(state)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_start_never_removes_what_it_cannot_read(run, name):
    MANIFESTS[name].act(run / NEW)
    before = files_of(run / NEW)
    state = blank()
    config = CheckpointConfig(keep=LatestN(1), grace_seconds=0.0, timeout_seconds=20.0)
    with Checkpointer(run, config=config) as checkpointer:
        report = checkpointer.load(state)
        assert report is not None
        assert report.step == 10
        checkpointer.save(state, step=30).result(20)
    assert files_of(run / NEW) == before


def objects_of(run: Path) -> MemoryStorage:
    """The same run on an object store."""
    storage = MemoryStorage()
    for path in run.rglob("*"):
        if path.is_file():
            storage.put(str(path.relative_to(run)), path.read_bytes())
    return storage


@pytest.mark.parametrize("name", ["a bit of another rank's payload", "a truncated file", "a missing file",
    "an empty fragment", "chunks with a gap", "a fragment of 2^60 bytes"])  # fmt: skip
def test_on_an_object_store_it_is_the_same(run, name):
    damage = ALL[name]
    damage.act(run / NEW)
    storage = objects_of(run)
    state = blank()
    loader = Loader(storage, storage.url, SoloChannel(), CONFIG, tag="load")
    report = loader.load(lambda: components_of(state), "latest", lambda: read_catalogue(storage))
    assert report is not None
    assert report.step == 10
    assert damage.names in report.rejected[0].reason
    require_whole(state)
    assert read_catalogue(storage).entries[-1].is_bad


def test_deleted_while_reading_is_said_so_on_an_object_store(run):
    storage = objects_of(run)
    manifest = decode_manifest(storage.read(f"{NEW}/manifest.json"), path=NEW)
    stored = StoredCheckpoint(storage, NEW, manifest)
    storage.put(f"{NEW}/manifest.json", encode_epoch(Tombstone(by_epoch=2, attempt="")))
    storage.delete([f"{NEW}/{FRAGMENT[1]}"])
    with pytest.raises(CorruptCheckpoint, match="deleted while it was being read"):
        stored.per_rank(1)


def test_deleted_while_reading_is_said_so(run):
    """The manifest was read, and then the checkpoint was taken back and its files deleted."""
    storage = open_storage(run)
    manifest = decode_manifest(storage.read(f"{NEW}/manifest.json"), path=NEW)
    stored = StoredCheckpoint(storage, NEW, manifest)
    shutil.rmtree(run / NEW)
    with pytest.raises(CorruptCheckpoint, match="deleted while it was being read"):
        stored.per_rank(1)
