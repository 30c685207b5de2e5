"""`dcp_ckpt.dcp.Reader` in `dcp.load`, and what stock tools make of a checkpoint that `Writer` wrote."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt import open_checkpoint
from dcp_ckpt.dcp import Reader, Writer
from dcp_ckpt.errors import ConfigError, LoadError

STATE: dict[str, Any] = {
    "w": torch.arange(12.0).reshape(3, 4),
    "groups": [{"lr": 0.5, "moment": torch.ones(2)}, {"lr": 0.25, "moment": torch.zeros(())}],
    "n": 2**70,
}


def blank() -> dict[str, Any]:
    moments = [torch.full((2,), 9.0), torch.full((), 9.0)]
    return {"w": torch.zeros(3, 4), "groups": [{"lr": 0.0, "moment": m} for m in moments], "n": 0}


@pytest.fixture(params=["ours", "stock"])
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    if request.param == "ours":
        stock_save(STATE, storage_writer=Writer(tmp_path / "c"))
    else:
        stock_save(STATE, checkpoint_id=tmp_path / "c")
    return tmp_path / "c"


def test_tensors_and_values(saved: Path) -> None:
    target = blank()
    stock_load(target, storage_reader=Reader(saved))
    torch.testing.assert_close(target, STATE, rtol=0, atol=0)


def test_a_target_of_another_dtype_or_layout(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = {"w": torch.zeros(4, 3, dtype=torch.bfloat16).T}
    stock_load(target, storage_reader=Reader(saved))
    assert torch.equal(target["w"], STATE["w"].bfloat16())
    assert "cast to the dtype of the target: w" in caplog.text


def test_reader_describes_what_is_there(saved: Path) -> None:
    metadata = Reader(saved).read_metadata()
    assert set(metadata.state_dict_metadata) == {
        "w", "groups.0.lr", "groups.0.moment", "groups.1.lr", "groups.1.moment", "n",
    }  # fmt: skip
    with pytest.raises(LoadError, match=r"neither a manifest\.json nor a \.metadata"):
        Reader(saved.parent / "other").read_metadata()


class Bomb:
    """Says so when it is unpickled."""

    armed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return detonate, ()


def detonate() -> None:
    Bomb.armed = True


def test_a_stored_pickle_is_not_executed(tmp_path: Path) -> None:
    stock_save({"bomb": Bomb(), "n": 1}, checkpoint_id=tmp_path / "c")
    target = {"n": 0}
    stock_load(target, storage_reader=Reader(tmp_path / "c"))
    assert target == {"n": 1}
    with pytest.raises(CheckpointException) as caught:
        stock_load({"bomb": None}, storage_reader=Reader(tmp_path / "c"))
    assert isinstance(caught.value.failures[0][0], LoadError)
    assert "detonate" in str(caught.value)
    assert not Bomb.armed
    stock_load({"bomb": None}, checkpoint_id=tmp_path / "c")
    assert Bomb.armed, "the pickle does no harm, so that it was not executed says nothing"


def test_stock_tools_get_lists_back_from_ours(tmp_path: Path) -> None:
    stock_save(STATE, storage_writer=Writer(tmp_path / "c"))
    dcp_to_torch_save(tmp_path / "c", tmp_path / "all.pt")
    torch.testing.assert_close(torch.load(tmp_path / "all.pt"), STATE, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "step"), [("step-00000012", 12), ("anything", 0)])
def test_the_step_comes_from_the_directory(tmp_path: Path, name: str, step: int) -> None:
    stock_save(STATE, storage_writer=Writer(tmp_path / name))
    with open_checkpoint(tmp_path / name) as checkpoint:
        assert checkpoint.manifest.step == step
        assert checkpoint.manifest.tags == ["dcp.save"]


def test_an_explicit_step_and_a_writer_that_travels(tmp_path: Path) -> None:
    writer = pickle.loads(pickle.dumps(Writer("somewhere", num_threads=1, step=3)))
    metadata = stock_save(STATE, storage_writer=writer, checkpoint_id=tmp_path / "c")
    assert {info.relative_path for info in metadata.storage_data.values()} == {
        "__0_0.e0001-s000001.distcp",
        "__0_1.e0001-s000001.distcp",
    }
    with open_checkpoint(tmp_path / "c") as checkpoint:
        assert checkpoint.manifest.step == 3


@pytest.mark.parametrize(
    "arguments", [{"num_threads": 0}, {"step": -1}, {"step": True}, {"path": ""}], ids=str
)
def test_wrong_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Writer(**({"path": "x"} | arguments))


def test_without_collectives_nobody_could_commit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use_collectives"):
        stock_save(STATE, storage_writer=Writer(tmp_path / "c"), use_collectives=False)
