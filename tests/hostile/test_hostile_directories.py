"""What else may stand in a run: links, pipes, odd names, and one file of a checkpoint bent at random."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_ckpt import CheckpointConfig, Checkpointer, LatestN, load_checkpoint, verify
from dcp_ckpt.errors import CheckpointError, CorruptCheckpoint, FormatTooNew, StorageError
from dcp_ckpt.format.names import StepDir
from dcp_ckpt.lifecycle.catalogue import read_catalogue
from dcp_ckpt.lifecycle.marks import read_marks, write_mark
from dcp_ckpt.lifecycle.recover import recover_run
from dcp_ckpt.lifecycle.runs import ensure_run
from dcp_ckpt.ops.checkpoint import open_checkpoint
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import tiny_weight, write_tiny_checkpoint
from tests.hostile.documents import mutations

SHAPE = (6, 4)
STEP = "step-00000007"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """One committed checkpoint of step 7, and a directory beside the run that is nobody's."""
    storage = open_storage(tmp_path / "run")
    document = ensure_run(storage)
    write_tiny_checkpoint(storage, step=7, shape=SHAPE, run_id=document.run_id)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_bytes(b"precious")
    return tmp_path / "run"


def content(directory: Path) -> dict[str, bytes]:
    """What the regular files below hold, also of those behind links."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def recover(run: Path) -> None:
    recover_run(open_storage(run), force=False, wait_seconds=5.0)


def test_a_step_directory_that_is_a_link_is_neither_read_nor_removed(run, tmp_path):
    """Not even one that leads to a checkpoint of this very run: whoever follows it deletes somewhere else."""
    shutil.copytree(run / STEP, tmp_path / "outside" / STEP)
    (run / STEP).rename(run / "step-00000006.moved")
    (run / STEP).symlink_to(tmp_path / "outside" / STEP)
    before = content(tmp_path / "outside")
    catalogue = read_catalogue(open_storage(run))
    assert [(str(one.directory), one.state) for one in catalogue.rejected] == [(STEP, "unreadable")]
    assert "symbolic links are not followed" in catalogue.rejected[0].reason
    with pytest.raises(CorruptCheckpoint, match="symbolic links"):
        open_checkpoint(f"{run}@7")
    (problem,) = verify(run).problems
    assert problem.path == f"{STEP}/manifest.json"
    recover(run)
    config = CheckpointConfig(keep=LatestN(1), grace_seconds=0.0, timeout_seconds=20.0)
    state = {"w": torch.zeros(2)}
    with Checkpointer(run, config=config) as checkpointer:
        with pytest.raises(CorruptCheckpoint):
            checkpointer.load(state)
        checkpointer.save(state, step=8).result(20)
        checkpointer.prune()
    assert (run / STEP).is_symlink()
    assert content(tmp_path / "outside") == before


def test_a_link_that_the_user_names_is_followed(run, tmp_path):
    (tmp_path / "latest").symlink_to(run / STEP)
    with open_checkpoint(tmp_path / "latest") as checkpoint:
        assert checkpoint.manifest.step == 7
    assert verify(tmp_path / "latest").ok
    state = {"model": {"weight": torch.zeros(SHAPE)}, "optim": {"lr": None}}
    with suppress(CheckpointError):
        load_checkpoint(tmp_path / "latest", state)  # it holds more than this state
    (tmp_path / "runs").symlink_to(run)
    assert len(read_catalogue(open_storage(tmp_path / "runs")).entries) == 1


@pytest.mark.parametrize("name", ["epochs", "marks", "trash"])
def test_directories_of_a_run_that_are_links_are_not_written_through(run, tmp_path, name):
    (run / name).mkdir(exist_ok=True)
    (run / name).rename(run / f"{name}.moved")
    (run / name).symlink_to(tmp_path / "outside")
    write_tiny_checkpoint(open_storage(run), step=9, epoch=1, save=2, commit=False)
    before = content(tmp_path / "outside")
    for act in (
        lambda: recover(run),
        lambda: write_mark(
            open_storage(run), StepDir(7), kind="bad", epoch=1, step=7, attempt="e0001-s000001"
        ),
        lambda: read_marks(open_storage(run)),
        lambda: verify(run),
    ):
        with suppress(CheckpointError):
            act()
    assert content(tmp_path / "outside") == before


def test_links_in_an_attempt_are_not_taken_for_its_files(run, tmp_path):
    """A fragment and a data file outside of the run would complete the attempt."""
    storage = open_storage(run)
    write_tiny_checkpoint(storage, step=9, save=2, run_id=ensure_run(storage).run_id, commit=False)
    for path in list((run / "step-00000009").iterdir()):
        outside = tmp_path / "outside" / path.name
        path.rename(outside)
        path.symlink_to(outside)
    before = content(tmp_path / "outside")
    recover(run)
    assert not (run / "step-00000009" / "manifest.json").exists()
    assert content(tmp_path / "outside") == before
    assert [entry.step for entry in read_catalogue(open_storage(run)).entries] == [7]


NO_FILES = {"directory": Path.mkdir, "pipe": os.mkfifo, "link": lambda path: path.symlink_to("/dev/zero")}


@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
@pytest.mark.parametrize("name", ["run.json", "marks/step-00000007/pin-" + "0" * 32 + ".json"])
def test_what_is_no_file_in_the_place_of_one_is_not_waited_for(run, make, name):
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(StorageError, match=r"not a regular file|symbolic links"):
        open_storage(run).read(name)
    with suppress(CheckpointError):
        recover(run)
    with suppress(CheckpointError):
        read_catalogue(open_storage(run))


@pytest.mark.parametrize(
    "name",
    ["step-00000010.e99999999", "step-0000000x", "step-" + "9" * 200, "step-00000010.e0", "step-00000007.e"],
)
def test_odd_names_of_directories_hurt_nobody(run, name):
    (run / name).mkdir()
    (run / name / "file").write_bytes(b"x")
    if name == "step-00000010.e99999999":
        with pytest.raises(CorruptCheckpoint, match="epoch 99999999 was there"):
            recover(run)
        assert len(list((run / "epochs").iterdir())) < 5, "the gap is not filled with files"
    else:
        recover(run)
        assert (run / name / "file").exists()
    assert [entry.step for entry in read_catalogue(open_storage(run)).entries] == [7]


def test_nothing_is_removed_beside_a_checkpoint_of_a_newer_version(run):
    manifest = run / STEP / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"format_version":1', b'"format_version":2'))
    write_tiny_checkpoint(open_storage(run), step=9, commit=False)
    before = content(run / STEP) | content(run / "step-00000009")
    with pytest.raises(FormatTooNew):
        recover(run)
    assert content(run / STEP) | content(run / "step-00000009") == before


def mutilated(data: bytes) -> st.SearchStrategy[bytes]:
    flip = st.tuples(st.integers(0, len(data) - 1), st.integers(0, 7)).map(
        lambda at: data[: at[0]] + bytes([data[at[0]] ^ 1 << at[1]]) + data[at[0] + 1 :]
    )
    cut = st.integers(0, len(data) - 1).map(lambda end: data[:end])
    return (
        flip | cut | st.binary(max_size=40) | st.binary(min_size=1, max_size=9).map(lambda more: data + more)
    )


def test_one_bent_file_gives_right_values_or_an_error_of_ours(run, tmp_path):
    """Of every reader: what it returns is right, and what it raises is a CheckpointError."""
    pristine = content(run)
    candidates = sorted(pristine)
    strategies = {name: mutilated(pristine[name]) for name in candidates}
    for name in candidates:
        if name.endswith(".json"):
            strategies[name] |= mutations(msgspec.json.decode(pristine[name]), lambda fields: fields)

    @settings(max_examples=60)
    @given(st.sampled_from(candidates).flatmap(lambda name: st.tuples(st.just(name), strategies[name])))
    def check(change: tuple[str, bytes]) -> None:
        name, data = change
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(run, work)
        (work / name).write_bytes(data)
        storage = open_storage(work)
        with suppress(CheckpointError):
            read_catalogue(storage)
        with suppress(CheckpointError):
            verify(work)
        with suppress(CheckpointError), open_checkpoint(f"{work}@7") as checkpoint:
            assert checkpoint.read_tensor("model.weight").numpy().tobytes() == tiny_weight(SHAPE)
            assert checkpoint.read_value("optim.lr") == 0.001
        state: dict[str, Any] = {
            "model": {
                "weight": torch.zeros(SHAPE),
                "bias": torch.zeros(3, dtype=torch.bfloat16),
                "count": torch.zeros((), dtype=torch.int64),
                "empty": torch.zeros(0, 2),
            },
            "optim": {"betas": None, "lr": None, "schedule": None},
        }
        with suppress(CheckpointError):
            load_checkpoint(work / STEP, state)
            assert state["model"]["weight"].numpy().tobytes() == tiny_weight(SHAPE)
            assert state["optim"]["lr"] == 0.001
        with suppress(CheckpointError):
            recover(work)
        assert (work / STEP / "manifest.json").exists(), "no start removes it"

    check()
    assert content(tmp_path / "outside") == {"precious": b"precious"}
