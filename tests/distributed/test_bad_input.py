"""What cannot work is refused at once, with an error that says what to do; no processes are needed."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from dcp_ckpt import Checkpointer, TrainState, load_checkpoint
from dcp_ckpt.errors import (
    CheckpointNotFound,
    ConfigError,
    FormatTooNew,
    StateMismatch,
    StorageError,
)
from dcp_ckpt.format.digests import digest
from dcp_ckpt.format.documents import encode_json
from tests.distributed import worlds


def good() -> dict[str, Any]:
    return {"t": torch.arange(5), "n": 1}


def save(path, state=None, step=1):
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        checkpointer.save(state or good(), step=step).result(30)
    return path / f"step-{step:08}"


def test_several_processes_without_a_process_group_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"(?s)WORLD_SIZE is 2 .*init_process_group"):
        Checkpointer(tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_process_without_a_process_group_works(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    save(tmp_path)
    state: dict[str, Any] = {"t": torch.zeros(5, dtype=torch.int64), "n": 0}
    with Checkpointer(tmp_path) as checkpointer:
        report = checkpointer.load(state)
    assert report is not None
    assert (report.step, report.world_size, state["n"]) == (1, 1, 1)
    assert torch.equal(state["t"], torch.arange(5))


def test_nothing_was_ever_saved_is_no_error(tmp_path):
    with Checkpointer(tmp_path / "new") as checkpointer:
        assert checkpointer.load(good()) is None
        with pytest.raises(CheckpointNotFound, match="no checkpoint of step 3"):
            checkpointer.load(good(), 3)


@pytest.mark.parametrize("root", ["file", "/proc"])
def test_place_that_cannot_be_written_is_named(tmp_path, root):
    (tmp_path / "file").write_text("in the way")
    path = f"{tmp_path / 'file' if root == 'file' else root}/run"
    with pytest.raises(StorageError, match=re.escape(path)) as caught:
        Checkpointer(path)
    assert caught.value.errno is not None


def rewrite_manifest(step, **changes):
    """A manifest with other fields, and a digest that is right."""
    path = step / "manifest.json"
    fields = msgspec.json.decode(path.read_bytes()) | changes
    del fields["digest"]
    path.write_bytes(encode_json(fields | {"digest": digest(encode_json(fields))}))


def test_newer_format_is_told_apart_from_damage(tmp_path):
    step = save(tmp_path)
    rewrite_manifest(step, format_version=99)
    for load in (lambda c: c.load(good(), 1), lambda c: c.load(good(), str(step)), lambda c: c.load(good())):
        with Checkpointer(tmp_path) as checkpointer, pytest.raises(FormatTooNew, match="99"):
            load(checkpointer)
    with pytest.raises(FormatTooNew, match="99"):
        load_checkpoint(step, good())


def test_directory_that_is_no_checkpoint_is_not_found(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointNotFound, match="other is not a checkpoint"):
        load_checkpoint(tmp_path / "other", good())
    with pytest.raises(CheckpointNotFound, match="absent"):
        load_checkpoint(tmp_path / "absent", good())


@pytest.mark.parametrize("step", [-1, 1.5, True, "1", 10**18])
def test_step_must_be_a_whole_number(tmp_path, step):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ConfigError, match="step must be"):
        checkpointer.save(good(), step=step)


def test_closed_checkpointer_refuses(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.close()
    checkpointer.close()
    with pytest.raises(ConfigError, match="closed"):
        checkpointer.save(good(), step=1)


class Layers(nn.Module):
    def __init__(self, **shapes):
        super().__init__()
        for name, (shape, dtype) in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))


def test_everything_that_does_not_fit_is_in_one_error_and_nothing_is_changed(tmp_path):
    plain = ((2, 2), torch.float32)
    stored = Layers(same=plain, taller=plain, wider=plain, old_a=plain, old_b=plain)
    with torch.no_grad():
        for parameter in stored.parameters():
            parameter.fill_(1)
    save(tmp_path, TrainState(model=stored, extra={"n": 5}))
    live = Layers(
        same=plain,
        taller=((3, 2), torch.float32),
        wider=((2, 2), torch.float64),
        new_a=plain,
        new_b=plain,
        new_c=plain,
    )
    extra = {"n": 0}
    torch.manual_seed(0)
    random = torch.get_rng_state()
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(StateMismatch) as caught:
        checkpointer.load(TrainState(model=live, extra=extra))
    message = str(caught.value)
    assert "7 problems" in message
    for part in (
        "missing (3)", "model.new_a", "model.new_b", "model.new_c",
        "unexpected (2)", "model.old_a", "model.old_b",
        "shape (1)", "model.taller: checkpoint [2, 2], state [3, 2]",
        "dtype (1)", "model.wider: checkpoint torch.float32, state torch.float64",
    ):  # fmt: skip
        assert part in message
    assert "same" not in message
    assert all(not parameter.any() for parameter in live.parameters())
    assert extra == {"n": 0}
    assert torch.equal(torch.get_rng_state(), random)
