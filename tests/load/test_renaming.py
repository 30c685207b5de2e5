"""Entries that have another name in the checkpoint, with everything that follows the name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt import Checkpointer, TrainState, load_checkpoint
from dcp_ckpt.dcp import Writer
from dcp_ckpt.errors import ConfigError, StateMismatch
from tests.load import trainings
from tests.load.trainings import Training, adamw, differing, net

FORMS: dict[str, Any] = {
    "nested": get_optimizer_state_dict,
    "flat": lambda model, optimizer: get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    ),
    "numbered": lambda model, optimizer: optimizer.state_dict(),
}


def save(path: Path, state: Any) -> Path:
    with Checkpointer(path) as checkpointer:
        checkpointer.save(state, step=7).result(60)
    return path / "step-00000007"


@pytest.fixture(scope="module")
def trained() -> Training:
    return Training.make(steps=3, seed=1)


@pytest.fixture(scope="module")
def stored(trained: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainings.save(tmp_path_factory.mktemp("run"), trained)


def renamed(snapshot: dict[str, Any], *rules: tuple[str, str]) -> dict[str, Any]:
    """The snapshot of the same training with other names of modules."""
    for old, new in rules:
        snapshot = {name.replace(f".{old}.", f".{new}."): value for name, value in snapshot.items()}
    return snapshot


@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "trained"])
def test_moments_follow_their_parameters(stored: Path, trained: Training, steps: int) -> None:
    live = Training.make(steps=steps, seed=2, body="layers", head="top")
    report = live.load(stored, rename={"model.blocks": "model.layers", "model.head": "model.top"})
    wanted = renamed(trained.snapshot(), ("blocks", "layers"), ("head", "top"))
    assert differing(live.snapshot(), wanted) == set()
    assert "optimizer.state.layers.1.0.weight.exp_avg" in report.restored
    assert report.skipped == ()
    live.step()
    trained_again = Training.make(steps=3, seed=1)
    trained_again.step()
    assert torch.equal(live.model.top.weight, trained_again.model.head.weight)


def test_the_longest_prefix_counts_and_only_whole_parts_match(stored: Path, trained: Training) -> None:
    live = Training.make(steps=0)
    live.model.blocks[0], live.model.blocks[1] = live.model.blocks[1], live.model.blocks[0]
    swap = {
        "model.blocks": "model.blocks",
        "model.blocks.0": "model.blocks.1",
        "model.blocks.1": "model.blocks.0",
    }
    live.load(stored, rename=swap)
    wanted = trained.snapshot()
    assert torch.equal(live.model.blocks[1][0].weight, wanted["model.blocks.0.0.weight"])
    moments = live.optimizer.state[live.model.blocks[0][0].weight]
    assert torch.equal(moments["exp_avg"], wanted["optimizer.state.blocks.1.0.weight.exp_avg"])
    with pytest.raises(ConfigError, match=r"nothing of the name 'model.block'.*did you mean model.blocks"):
        Training.make(steps=0).load(stored, rename={"model.block": "model.layers"})


@pytest.mark.parametrize("writer", ["stock", "ours"])
@pytest.mark.parametrize("form", FORMS)
def test_states_that_dcp_saved(tmp_path: Path, trained: Training, form: str, writer: str) -> None:
    state = {
        "net": get_model_state_dict(trained.model),
        "optim": FORMS[form](trained.model, trained.optimizer),
        "sched": trained.scheduler.state_dict(),
        "history": trained.history,
    }
    path = tmp_path / "step-7"
    stock_save({"app": state}, checkpoint_id=path, storage_writer=Writer(path) if writer == "ours" else None)
    live = Training.make(steps=1, seed=2, body="layers")
    rename = {
        "app.net": "model",
        "app.net.blocks": "model.layers",
        "app.optim": "optimizer",
        "app.sched": "lr_scheduler",
        "app.history": "extra.history",
    }
    live.mine["counter"] = 3
    rng = torch.get_rng_state()
    load_checkpoint(path, live.state, rename=rename)
    wanted = renamed(trained.snapshot(), ("blocks", "layers")) | {"rng": rng}
    assert differing(live.snapshot(), wanted) == set()


def test_a_bare_state_dict_goes_below_the_model(tmp_path: Path, trained: Training) -> None:
    stock_save(trained.model.state_dict(), checkpoint_id=tmp_path / "c")
    live = net(seed=2, body="layers")
    load_checkpoint(tmp_path / "c", TrainState(model=live), rename={"": "model", "blocks": "model.layers"})
    assert torch.equal(live.layers[0][0].weight, trained.model.blocks[0][0].weight)
    assert torch.equal(live.head.bias, trained.model.head.bias)


def pair(seed: int, **shape: Any) -> tuple[dict[str, nn.Module], dict[str, torch.optim.Optimizer]]:
    """Two models, and an optimizer for each."""
    trainings_ = {
        name: Training.make(steps=2, seed=seed + i, **shape) for i, name in enumerate(("gen", "disc"))
    }
    return (
        {name: one.model for name, one in trainings_.items()},
        {name: one.optimizer for name, one in trainings_.items()},
    )


def moments(models: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> list[Any]:
    return [
        (parameter, optimizers[name].state[parameter]["exp_avg"])
        for name, model in models.items()
        for parameter in model.parameters()
    ]


def assert_equal(left: list[Any], right: list[Any]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_several_models_and_optimizers(tmp_path: Path) -> None:
    models, optimizers = pair(1)
    stored = save(tmp_path, TrainState(model=models, optimizer=optimizers))
    wanted = moments(models, optimizers)
    live, live_optimizers = pair(5, body="layers")
    rename = {
        "model.gen.blocks": "model.generator.layers",
        "model.gen": "model.generator",
        "model.disc.blocks": "model.disc.layers",
        "optimizer.gen": "optimizer.first",
    }
    state = TrainState(
        model={"generator": live["gen"], "disc": live["disc"]},
        optimizer={"first": live_optimizers["gen"], "disc": live_optimizers["disc"]},
    )
    load_checkpoint(stored, state, rename=rename)
    assert_equal(moments(live, live_optimizers), wanted)


def test_one_model_becomes_one_of_several_and_back(tmp_path: Path, stored: Path, trained: Training) -> None:
    """The names of parameters in optimizers begin with the model's key only where there are several."""
    models, optimizers = pair(5)
    state = TrainState(model=models, optimizer=optimizers)
    rename = {"model": "model.gen", "optimizer": "optimizer.gen", "lr_scheduler": "unused"}
    report = load_checkpoint(stored, state, rename=rename, exclude=("model.disc", "optimizer.disc"))
    wanted = moments({"gen": trained.model}, {"gen": trained.optimizer})
    assert_equal(moments({"gen": models["gen"]}, optimizers), wanted)
    assert "optimizer.gen.state.gen.head.weight.exp_avg" in report.restored

    both = save(tmp_path, state)
    live = Training.make(steps=0)
    back = {
        "model.gen": "model",
        "optimizer.gen": "optimizer",
        "model.disc": "other",
        "optimizer.disc": "more",
    }
    load_checkpoint(both, TrainState(model=live.model, optimizer=live.optimizer), rename=back)
    assert_equal(moments({"gen": live.model}, {"gen": live.optimizer}), wanted)


