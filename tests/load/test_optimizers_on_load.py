"""What comes back of an optimizer that has other parameters, groups or steps than the one that was saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR

from dcp_ckpt import CheckpointConfig, Checkpointer, TrainState, load_checkpoint
from dcp_ckpt.errors import StateMismatch
from tests.load.trainings import MakeOptimizer, Training, differing

KINDS: dict[str, MakeOptimizer] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "sgd-momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.1),
    "adamw-foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True),
    "adamw-fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True),
    "adamw-amsgrad": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.1),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each kind one checkpoint before the first step, and one after three."""
    path = tmp_path_factory.mktemp("run")
    with Checkpointer(path, config=CheckpointConfig(keep=None)) as checkpointer:
        for number, make in enumerate(KINDS.values()):
            for steps in (0, 3):
                training = Training.make(steps=steps, seed=1, optimizer=make)
                checkpointer.save(training.state, step=10 * number + steps).result(60)
    return path


def directory(run: Path, kind: str, steps: int) -> Path:
    return run / f"step-{10 * list(KINDS).index(kind) + steps:08}"


def saved(kind: str, steps: int) -> dict[str, Any]:
    return Training.make(steps=steps, seed=1, optimizer=KINDS[kind]).snapshot()


def below(snapshot: dict[str, Any], *roots: str) -> dict[str, Any]:
    return {name: value for name, value in snapshot.items() if name.startswith(roots)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 3], ids=["before the first step", "after three"])
