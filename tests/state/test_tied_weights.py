"""Tied weights, really saved and loaded: stored once, filled wherever they are, never one of two silently."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt import Checkpointer, TrainState, load_checkpoint, open_checkpoint, plan_load, verify
from dcp_ckpt.cli.main import cli
from dcp_ckpt.dcp import Reader
from dcp_ckpt.errors import ConfigError, LoadError, StateMismatch

ROWS, WIDTH = 512, 32
WEIGHT_BYTES = ROWS * WIDTH * 4


class Tied(nn.Module):
    """An embedding and an output layer, met in the order given."""

    wte: nn.Embedding
    head: nn.Linear

    def __init__(self, order: tuple[str, str] = ("wte", "head"), *, tied: bool = True, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        for name in order:
            self.add_module(
                name, nn.Embedding(ROWS, WIDTH) if name == "wte" else nn.Linear(WIDTH, ROWS, bias=False)
            )
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.wte(tokens))
        return output


def training(*args: Any, **kwargs: Any) -> Any:
    model = Tied(*args, **kwargs)
    state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1), rng=False)
    train(state)
    return state


def train(state: Any) -> None:
    state.model(torch.arange(9)).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()


def save(path: Path, state: Any) -> str:
    with Checkpointer(path) as checkpointer:
        return checkpointer.save(state, step=1).result(30).path


def data_bytes(step: str) -> int:
    return sum(file.stat().st_size for file in Path(step).glob("*.distcp"))


@pytest.mark.parametrize("live", [("wte", "head"), ("head", "wte")], ids="-".join)
@pytest.mark.parametrize("stored", [("wte", "head"), ("head", "wte")], ids="-".join)
def test_tied_weights_are_stored_once_and_stay_tied_in_any_order(tmp_path, stored, live):
    source, target = training(stored), training(live, seed=1)
    step = save(tmp_path, source)
    assert data_bytes(step) < 3 * WEIGHT_BYTES + 16_384, "the weight and two moments, each once"
    assert verify(tmp_path).ok
    report = load_checkpoint(step, target)
    assert report.skipped == ()
    weight = target.model.wte.weight
    assert target.model.head.weight is weight
    assert list(target.optimizer.state) == [weight]
    assert target.optimizer.param_groups[0]["params"][0] is weight
    for _ in range(2):
        train(source)
        train(target)
    assert torch.equal(weight, source.model.wte.weight)


def test_what_was_tied_fills_both_of_two(tmp_path):
    source, target = Tied(), Tied(tied=False, seed=1)
    load_checkpoint(save(tmp_path, TrainState(model=source, rng=False)), TrainState(model=target, rng=False))
    assert torch.equal(target.wte.weight, source.wte.weight)
    assert torch.equal(target.head.weight, source.wte.weight)
    assert target.head.weight is not target.wte.weight


def test_what_was_two_and_equal_fills_one(tmp_path):
    source, target = Tied(tied=False), Tied(seed=1)
    with torch.no_grad():
        source.wte.weight[0, 0] = torch.nan  # compared as bytes
        source.head.weight.copy_(source.wte.weight)
    report = load_checkpoint(
        save(tmp_path, TrainState(model=source, rng=False)), TrainState(model=target, rng=False)
    )
    assert report.skipped == ()
    assert target.head.weight is target.wte.weight
    assert target.wte.weight[0, 0].isnan()
    assert torch.equal(target.wte.weight[1:], source.wte.weight[1:])


def test_what_was_two_and_different_is_never_one_of_them(tmp_path):
    source = Tied(tied=False)
    with torch.no_grad():
        source.head.weight.copy_(source.wte.weight)
        source.head.weight[-1, -1] += 1e-6
    step = save(tmp_path, TrainState(model=source, rng=False))
    with pytest.raises(LoadError, match=r"model\.head\.weight shares its memory with wte\.weight") as caught:
        load_checkpoint(step, TrainState(model=Tied(seed=1), rng=False))
    assert caught.value.phase == "install"


def test_moments_of_a_tied_weight_are_not_guessed_for_two(tmp_path):
    step = save(tmp_path, training())
    with pytest.raises(
        StateMismatch, match=r"optimizer\.state\.head\.weight: the optimizer has this parameter"
    ):
        load_checkpoint(step, training(tied=False, seed=1))


@pytest.mark.parametrize(
    ("selection", "chosen", "left"),
    [
        ({"exclude": ("*.head.*",)}, "model.wte.weight", "model.head.weight"),
        ({"include": ("model.head", "optimizer")}, "model.head.weight", "model.wte.weight"),
        (
            {"exclude": ("model.wte.*", "*.head.*")},
            "optimizer.state.wte.weight",
            "optimizer.state.head.weight",
        ),
    ],
    ids=["exclude", "include", "moments"],
)
def test_one_tensor_is_not_restored_and_left_out_at_once(tmp_path, selection, chosen, left):
    step, target = save(tmp_path, training()), training(seed=1)
    before = target.model.wte.weight.detach().clone()
    with pytest.raises(ConfigError, match=rf"{chosen} is selected and {left} is not"):
        load_checkpoint(step, target, **selection)
    assert torch.equal(target.model.wte.weight, before)
    report = load_checkpoint(step, target, exclude=("*.wte.*", "*.head.*"))
    assert torch.equal(target.model.wte.weight, before)
    assert {"model.wte.weight", "model.head.weight"} <= set(report.skipped)


def test_what_is_tied_elsewhere_and_a_tensor_of_its_own_here_can_be_left_out(tmp_path):
    source, target = Tied(), Tied(tied=False, seed=1)
    step = save(tmp_path, TrainState(model=source, rng=False))
    before = target.head.weight.detach().clone()
    report = load_checkpoint(step, TrainState(model=target, rng=False), exclude=("model.head",))
    assert torch.equal(target.wte.weight, source.wte.weight)
    assert torch.equal(target.head.weight, before)
    assert (report.restored, report.skipped) == (("model.wte.weight",), ("model.head.weight",))


def test_a_tied_tensor_that_does_not_fit_is_named_by_all_names_that_have_to_be_left_out(tmp_path):
    step, target = save(tmp_path, training()), training(seed=1)
    target.model.wte.weight = target.model.head.weight = nn.Parameter(torch.zeros(ROWS + 1, WIDTH))
    target = TrainState(model=target.model, optimizer=torch.optim.AdamW(target.model.parameters()), rng=False)
    with pytest.raises(StateMismatch) as caught:
        load_checkpoint(step, target)
    (advice,) = re.findall(r"exclude=\((.*)\) leaves", caught.value.message)
    report = load_checkpoint(step, target, exclude=re.findall('"(.*?)"', advice))
    assert {"model.wte.weight", "model.head.weight"} <= set(report.skipped)


def test_a_model_that_lacks_one_of_the_names_is_told(tmp_path):
    step = save(tmp_path, TrainState(model=Tied(), rng=False))
    with pytest.raises(StateMismatch, match=r"unexpected \(1\):\s+model\.head\.weight"):
        load_checkpoint(step, TrainState(model=nn.ModuleDict({"wte": nn.Embedding(ROWS, WIDTH)}), rng=False))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_reader_knows_both_names(tmp_path):
    model = Tied()
    step = save(tmp_path, TrainState(model=model, rng=False))
    choices: list[dict[str, Any]] = [{"checkpoint_id": step}, {"storage_reader": Reader(step)}]
    for options in choices:
        found = {"model": {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}}
        stock_load(found, **options)
        assert set(found["model"]) == {"wte.weight", "head.weight"}
        assert all(torch.equal(tensor, model.wte.weight) for tensor in found["model"].values()), options
    with open_checkpoint(step) as checkpoint:
        assert checkpoint.keys() == ["model.wte.weight"]
        for name in ("model.wte.weight", "model.head.weight"):
            assert torch.equal(checkpoint.read_tensor(name), model.wte.weight)
        assert checkpoint.aliases == {"model.wte.weight": ("model.head.weight",)}
        assert plan_load(checkpoint, world_size=2).tensor_bytes == WEIGHT_BYTES
    file = tmp_path / "model.pt"
    assert CliRunner().invoke(cli, ["export", step, str(file), "--format", "torch"]).exit_code == 0
    Tied(tied=False).load_state_dict(torch.load(file), strict=True)
    shown = CliRunner().invoke(cli, ["inspect", step, "--key", "model.head.*"])
    assert "model.wte.weight = model.head.weight  float32" in shown.stdout


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
def test_stock_checkpoints_hold_each_name_and_are_compared(tmp_path, equal):
    source, target = Tied(tied=equal), Tied(seed=1)
    stock_save({"model": source.state_dict()}, checkpoint_id=tmp_path / "step-1")
    state = TrainState(model=target, rng=False)
    if equal:
        load_checkpoint(tmp_path / "step-1", state)
        assert torch.equal(target.wte.weight, source.wte.weight)
    else:
        with pytest.raises(LoadError, match="shares its memory with"):
            load_checkpoint(tmp_path / "step-1", state)


class Scaled(nn.Module):
    """With state that is no tensor of the module."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), scale))
        self.scale: Any = {"tensor": torch.full((3,), scale), "number": scale}

    def get_extra_state(self) -> Any:
        return self.scale

    def set_extra_state(self, state: Any) -> None:
        self.scale = state