def test_a_plain_dictionary_of_live_objects(tmp_path: Path) -> None:
    source = Training.make(steps=2, seed=1)
    state = {"net": source.model, "opt": source.optimizer, "n": 3, "list": [1, torch.ones(2)]}
    stored = save(tmp_path, state)
    live = Training.make(steps=0, body="layers")
    target = {"a": {"model": live.model, "opt": live.optimizer}, "n": 0, "pair": None}
    rename = {"net": "a.model", "net.blocks": "a.model.layers", "opt": "a.opt", "list": "pair"}
    load_checkpoint(stored, target, rename=rename)
    wanted = moments({"x": source.model}, {"x": source.optimizer})
    assert_equal(moments({"x": live.model}, {"x": live.optimizer}), wanted)
    assert target["n"] == 3
    pair: Any = target["pair"]
    assert pair[0] == 1
    assert torch.equal(pair[1], torch.ones(2))


def test_names_that_collide_are_refused(stored: Path) -> None:
    live = Training.make(steps=1, seed=2)
    before = live.snapshot()
    with pytest.raises(ConfigError, match=r"model.blocks.0.0.bias and model.blocks.1.0.bias cannot have the"):
        live.load(stored, rename={"model.blocks.0": "model.blocks.1"})
    with pytest.raises(ConfigError, match=r"per_rank.counter and rng cannot have the name"):
        live.load(stored, rename={"rng": "per_rank.counter"})
    with pytest.raises(ConfigError, match="cannot have the name ''"):
        live.load(stored, rename={"lr_scheduler": ""})
    with pytest.raises(ConfigError, match=r"not 'model\.blocks\.\*'"):
        live.load(stored, rename={"model.blocks.*": "model.layers"})
    assert differing(live.snapshot(), before) == set()


