"""Between disk and a real S3 server: copies are the same bytes, and pins and prunes hold there too."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcp_ckpt import copy_checkpoint, open_checkpoint, plan_load, verify
from dcp_ckpt.errors import CorruptCheckpoint, StorageExists
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.lifecycle.pins import pin
from dcp_ckpt.lifecycle.prune import prune_run
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.policies import LatestN
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint

STEP = "step-00000010"


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 0's file goes up in several parts."""
    run = tmp_path_factory.mktemp("run")
    write_tiny_checkpoint(open_storage(run), step=10, ranks=1, shape=(1000, 5000))
    (run / STEP / ".metadata").write_bytes(b"for stock readers")
    return run / STEP


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_there_from_bucket_to_bucket_and_back(step: Path, s3_prefix: str, tmp_path: Path) -> None:
    assert copy_checkpoint(step, f"{s3_prefix}/backup/").path == f"{s3_prefix}/backup/{STEP}"
    again = copy_checkpoint(step, f"{s3_prefix}/backup")
    assert (again.path, again.copied_bytes) == (f"{s3_prefix}/backup/{STEP}", 0)
    copied = copy_checkpoint(f"{s3_prefix}/backup/{STEP}", f"{s3_prefix}/other")
    assert copied.path == f"{s3_prefix}/other"
    assert verify(copied.path).ok
    copy_checkpoint(f"{s3_prefix}/other", tmp_path / "back")
    assert files(tmp_path / "back") == files(step)
    with open_checkpoint(copied.path) as checkpoint, open_checkpoint(step) as original:
        assert plan_load(checkpoint, 3).ranks == plan_load(original, 3).ranks


def test_damage_in_the_source_leaves_no_checkpoint(step: Path, s3_prefix: str, tmp_path: Path) -> None:
    storage = open_storage(f"{s3_prefix}/run")
    for name, data in files(step).items():
        wrong = bytearray(data)
        if name.endswith(".distcp"):
            wrong[11 << 20] ^= 1
        storage.put(f"{STEP}/{name}", wrong)
    with pytest.raises(CorruptCheckpoint, match="block 11 "):
        copy_checkpoint(f"{s3_prefix}/run/{STEP}", f"{s3_prefix}/copy")
    assert open_storage(f"{s3_prefix}/copy").list("") == []
    with pytest.raises(CorruptCheckpoint, match="block 11 "):
        copy_checkpoint(f"{s3_prefix}/run/{STEP}", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_prune_spares_pins_and_its_names_stay_taken(step: Path, s3_prefix: str) -> None:
    storage = open_storage(f"{s3_prefix}/run")
    run_id = ensure_run(storage).run_id
    for number in (10, 20, 30):
        write_tiny_checkpoint(storage, step=number, run_id=run_id)
    assert pin(storage, read_catalogue(storage).entries[1])
    report = prune_run(storage, LatestN(1), grace_seconds=0.0)
    assert [item.step for item in report.removed] == [10]
    assert [entry.step for entry in read_catalogue(storage).entries] == [20, 30]
    assert [info.key for info in storage.list(f"{STEP}/")] == [f"{STEP}/manifest.json"]
    with pytest.raises(StorageExists, match="was removed there"):
        copy_checkpoint(step, f"{s3_prefix}/run/")
