"""open_checkpoint, verify and the command line on stock DCP directories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt import open_checkpoint, verify
from dcp_ckpt.cli.main import cli
from dcp_ckpt.errors import CheckpointNotFound, CorruptCheckpoint, LoadError
from dcp_ckpt.load.stock import STOCK_UNVERIFIED
from dcp_ckpt.ops.stock import StockCheckpoint

DATA = "__0_0.distcp"


class Custom:
    """Restored by executing a pickle only."""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = {
        "model": {"w": torch.arange(12.0).reshape(3, 4).T, "large": torch.arange(50_000)},
        "optimizer": {"param_groups": [{"lr": 0.5, "betas": (0.9, 0.99)}]},
        "pair": (1, torch.ones(2)),
        "custom": Custom(),
    }
    stock_save(state, checkpoint_id=tmp_path / "step-00000007")
    return tmp_path / "step-00000007"


def test_tensors_and_values(saved: Path) -> None:
    with open_checkpoint(saved) as checkpoint:
        assert checkpoint.unverified == STOCK_UNVERIFIED
        assert checkpoint.keys() == [
            "custom", "model.large", "model.w", "optimizer.param_groups.0.betas",
            "optimizer.param_groups.0.lr", "pair",
        ]  # fmt: skip
        assert list(checkpoint.tensors) == ["model.large", "model.w"]
        assert torch.equal(checkpoint.read_tensor("model.w"), torch.arange(12.0).reshape(3, 4).T)
        assert torch.equal(checkpoint.read_tensor("model.large"), torch.arange(50_000))
        assert checkpoint.read_value("optimizer.param_groups.0.betas") == (0.9, 0.99)
        assert checkpoint.values["optimizer.param_groups.0.lr"].value == 0.5
        assert torch.equal(checkpoint.read_value("pair")[1], torch.ones(2))
        assert checkpoint.mesh("model.w") is None


def test_what_is_not_there_is_said(saved: Path) -> None:
    with open_checkpoint(saved) as checkpoint:
        assert isinstance(checkpoint, StockCheckpoint)
        assert checkpoint.step == 7
        with pytest.raises(LoadError, match=r"custom cannot be read: it needs .*Custom"):
            checkpoint.read_value("custom")
        for read in (
            lambda: checkpoint.read_tensor("model.v"),
            lambda: checkpoint.read_value("model.w"),
            lambda: checkpoint.read_value("pair", rank=0),
            lambda: checkpoint.mesh("pair"),
        ):
            with pytest.raises(CheckpointNotFound, match="in this stock DCP checkpoint"):
                read()
        with pytest.raises(LoadError, match="has no manifest"):
            _ = checkpoint.manifest
        with pytest.raises(LoadError, match="has no fragments"):
            checkpoint.fragment(0)


def test_neither_ours_nor_stock(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with pytest.raises(CheckpointNotFound, match=r"no manifest\.json"):
        open_checkpoint(tmp_path / "c")


def test_verify_checks_what_can_be_checked_and_says_so(saved: Path) -> None:
    report = verify(saved)
    assert report.ok
    (checked,) = report.checkpoints
    assert (checked.step, checked.num_files, checked.unverified) == (7, 2, STOCK_UNVERIFIED)
    assert checked.num_bytes == (saved / DATA).stat().st_size


def test_verify_finds_a_short_file_and_a_damaged_container(saved: Path) -> None:
    with open_checkpoint(saved) as checkpoint:
        assert isinstance(checkpoint, StockCheckpoint)
        size = checkpoint.num_bytes
    data = bytearray((saved / DATA).read_bytes())
    position = data.index(b"PK\x01\x02")
    data[position : position + 4] = b"XXXX"
    (saved / DATA).write_bytes(data)
    problems = verify(saved).problems
    assert [problem.kind for problem in problems] == ["container"]
    (saved / DATA).write_bytes(data[:-1])
    (problem,) = verify(saved).problems
    assert f"truncated: {size - 1}" in problem.message
    assert problem.path.endswith(DATA)
    (saved / DATA).unlink()
    assert "missing" in verify(saved).problems[0].message


def test_a_damaged_metadata_is_corrupt(saved: Path) -> None:
    (saved / ".metadata").write_bytes(b"junk")
    with pytest.raises(CorruptCheckpoint, match="not a valid pickle"):
        open_checkpoint(saved)


def invoke(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_the_command_line_says_what_is_not_verified(saved: Path) -> None:
    code, printed = invoke("verify", saved)
    assert code == 0
    assert STOCK_UNVERIFIED in printed
    code, printed = invoke("inspect", saved)
    assert code == 0
    assert STOCK_UNVERIFIED in printed
    assert "4x3" in printed
    assert "unreadable  custom" in printed
    code, printed = invoke("inspect", saved, "--json")
    found = json.loads(printed)
    assert (code, found["step"], found["unverified"]) == (0, 7, STOCK_UNVERIFIED)
    (saved / DATA).unlink()
    assert invoke("verify", saved)[0] == 4