def test_shared_modules_come_back_shared_under_any_name(tmp_path):
    shared, target = Scaled(5.0), Scaled(0.0)
    step = save(tmp_path, TrainState(model=nn.ModuleDict({"a": shared, "b": shared}), rng=False))
    load_checkpoint(step, TrainState(model=nn.ModuleDict({"b": target, "a": target}), rng=False))
    assert (target.weight.tolist(), target.scale["tensor"].tolist()) == ([5.0, 5.0], [5.0] * 3)
    assert target.scale["number"] == 5.0
    two = nn.ModuleDict({"a": Scaled(0.0), "b": Scaled(0.0)})
    load_checkpoint(step, TrainState(model=two, rng=False))
    modules: Any = two.values()
    for module in modules:
        assert (module.weight.tolist(), module.scale["number"]) == ([5.0, 5.0], 5.0)


def test_models_that_share_a_module_store_it_once(tmp_path):
    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        trunk = nn.Linear(64, 64, bias=False)
        models = {name: nn.Sequential(trunk, nn.Linear(64, 1)) for name in ("teacher", "critic")}
        optimizer = torch.optim.SGD(
            {id(p): p for m in models.values() for p in m.parameters()}.values(), lr=0.1, momentum=0.9
        )
        sum(model(torch.ones(1, 64)).sum() for model in models.values()).backward()
        optimizer.step()
        return TrainState(model=models, optimizer=optimizer, rng=False)

    source, target = make(0), make(1)
    step = save(tmp_path, source)
    assert data_bytes(step) < 2 * 64 * 64 * 4 + 16_384, "the weight and its moment"
    load_checkpoint(step, target)
    for name, model in target.model.items():
        assert torch.equal(model[0].weight, source.model["teacher"][0].weight), name
    assert target.model["teacher"][0].weight is target.model["critic"][0].weight


def test_models_that_share_memory_now_and_did_not_are_refused(tmp_path):
    def make(trunks: Any) -> Any:
        models = {name: nn.Sequential(trunks(), nn.Linear(4, 1)) for name in ("teacher", "critic")}
        return TrainState(model=models, rng=False)

    step = save(tmp_path, make(lambda: nn.Linear(4, 4)))
    trunk = nn.Linear(4, 4)
    with pytest.raises(
        StateMismatch, match=r"model\.critic\.0\.weight: is one memory with model\.teacher\.0"
    ):
        load_checkpoint(step, make(lambda: trunk))


def test_one_tensor_under_several_keys_fills_all_of_them(tmp_path):
    tensor = torch.randn(4096)
    step = save(tmp_path, {"a": tensor, "b": {"c": tensor}, "list": [tensor, {"d": tensor}]})
    assert data_bytes(step) < 2 * tensor.nbytes
    live: Any = {"a": torch.zeros(4096), "b": {"c": torch.zeros(4096)}, "list": []}
    load_checkpoint(step, live)
    found = (live["a"], live["b"]["c"], live["list"][0], live["list"][1]["d"])
    assert all(torch.equal(one, tensor) for one in found)
