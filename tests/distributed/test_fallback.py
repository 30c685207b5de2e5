"""A damaged checkpoint sends all ranks to the one before it, together, and never to a fresh start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_ckpt import Checkpointer, LoadReport, verify
from tests.distributed import worlds

pytestmark = pytest.mark.distributed

SHAPE = (3000, 100)
STEPS = (1, 2, 3)


def state_of(step: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.full(SHAPE, float(step))
    return {"w": distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None), "step": step}


def save_steps(path: str) -> None:
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        for step in STEPS:
            checkpointer.save(state_of(step), step=step).result(30)


def load(path: str, which: Any) -> tuple[tuple[str, str], LoadReport | None, set[float], int]:
    """What this rank was told, and what its state holds afterwards, apart from NaN."""
    state = state_of(0)
    reports = []
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        told = worlds.outcome(lambda: reports.append(checkpointer.load(state, which)))
    values = state["w"].to_local().flatten()
    found = set(values[~values.isnan()].tolist())
    return told, reports[0] if reports else None, found, state["step"]


def flip_a_bit(path: Path, step: int, rank: int) -> Path:
    (file,) = (path / f"step-{step:08}").glob(f"__{rank}_0.*.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    return file


@pytest.fixture
def saved(pool, tmp_path):
    pool.run(save_steps, 2, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("rank", [0, 1])
def test_flipped_bit_of_one_rank_sends_all_to_the_step_before(pool, saved, rank):
    file = flip_a_bit(saved, 3, rank)
    for told, report, found, step in pool.run(load, 2, str(saved), "latest"):
        assert told == ("ok", "")
        assert report.step == 2
        assert (found, step) == ({2.0}, 2)
        (rejected,) = report.rejected
        assert "step-00000003" in rejected.path
        assert file.name in rejected.reason
        assert "w" in rejected.reason
    assert list((saved / "marks" / "step-00000003").glob("bad-*.json"))
    (problem,) = verify(saved).problems
    assert problem.path == f"step-00000003/{file.name}"
    assert problem.block == 0
    assert problem.tensors == ("w",)


def test_next_start_passes_over_the_marked_step_and_saves_beside_it(pool, saved):
    flip_a_bit(saved, 3, 0)
    pool.run(load, 2, str(saved), "latest")
    for told, report, found, _ in pool.run(load_and_save_again, 2, str(saved)):
        assert told == ("ok", "")
        assert "marked bad" in report.rejected[0].reason
        assert found == {3.0}
    assert (saved / "step-00000003.e3" / "manifest.json").exists()
    assert (saved / "step-00000003" / "manifest.json").exists(), "damaged checkpoints are kept"


def load_and_save_again(path: str) -> tuple[tuple[str, str], LoadReport | None, set[float], int]:
    state = state_of(0)
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        report = checkpointer.load(state)
        told = worlds.outcome(lambda: checkpointer.save(state_of(3), step=3).result(30))
        checkpointer.load(state)
    return told, report, set(state["w"].to_local().flatten().tolist()), state["step"]


def test_step_asked_for_by_name_is_never_replaced_by_another(pool, saved):
    file = flip_a_bit(saved, 3, 1)
    for (kind, message), _, found, step in pool.run(load, 2, str(saved), 3):
        assert kind == "CorruptCheckpoint"
        assert file.name in message
        assert step == 0, "values are installed only after all bytes were checked"
        assert found <= {0.0, 3.0}
    assert not (saved / "marks").exists() or not list((saved / "marks").glob("*/bad-*"))


def test_all_damaged_is_an_error_and_never_a_fresh_start(pool, saved):
    for step in STEPS:
        flip_a_bit(saved, step, 0)
    for _ in range(2):  # found by reading, then by the marks
        for (kind, _), report, _, _ in pool.run(load, 2, str(saved), "latest"):
            assert kind == "CorruptCheckpoint"
            assert report is None


@pytest.mark.parametrize("harm", ["missing file", "short file", "fragment"])
def test_other_harm_is_found_by_the_rank_that_needs_it(pool, saved, harm):
    directory = saved / "step-00000003"
    (file,) = directory.glob("__1_0.*.distcp")
    if harm == "missing file":
        file.unlink()
    elif harm == "short file":
        file.write_bytes(file.read_bytes()[:4096])
    else:
        (file,) = directory.glob("rank-00001.*.json")
        file.write_bytes(file.read_bytes().replace(b'"rank":1', b'"rank":7'))
    for told, report, found, _ in pool.run(load, 2, str(saved), "latest"):
        assert told == ("ok", "")
        assert report.step == 2
        assert file.name in report.rejected[0].reason
        assert found == {2.0}


def load_other_model_on_rank_1(path: str) -> tuple[tuple[str, str], set[float]]:
    state = state_of(0)
    if dist.get_rank() == 1:
        state["more"] = torch.zeros(1)
    with Checkpointer(path, config=worlds.config()) as checkpointer:
        told = worlds.outcome(lambda: checkpointer.load(state))
    return told, set(state["w"].to_local().flatten().tolist())


def test_state_that_fits_on_one_rank_only_changes_nothing_on_any(pool, saved):
    for (kind, message), found in pool.run(load_other_model_on_rank_1, 2, str(saved)):
        assert kind == "StateMismatch"
        assert "more" in message
        assert "rank 1" in message
        assert found == {0.0}
