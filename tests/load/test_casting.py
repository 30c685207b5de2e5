"""Tensors are cast only when asked, within kinds of numbers, and every one is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt import Checkpointer, LoadReport, TrainState, load_checkpoint
from dcp_ckpt.errors import StateMismatch
from tests.load import trainings
from tests.load.trainings import Training, differing

VALUES = {
    "float": torch.tensor([[1.5, -0.0, 1e-30], [float("inf"), float("nan"), 3.14159265]]),
    "complex": torch.tensor([1 + 2j, -3.25j]),
    "int": torch.tensor([-(2**31), 7, 2**31 - 1], dtype=torch.int32),
    "bool": torch.tensor([True, False]),
    "eight": torch.arange(-8, 8).to(torch.float8_e4m3fn),
    "long": torch.arange(3_000_000, dtype=torch.float32).reshape(1000, 3000),
}
"""The last one comes in several reads."""


@pytest.fixture(scope="module", params=["ours", "stock"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    if request.param == "stock":
        stock_save(dict(VALUES), checkpoint_id=path / "c")
        return path / "c"
    with Checkpointer(path) as checkpointer:
        checkpointer.save(dict(VALUES), step=1).result(60)
    return path / "step-00000001"


def load(
    stored: Path, dtypes: dict[str, torch.dtype], *, cast: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], LoadReport]:
    live = {name: torch.zeros(VALUES[name].shape, dtype=dtype) for name, dtype in dtypes.items()}
    live["long"] = live["long"].t().contiguous().t() if "long" in live else torch.zeros(0)
    others = tuple(name for name in VALUES if name not in dtypes)
    report = load_checkpoint(stored, live, cast=cast, exclude=others)
    return live, report


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("float", torch.bfloat16),
        ("float", torch.float64),
        ("float", torch.float8_e5m2),
        ("complex", torch.complex128),
        ("int", torch.int64),
        ("eight", torch.float32),
        ("long", torch.bfloat16),
        ("long", torch.float64),
    ],
)
def test_values_are_those_of_torch(stored: Path, name: str, dtype: torch.dtype) -> None:
    live, report = load(stored, {name: dtype}, cast=(name,))
    wanted = VALUES[name].to(dtype)
    assert live[name].dtype == dtype
    assert torch.equal(live[name].contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))
    assert [(item.name, item.stored, item.live) for item in report.cast] == [
        (name, str(VALUES[name].dtype).removeprefix("torch."), str(dtype).removeprefix("torch."))
    ]
    assert f"{name}: cast ({report.cast[0].stored} -> {report.cast[0].live})" in str(report)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("float", torch.int64),
        ("float", torch.complex64),
        ("complex", torch.float32),
        ("int", torch.int16),
        ("int", torch.uint64),
        ("int", torch.float64),
        ("bool", torch.uint8),
    ],
)
def test_what_would_change_the_meaning_is_refused(stored: Path, name: str, dtype: torch.dtype) -> None:
    with pytest.raises(StateMismatch, match=f"{name}: torch.* cannot be cast to {dtype}"):
        load(stored, {name: dtype}, cast=("*",))


def test_nothing_is_cast_unasked_and_nothing_reported_where_nothing_differs(stored: Path) -> None:
    with pytest.raises(StateMismatch, match=r'(?s)float: checkpoint torch.float32.*cast=\("float",\)'):
        load(stored, {"float": torch.bfloat16}, cast=("int",))
    _, report = load(stored, {"float": torch.float32, "int": torch.int32}, cast=("*",))
    assert report.cast == ()
    assert "cast" not in str(report)


class Quantized(torch.optim.SGD):
    """Keeps a mask and eight bits of every element."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {
                "moment": torch.full(parameter.shape, 200, dtype=torch.uint8),
                "seen": torch.ones(parameter.shape, dtype=torch.bool),
                "scale": torch.ones(parameter.shape),
            }


def test_moments_that_are_integers_stay_so(tmp_path: Path) -> None:
    source, target = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    optimizer, live = Quantized(source.parameters(), lr=0.1), Quantized(target.parameters(), lr=0.1)
    optimizer.step()
    with Checkpointer(tmp_path) as checkpointer:
        step = checkpointer.save(TrainState(model=source, optimizer=optimizer), step=1).result(60).path
    load_checkpoint(step, TrainState(model=target, optimizer=live), cast=("*",))
    state = live.state[target.weight]
    assert {key: value.dtype for key, value in state.items()} == {
        "moment": torch.uint8,
        "seen": torch.bool,
        "scale": torch.bfloat16,
    }
    assert state["moment"].unique().tolist() == [200]


def test_a_training_goes_on_in_another_precision(tmp_path: Path) -> None:
    source = Training.make(steps=3, seed=1)
    directory = trainings.save(tmp_path, source)
    wanted = source.snapshot()
    for steps in (0, 2):
        live = Training.make(steps=0, seed=2)
        live.model.to(torch.bfloat16)
        live.step(steps)
        report = live.load(directory, cast=("model.*", "optimizer.*"))
        cast = {item.name for item in report.cast}
        found = live.snapshot()
        assert (
            differing({n: found[n] for n in cast}, {n: wanted[n].to(torch.bfloat16) for n in cast}) == set()
        )
        assert {name for name in found if name.endswith(("weight", "bias", "exp_avg", "exp_avg_sq"))} == cast
        assert found["optimizer.state.head.weight.step"].dtype == torch.float32
        live.step()