def test_a_renaming_that_leads_nowhere_is_a_mismatch_in_live_names(stored: Path) -> None:
    live = Training.make(steps=0)
    with pytest.raises(StateMismatch) as caught:
        live.load(stored, rename={"model.blocks": "model.layers"})
    assert "model.blocks.*: 8 missing" in str(caught.value)
    assert "model.layers.*: 8 unexpected" in str(caught.value)
    assert "optimizer.state.layers.*: 8 unexpected" in str(caught.value)


class Counted(nn.Module):
    """A module with extra state of several entries."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), start))
        self.total = torch.full((3,), start)
        self.note = f"from {start}"

    def get_extra_state(self) -> dict[str, Any]:
        return {"total": self.total, "note": self.note}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.total, self.note = state["total"], state["note"]


@pytest.mark.parametrize("rename", [{"model.a": "model.b"}, {"model.a._extra_state": "model.b._extra_state"}])
def test_extra_state_of_modules_is_renamed_or_left_out(tmp_path: Path, rename: dict[str, str]) -> None:
    stored = save(tmp_path, TrainState(model=nn.ModuleDict({"a": Counted(1.0)})))
    counted = Counted(2.0)
    load_checkpoint(
        stored, TrainState(model=nn.ModuleDict({"b": counted})), rename=rename, exclude=("model.*.weight",)
    )
    assert counted.note == "from 1.0"
    assert torch.equal(counted.total, torch.ones(3))
    counted = Counted(2.0)
    load_checkpoint(
        stored, TrainState(model=nn.ModuleDict({"a": counted})), exclude=("model.a._extra_state.total",)
    )
    assert counted.note == "from 1.0"
    assert torch.equal(counted.total, torch.full((3,), 2.0))


def test_the_optimizer_is_told_apart_from_copies_of_the_weights(tmp_path: Path) -> None:
    """An average of the weights has the same names below another root."""
    source = Training.make(steps=2, seed=1)
    averages = {name: torch.zeros_like(tensor) for name, tensor in source.model.state_dict().items()}
    stored = save(
        tmp_path,
        TrainState(model=source.model, optimizer=source.optimizer, extra={"m": averages}),
    )
    live = Training.make(steps=0, body="layers")
    state = TrainState(model=live.model, optimizer=live.optimizer, extra={"m": averages})
    load_checkpoint(stored, state, rename={"model.blocks": "model.layers"})
    wanted = moments({"x": source.model}, {"x": source.optimizer})
    assert_equal(moments({"x": live.model}, {"x": live.optimizer}), wanted)


def test_a_parameter_called_by_a_number_is_not_taken_for_a_group(tmp_path: Path) -> None:
    model = nn.ParameterList([torch.ones(2), torch.ones(3)])
    optimizer = adamw(model)
    for parameter in model:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    stock_save(state, checkpoint_id=tmp_path / "c")
    inner = nn.ParameterList([torch.zeros(2), torch.zeros(3)])
    live = nn.ModuleDict({"list": inner})
    live_optimizer = adamw(live)
    load_checkpoint(
        tmp_path / "c", TrainState(model=live, optimizer=live_optimizer), rename={"model": "model.list"}
    )
    assert torch.equal(inner[1], model[1])
    assert torch.equal(live_optimizer.state[inner[1]]["exp_avg"], optimizer.state[model[1]]["exp_avg"])
