"""Where bytes go: into the memory of the target where they lie alike, and by a copy everywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from dcp_ckpt import Checkpointer, load_checkpoint
from dcp_ckpt.errors import CorruptCheckpoint, StorageError
from dcp_ckpt.format.dtypes import DTYPES
from dcp_ckpt.load.landing import Landing, spoiling_on_failure
from dcp_ckpt.load.ranges import Piece

STEP = "step-00000001"
ROWS, COLUMNS = 3_000, 1_001
"""12 MB: some blocks of 1 MiB lie in one tensor only, some are shared, and rows do not divide them."""


def state(fill: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    values = (
        torch.rand(ROWS, COLUMNS, generator=generator)
        if fill == 0
        else torch.full((ROWS, COLUMNS), float(fill))
    )
    return {"a": values.clone(), "b": (values[:7] * 3).bfloat16(), "c": values[:1500] + 1}


TARGETS = {
    "as it lies": lambda tensor: torch.empty_like(tensor),
    "with other strides": lambda tensor: torch.empty(tensor.shape[::-1], dtype=tensor.dtype).t(),
    "a part of more": lambda tensor: torch.empty(tensor.shape[0], tensor.shape[1] + 1, dtype=tensor.dtype)[
        :, 1:
    ],
    "a row of more": lambda tensor: torch.empty(2, *tensor.shape, dtype=tensor.dtype)[1],
    "needs gradients": lambda tensor: torch.empty_like(tensor).requires_grad_(),
    "a lazy negative": lambda tensor: torch._neg_view(torch.empty_like(tensor)),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    with Checkpointer(run) as checkpointer:
        checkpointer.save(state(0), step=1).result(60)
    return run


def different(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> list[str]:
    return [name for name in left if not torch.equal(left[name], right[name])]


@pytest.mark.parametrize("kind", TARGETS)
def test_every_target_gets_the_same_elements(run: Path, kind: str) -> None:
    targets = {name: TARGETS[kind](tensor) for name, tensor in state(1).items()}
    load_checkpoint(run / STEP, targets)
    assert different(state(0), targets) == []


def test_writes_past_torch_are_seen_by_autograd(run: Path) -> None:
    targets = state(1)
    weight = torch.ones(ROWS, COLUMNS, requires_grad=True)
    loss = (weight * targets["a"]).sum()
    load_checkpoint(run / STEP, targets)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_of_inference_mode_are_filled(run: Path) -> None:
    with torch.inference_mode():
        targets = state(1)
    load_checkpoint(run / STEP, targets)
    with torch.inference_mode():
        assert different(state(0), targets) == []


@pytest.mark.parametrize(
    ("kind", "place"),
    [*(("as it lies", place) for place in (0.01, 0.3, 0.7, 0.99)), *((kind, 0.5) for kind in TARGETS)],
)
def test_of_what_was_damaged_nothing_is_left(run: Path, tmp_path: Path, kind: str, place: float) -> None:
    damaged = tmp_path / "run"
    (damaged / STEP).mkdir(parents=True)
    for file in (run / STEP).iterdir():
        data = bytearray(file.read_bytes())
        if file.suffix == ".distcp":
            data[int(len(data) * place)] ^= 1
        (damaged / STEP / file.name).write_bytes(data)
    targets = {name: TARGETS[kind](tensor) for name, tensor in state(1).items()} | {"whole": torch.zeros(9)}
    with pytest.raises(CorruptCheckpoint, match="differs from its digest"):
        load_checkpoint(damaged / STEP, targets, exclude=("whole",))
    # Whoever trains on in spite of the error sees it at once: no mixture of new and old numbers.
    assert not targets.pop("whole").any()
    for name, target in targets.items():
        assert target.isnan().all(), name


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_spoiled_is_no_number_in_any_type_that_has_such(dtype: str) -> None:
    target = torch.zeros(3, dtype=getattr(torch, dtype))
    with pytest.raises(StorageError), spoiling_on_failure([target]):
        raise StorageError("no disk")
    if target.is_floating_point() or target.is_complex():
        assert target.to(torch.complex64 if target.is_complex() else torch.float32).isnan().all()
    else:
        assert (target.view(torch.uint8) == (1 if dtype == "bool" else 255)).all()


@pytest.mark.parametrize(
    ("target", "takes_bytes"),
    [
        (torch.empty(4, 3), True),
        (torch.empty(4, 3, dtype=torch.float64), False),
        (torch.empty(3, 4).t(), False),
        (torch.empty(4, 1).expand(4, 3), False),
        (torch._neg_view(torch.empty(4, 3)), False),
        (torch.empty(4, 3, device="meta"), False),
    ],
    ids=["alike", "another dtype", "strided", "expanded", "negative", "on a device"],
)
def test_bytes_are_taken_only_where_they_lie_alike(target: torch.Tensor, takes_bytes: bool) -> None:
    piece = Piece(
        tensor="w",
        rank=0,
        file=0,
        start=0,
        num_bytes=48,
        sizes=(4, 3),
        strides=(3, 1),
        outer=(slice(0, 4), slice(0, 3)),
    )
    assert Landing(piece, target, torch.float32).takes_bytes is takes_bytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["as it lies", "with other strides", "a part of more"])
def test_targets_on_a_gpu_get_the_same_elements(run: Path, kind: str) -> None:
    targets = {
        name: TARGETS[kind](tensor.to("cuda") if name != "c" else tensor) for name, tensor in state(1).items()
    }
    load_checkpoint(run / STEP, targets)
    assert different(state(0), {name: target.cpu() for name, target in targets.items()}) == []