@pytest.mark.parametrize("live_steps", [0, 2], ids=["into a fresh one", "into one that stepped"])
def test_state_comes_and_goes(run: Path, kind: str, steps: int, live_steps: int) -> None:
    live = Training.make(steps=live_steps, seed=2, optimizer=KINDS[kind])
    gradients = copy.deepcopy([parameter.grad for parameter in live.model.parameters()])
    parameters = [parameter for group in live.optimizer.param_groups for parameter in group["params"]]
    report = live.load(directory(run, kind, steps))
    assert (
        differing(
            below(live.snapshot(), "model", "optimizer"), below(saved(kind, steps), "model", "optimizer")
        )
        == set()
    )
    starts_anew = kind != "sgd" and steps == 0 and live_steps > 0
    names = [f"optimizer.state.{name}" for name, _ in live.model.named_parameters()]
    assert sorted(report.reinitialised) == (sorted(names) if starts_anew else [])
    assert (
        "optimizer.state.*: 10 reinitialised (the checkpoint holds no state of it)" in str(report)
    ) == starts_anew
    assert all(
        a is b
        for a, b in zip(
            parameters, (p for group in live.optimizer.param_groups for p in group["params"]), strict=True
        )
    )
    for parameter, before in zip(live.model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (before is None)
        assert before is None or torch.equal(parameter.grad, before)
    again = Training.make(steps=steps, seed=1, optimizer=KINDS[kind])
    again.step(2)
    live.step(2)
    assert differing(below(live.snapshot(), "model"), below(again.snapshot(), "model")) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_parameter_is_named_and_starts_afresh_when_left_out(run: Path, kind: str) -> None:
    live = Training.make(steps=0, seed=2, optimizer=KINDS[kind], depth=3)
    before = live.snapshot()
    with pytest.raises(StateMismatch) as caught:
        live.load(directory(run, kind, 3))
    assert "optimizer.state.blocks.2.*: 4 missing (weight, bias)" in str(caught.value).replace(
        "bias, weight", "weight, bias"
    )
    assert 'exclude=("model.blocks.2.*", "optimizer.state.blocks.2.*") leaves' in str(caught.value)
    assert differing(live.snapshot(), before) == set()

    live.load(directory(run, kind, 3), exclude=("model.blocks.2.*", "optimizer.state.blocks.2.*"))
    after, wanted = live.snapshot(), saved(kind, 3)
    new = below(before, "model.blocks.2", "optimizer.state.blocks.2")
    assert differing(below(after, "model.blocks.2", "optimizer.state.blocks.2"), new) == set()
    rest = {name: value for name, value in below(after, "model", "optimizer").items() if name not in new}
    assert differing(rest, below(wanted, "model", "optimizer")) == set()
    live.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_is_gone_is_named_and_can_be_left_out(run: Path, kind: str) -> None:
    live = Training.make(steps=1, seed=2, optimizer=KINDS[kind], depth=1)
    before = live.snapshot()
    with pytest.raises(StateMismatch, match=r"optimizer.state.blocks.1.*: 4 unexpected") as caught:
        live.load(directory(run, kind, 3))
    assert 'exclude=("model.blocks.1.*", "optimizer.state.blocks.1.*") leaves' in str(caught.value)
    assert differing(live.snapshot(), before) == set()
    live.load(directory(run, kind, 3), exclude=("*.blocks.1",))
    wanted = {name: value for name, value in saved(kind, 3).items() if ".blocks.1." not in name}
    assert (
        differing(below(live.snapshot(), "model", "optimizer"), below(wanted, "model", "optimizer")) == set()
    )
    live.step()


def two_groups(model: nn.Module, *, head_lr: float) -> torch.optim.Optimizer:
    head = [parameter for name, parameter in model.named_parameters() if "blocks" not in name]
    body = [parameter for name, parameter in model.named_parameters() if "blocks" in name]
    groups: list[dict[str, Any]] = [
        {"params": body, "tag": "body"},
        {"params": []},
        {"params": head, "lr": head_lr},
    ]
    return torch.optim.AdamW(groups, lr=0.5)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("groups")
    training = Training.make(steps=0, seed=1)
    training.optimizer = two_groups(training.model, head_lr=0.0625)
    for group in training.optimizer.param_groups:
        group["weight_decay"] = group["lr"] / 2
    for parameter in training.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    training.optimizer.step()
    with Checkpointer(path) as checkpointer:
        checkpointer.save(TrainState(model=training.model, optimizer=training.optimizer), step=1).result(60)
    return path / "step-00000001"


def hyper(optimizer: torch.optim.Optimizer) -> list[tuple[Any, ...]]:
    return [(group["lr"], group["weight_decay"], group.get("tag")) for group in optimizer.param_groups]


def test_a_new_group_keeps_its_hyper_parameters_and_the_others_get_theirs(grouped: Path) -> None:
    model = Training.make(steps=0, head="top").model
    optimizer = two_groups(model, head_lr=7.0)
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    load_checkpoint(grouped, state, exclude=("*.top.*", "*.head.*"))
    assert hyper(optimizer) == [(0.5, 0.25, "body"), (0.5, 0.25, None), (7.0, 0.01, None)]
    assert set(optimizer.state) == set(model.blocks.parameters())
    assert hyper(optimizer)[0] == (0.5, 0.25, "body")


def test_groups_are_matched_by_their_parameters_not_by_their_order(grouped: Path) -> None:
    model = Training.make(steps=0).model
    groups: list[dict[str, Any]] = [
        {"params": list(model.head.parameters())},
        {"params": list(reversed(list(model.blocks.parameters())))},
        {"params": []},
    ]
    optimizer = torch.optim.AdamW(groups)
    load_checkpoint(grouped, TrainState(model=model, optimizer=optimizer))
    assert [lr for lr, *_ in hyper(optimizer)] == [0.0625, 0.5, 0.5]
    assert hyper(optimizer)[1][2] == "body"


def test_an_optimizer_of_named_parameters_keeps_its_names_for_them(tmp_path: Path) -> None:
    """They are in the order of its own groups, and say what it calls its parameters now."""
    source, target = Training.make(steps=0).model, Training.make(steps=0, head="top").model
    with Checkpointer(tmp_path) as checkpointer:
        optimizer = torch.optim.AdamW(source.named_parameters(), lr=0.5)
        step = checkpointer.save(TrainState(model=source, optimizer=optimizer), step=1).result(60).path
    live = list(reversed(list(target.named_parameters())))
    optimizer = torch.optim.AdamW(live)
    load_checkpoint(step, TrainState(model=target, optimizer=optimizer), rename={"model.head": "model.top"})
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.5
    assert group["param_names"] == [name for name, _ in live]


def test_what_schedulers_leave_in_groups_makes_no_other_kind_of_optimizer(tmp_path: Path) -> None:
    source, target = Training.make(steps=0).model, Training.make(steps=0).model
    optimizer = torch.optim.AdamW(source.parameters())
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=9)
    with Checkpointer(tmp_path) as checkpointer:
        step = checkpointer.save(TrainState(model=source, optimizer=optimizer), step=1).result(60).path
    live = torch.optim.AdamW(target.named_parameters())
    SWALR(live, swa_lr=0.25)
    load_checkpoint(step, TrainState(model=target, optimizer=live))
    assert live.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert live.param_groups[0]["swa_lr"] == 0.25


