"""The catalogue: what is a checkpoint, in which order, and why everything else is none."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dcp_ckpt.format.digests import digest
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.epoch import Tombstone, encode_epoch
from dcp_ckpt.format.names import StepDir
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.lifecycle.marks import write_mark
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.storage import Storage, open_storage
from dcp_ckpt.storage.forwarding import ForwardingStorage
from dcp_ckpt.testing.many_checkpoints import write_manifests
from dcp_ckpt.testing.tiny import write_tiny_checkpoint


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path)


def rewrite(path: Path, **fields: Any) -> None:
    """Change a manifest and make its own digest right again."""
    document = json.loads(path.read_bytes()) | fields
    document.pop("digest")
    path.write_bytes(encode_json(document | {"digest": digest(encode_json(document))}))


def test_a_run_that_does_not_exist_is_empty_and_stays_absent(tmp_path: Path) -> None:
    catalogue = read_catalogue(open_storage(tmp_path / "none"))
    assert (catalogue.run, catalogue.entries, catalogue.rejected, catalogue.latest) == (None, (), (), None)
    assert list(tmp_path.iterdir()) == []


def test_order_is_epoch_then_step(storage: Storage) -> None:
    write_tiny_checkpoint(storage, step=30, epoch=1)
    write_tiny_checkpoint(storage, step=20, epoch=2)
    write_tiny_checkpoint(storage, step=30, epoch=3, directory=StepDir(30, 3))
    catalogue = read_catalogue(storage)
    assert [entry.manifest.order for entry in catalogue.entries] == [(1, 30), (2, 20), (3, 30)]
    assert catalogue.latest is catalogue.entries[-1]
    assert catalogue.at_step(30) is catalogue.entries[-1]
    assert catalogue.at_step(20) is catalogue.entries[1]
    assert catalogue.at_step(10) is None


def test_marks_count_for_their_attempt_only(storage: Storage) -> None:
    for step in (10, 20):
        write_tiny_checkpoint(storage, step=step)
    for step, attempt in ((20, "e0001-s000001"), (10, "e0009-s000001")):
        write_mark(storage, StepDir(step), kind="bad", epoch=1, step=step, attempt=attempt)
    catalogue = read_catalogue(storage)
    assert [entry.is_bad for entry in catalogue.entries] == [False, True]
    assert catalogue.latest is catalogue.entries[0]
    assert catalogue.at_step(20) is catalogue.entries[1]


def test_best_uses_metrics_of_manifests_and_marks(storage: Storage) -> None:
    for step, loss in ((10, 0.5), (20, math.nan), (30, 0.4), (40, 0.4)):
        write_tiny_checkpoint(storage, step=step, metrics={"loss": loss})
    write_mark(
        storage, StepDir(20), kind="metrics", epoch=1, step=20, attempt="e0001-s000001", detail={"acc": 0.9}
    )
    catalogue = read_catalogue(storage)
    best = catalogue.best("loss", "min")
    assert best is catalogue.entries[3]
    assert catalogue.best("loss", "max") is catalogue.entries[0]
    assert catalogue.best("acc", "max") is catalogue.entries[1]
    assert catalogue.best("unknown", "min") is None
    assert math.isnan(catalogue.entries[1].metrics["loss"])
    assert catalogue.entries[1].candidate.metrics["acc"] == 0.9


def test_every_rejected_directory_has_its_reason(storage: Storage, tmp_path: Path) -> None:
    run_id = ensure_run(storage).run_id
    for step in range(10, 100, 10):
        write_tiny_checkpoint(storage, step=step, run_id=run_id if step != 90 else "f" * 32)
    manifest = [tmp_path / f"step-000000{step}" / "manifest.json" for step in range(10, 100, 10)]
    manifest[0].unlink()
    manifest[1].write_bytes(b"")
    manifest[2].write_bytes(manifest[2].read_bytes().replace(b'"step":30', b'"step":31'))
    rewrite(manifest[3], step=41)
    rewrite(manifest[4], format_version=2)
    manifest[5].write_bytes(encode_epoch(Tombstone(by_epoch=2, attempt="e0001-s000001")))
    manifest[6].write_bytes(manifest[7].read_bytes()[:-10])
    shutil.copytree(tmp_path / "step-00000080", tmp_path / "step-00000080.e5")
    (tmp_path / "step-99").mkdir()
    (tmp_path / "step-00000100").write_bytes(b"a file")

    catalogue = read_catalogue(storage)
    assert [entry.step for entry in catalogue.entries] == [80]
    reasons = {str(one.directory): (one.state, one.reason) for one in catalogue.rejected}
    assert {name: state for name, (state, _) in reasons.items()} == {
        "step-00000010": "uncommitted",
        "step-00000020": "unreadable",
        "step-00000030": "unreadable",
        "step-00000040": "unreadable",
        "step-00000050": "unreadable",
        "step-00000060": "removed",
        "step-00000070": "unreadable",
        "step-00000080.e5": "unreadable",
        "step-00000090": "unreadable",
    }
    assert "no manifest" in reasons["step-00000010"][1]
    assert "own digest does not match" in reasons["step-00000030"][1]
    assert "that of step 41" in reasons["step-00000040"][1]
    assert "upgrade" in reasons["step-00000050"][1]
    assert "that of epoch 1" in reasons["step-00000080.e5"][1]
    assert "another run" in reasons["step-00000090"][1]
    by_name = {str(one.directory): one for one in catalogue.rejected}
    assert by_name["step-00000010"].is_absent
    assert [name for name, one in by_name.items() if one.is_too_new] == ["step-00000050"]


def test_a_damaged_run_document_hides_no_checkpoint(
    storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_checkpoint(storage, step=10)
    (tmp_path / "run.json").write_bytes(b"garbage")
    catalogue = read_catalogue(storage)
    assert catalogue.run is None
    assert [entry.step for entry in catalogue.entries] == [10]
    assert "run.json" in caplog.text


def test_a_time_that_cannot_be_read_hides_no_checkpoint(storage: Storage) -> None:
    write_tiny_checkpoint(storage, step=10, created_at="yesterday")
    (entry,) = read_catalogue(storage).entries
    assert entry.created_at.year == 1970


class _SlowReads(ForwardingStorage):
    """Each read takes a while; `at_once` is how many of them there were at a time."""

    def __init__(self, inner: Storage, seconds: float) -> None:
        super().__init__(inner)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._reading = 0
        self.at_once = 0

    def read(self, key: str) -> bytes:
        with self._lock:
            self._reading += 1
            self.at_once = max(self.at_once, self._reading)
        try:
            time.sleep(self._seconds)
            return super().read(key)
        finally:
            with self._lock:
                self._reading -= 1


def test_manifests_are_read_side_by_side_where_each_read_takes_a_while(tmp_path: Path) -> None:
    write_manifests(tmp_path, steps=range(1, 41), world_size=2)
    slow = _SlowReads(open_storage(tmp_path), 0.005)
    catalogue = read_catalogue(slow)
    assert [entry.step for entry in catalogue.entries] == list(range(1, 41))
    assert [entry.metrics for entry in catalogue.entries] == [{"loss": step} for step in range(1, 41)]
    assert slow.at_once > 1
