"""Diff: everything that differs is told, nothing else is, and what digests decide is not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt import CheckpointConfig, Checkpointer, TrainState, diff
from dcp_ckpt.errors import CorruptCheckpoint, StateMismatch
from dcp_ckpt.format.boxes import Box, tiling_problem
from dcp_ckpt.load.stock import STOCK_UNVERIFIED
from dcp_ckpt.ops.diff import TensorDiff
from dcp_ckpt.ops.windows import windows_of
from dcp_ckpt.storage import open_storage
from dcp_ckpt.testing.tiny import write_tiny_checkpoint
from tests.ops.exports import TiedModel, every_dtype, saved

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")


def by_name(tensors: tuple[TensorDiff, ...]) -> dict[str, TensorDiff]:
    return {tensor.name: tensor for tensor in tensors}


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_everything_that_differs_and_nothing_else(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    a: dict[str, Any] = {
        "same": torch.arange(5.0),
        "moved": torch.tensor([3.0, 4.0, 0.0, nan, nan, inf]),
        "narrowed": torch.tensor([1.0, 2.0, 1.0 + 2**-20]),
        "reshaped": torch.zeros(2, 3),
        "counted": torch.tensor([2**60, 7]),
        "zero": torch.zeros(3),
        "gone": torch.ones(1),
        "lr": 0.5,
        "betas": (0.9, nan),
        "kind": 1,
    }
    b = a | {
        "moved": torch.tensor([3.0, 4.5, 0.0, nan, 1.0, -inf]),
        "narrowed": a["narrowed"].bfloat16(),
        "reshaped": torch.zeros(3, 2),
        "counted": torch.tensor([2**60 + 1, 7]),
        "zero": -torch.zeros(3),
        "lr": 0.25,
        "kind": torch.tensor(1),
        "new": "x",
    }
    del b["gone"]
    report = diff(saved(tmp_path / "a", a, step=3), saved(tmp_path / "b", b, step=4))
    assert not report.equal
    assert (report.step_a, report.step_b) == (3, 4)
    assert (report.only_in_a, report.only_in_b) == (("gone", "kind"), ("kind", "new"))
    assert [(value.name, value.a, value.b) for value in report.values] == [("lr", 0.5, 0.25)]
    assert (report.num_equal_tensors, report.num_equal_values) == (1, 1)
    tensors = by_name(report.tensors)
    assert tensors.keys() == {"moved", "narrowed", "reshaped", "counted", "zero"}
    moved = tensors["moved"].numbers
    assert moved is not None
    assert (moved.num_elements, moved.num_different) == (6, 3)
    assert (moved.num_nan_a, moved.num_nan_b, moved.num_inf_a, moved.num_inf_b) == (2, 1, 1, 1)
    assert (moved.max_abs, moved.mean_abs) == (0.5, 0.5 / 3)  # of the three that are finite in both
    assert moved.relative == 0.1
    assert (tensors["narrowed"].dtype_a, tensors["narrowed"].dtype_b) == ("float32", "bfloat16")
    assert tensors["narrowed"].numbers is not None
    assert tensors["narrowed"].numbers.max_abs == 2**-20
    assert tensors["reshaped"].numbers is None
    assert (tensors["reshaped"].shape_a, tensors["reshaped"].shape_b) == ((2, 3), (3, 2))
    counted, zero = tensors["counted"].numbers, tensors["zero"].numbers
    assert counted is not None
    assert counted.num_different == 1  # as doubles they are the same
    assert zero is not None
    # Other bits, the same number: that is said, too.
    assert (zero.num_different, zero.max_abs, zero.relative) == (0, 0.0, None)


def test_every_dtype_differs_where_a_bit_does(tmp_path: Path) -> None:
    a = every_dtype()
    b = {name: tensor.clone() for name, tensor in a.items()}
    for name, tensor in b.items():
        if name.startswith("of."):
            tensor.view(-1)[7:8].view(torch.uint8)[0] ^= 1
    report = diff(saved(tmp_path / "a", a), saved(tmp_path / "b", b))
    assert set(by_name(report.tensors)) == {name for name in a if name.startswith("of.")}
    assert all(tensor.numbers is not None for tensor in report.tensors)
    assert report.num_equal_tensors == 2


def test_layouts_and_stock_checkpoints_do_not_matter(tmp_path: Path) -> None:
    """Sharded by rows over 3, by columns over 2, and as plain dcp.save wrote it: one state."""
    for name, ranks, dim in (("a", 3, 0), ("b", 2, 1)):
        write_tiny_checkpoint(open_storage(tmp_path / name), step=1, ranks=ranks, shard_dim=dim)
    report = diff(tmp_path / "a/step-00000001", tmp_path / "b/step-00000001")
    assert report.equal
    assert (report.num_equal_tensors, report.num_equal_values) == (4, 3)
    model = TiedModel()
    ref = saved(tmp_path / "run", TrainState(model=model, rng=False))
    stock_save({"model": model.state_dict()}, checkpoint_id=tmp_path / "stock", no_dist=True)
    report = diff(ref, tmp_path / "stock", key="model.*")
    assert report.equal
    assert report.unverified == STOCK_UNVERIFIED
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    stock_save({"model": model.state_dict()}, checkpoint_id=tmp_path / "other", no_dist=True)
    changed = diff(ref, tmp_path / "other", key="model.*").tensors
    # The stock one has it twice.
    assert [tensor.name for tensor in changed] == ["model.embedding.weight", "model.head.weight"]


def test_a_tied_tensor_is_compared_once(tmp_path: Path) -> None:
    a, b = TiedModel(), TiedModel()
    with torch.no_grad():
        b.head.weight[0, 0] += 1
    refs = [
        saved(tmp_path / name, TrainState(model=model, rng=False)) for name, model in (("a", a), ("b", b))
    ]
    assert [tensor.name for tensor in diff(*refs).tensors] == ["model.embedding.weight"]
    assert [tensor.name for tensor in diff(*refs, key="*.head.*").tensors] == ["model.head.weight"]
    with pytest.raises(StateMismatch, match=r"'heads' matches nothing; the checkpoints hold model"):
        diff(*refs, key="heads")


def test_what_digests_prove_is_not_read(tmp_path: Path) -> None:
    """Proof that it is not read: it could not be, for a byte of it is wrong by now."""
    state = {"frozen": torch.randn(600, 1000), "trained": torch.zeros(600, 1000)}
    config = CheckpointConfig(timeout_seconds=30, reuse=True)
    with Checkpointer(tmp_path / "run", config=config) as checkpointer:
        checkpointer.save(state, step=1).result(30)
        state["trained"] += 1
        checkpointer.save(state, step=2).result(30)
    report = diff(f"{tmp_path}/run@1", f"{tmp_path}/run@2")
    assert [tensor.name for tensor in report.tensors] == ["trained"]
    assert (report.num_equal_tensors, report.num_proven) == (1, 1)
    for name in ("a", "b"):  # two saves of one layout, without reuse
        write_tiny_checkpoint(open_storage(tmp_path / name), step=1, shape=(2000, 700))
    flip(tmp_path / "a/step-00000001" / "__0_0.e0001-s000001.distcp", 1 << 20)
    same = diff(tmp_path / "a/step-00000001", tmp_path / "b/step-00000001")
    assert same.equal
    assert same.num_proven == same.num_equal_tensors == 4
    write_tiny_checkpoint(open_storage(tmp_path / "c"), step=1, shape=(2000, 700), ranks=3)
    with pytest.raises(CorruptCheckpoint, match=r"model\.weight"):
        diff(tmp_path / "a/step-00000001", tmp_path / "c/step-00000001")


def test_progress_ends_at_all_bytes(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    refs = [saved(tmp_path / str(n), {"x": torch.full((9 << 20,), float(n))}) for n in range(2)]
    diff(*refs, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) == 3
    assert calls[-1] == (72 << 20, 72 << 20)


@pytest.mark.parametrize("shape", [(), (0, 4), (7,), (5, 3), (2, 3, 4), (1, 1, 9), (3, 1, 2, 5)])
@pytest.mark.parametrize("most", [1, 4, 7, 1000])
def test_windows_tile_a_tensor_in_order(shape: tuple[int, ...], most: int) -> None:
    boxes = list(windows_of(shape, most))
    assert tiling_problem(shape, boxes) is None
    assert all(0 < box.num_elements <= most for box in boxes)
    whole = torch.arange(Box.whole(shape).num_elements).reshape(shape)
    parts = [
        whole[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))].reshape(-1)
        for box in boxes
    ]
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.long), *parts]), whole.reshape(-1))