@pytest.mark.parametrize(
    ("split", "detail"),
    [
        (
            lambda model: [[*model.blocks.parameters(), *model.head.parameters()], []],
            "group 0 of the optimizer",
        ),
        (
            lambda model: [
                model.blocks[0].parameters(),
                model.blocks[1].parameters(),
                model.head.parameters(),
                [],
            ],
            "the optimizer's groups 0 and 1 hold parameters of the checkpoint's group 0",
        ),
        (
            lambda model: [model.blocks.parameters(), model.head.parameters()],
            "the checkpoint has 3 groups, the optimizer 2",
        ),
    ],
    ids=["joined", "split", "without the empty one"],
)
def test_other_groups_are_refused_and_load_without_hyper_parameters(
    grouped: Path, split: Any, detail: str
) -> None:
    model = Training.make(steps=0).model
    optimizer = torch.optim.AdamW([{"params": list(group)} for group in split(model)], lr=3.0)
    state = TrainState(model=model, optimizer=optimizer)
    with pytest.raises(StateMismatch, match=detail) as caught:
        load_checkpoint(grouped, state)
    assert 'exclude=("optimizer.param_groups",)' in str(caught.value)
    assert not optimizer.state
    load_checkpoint(grouped, state, exclude=("optimizer.param_groups",))
    assert all(lr == 3.0 for lr, *_ in hyper(optimizer))
    assert len(optimizer.state) == 10


def test_frozen_and_never_touched_parameters_are_no_problem(tmp_path: Path) -> None:
    source = Training.make(steps=0, seed=1)
    source.model.head.requires_grad_(False)
    source.step(2)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(source.state, step=7).result(60)
    live = Training.make(steps=1, seed=2)
    report = live.load(tmp_path / "step-00000007")
    assert set(report.reinitialised) == {"optimizer.state.head.weight", "optimizer.state.head.bias"}
    assert live.model.head.weight not in live.optimizer.state
    assert len(live.optimizer.state) == 8


@pytest.mark.parametrize("kind", ["sgd-momentum", "adamw-fused", "adafactor"])
def test_moments_of_a_parameter_of_another_shape_are_not_those_of_the_live_one(run: Path, kind: str) -> None:
    live = Training.make(steps=0, seed=2, optimizer=KINDS[kind], classes=5)
    before = live.snapshot()
    for exclude in ((), ("model.head",)):
        with pytest.raises(StateMismatch, match=r"optimizer.state.head.\*: 2 of another shape") as caught:
            live.load(directory(run, kind, 3), exclude=exclude)
        assert "kept for a parameter of shape [2, 4], not [5, 4]" in str(caught.value)
        assert differing(live.snapshot(), before) == set()
    live.load(directory(run, kind, 3), exclude=("*.head",))
    assert live.model.head.weight not in live.optimizer.state
    live.step()


def test_a_part_of_the_state_cannot_stay_while_the_rest_is_removed(run: Path) -> None:
    live = Training.make(steps=2, seed=2, optimizer=KINDS["adam"])
    before = live.snapshot()
    with pytest.raises(StateMismatch, match=r"leave all state of this parameter out, or nothing of it"):
        live.load(directory(run, "adam", 0), exclude=("optimizer.state.*.exp_avg",))
    assert differing(live.snapshot(), before) == set()
    report = live.load(directory(run, "adam", 0), exclude=("optimizer.state",))
    assert differing(below(live.snapshot(), "optimizer.state"), below(before, "optimizer.state")) == set()
    assert report.reinitialised == {}
