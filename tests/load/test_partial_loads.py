"""Parts of a checkpoint: what is selected is restored bit for bit, everything else stays bit for bit."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcp_ckpt import BestN, CheckpointConfig, Checkpointer, TrainState, load_checkpoint
from dcp_ckpt.errors import ConfigError, StateMismatch
from tests.load import trainings
from tests.load.trainings import Training, differing


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint, and what it holds."""
    training = Training.make(steps=3, seed=1)
    directory = trainings.save(tmp_path_factory.mktemp("run"), training)
    return directory, training.snapshot()


def covered(name: str, globs: tuple[str, ...]) -> bool:
    """Whether a glob matches the name or something above it, said in another way than the package does."""
    parts = name.split(".")
    above = [".".join(parts[: length + 1]) for length in range(len(parts))]
    return any(fnmatchcase(node, glob) for node in above for glob in globs)


SELECTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "everything": {},
    "model only": {"include": ("model.*",)},
    "a name": {"include": ("model.head.weight",)},
    "a branch by its name": {"include": ("model.blocks.0",)},
    "fine-tuning": {"exclude": ("optimizer.*", "lr_scheduler*")},
    "without the head": {"exclude": ("*.head.*",)},
    "without random numbers": {"exclude": ("rng", "per_rank.*")},
    "random numbers only": {"include": ("rng",)},
    "moments of one block": {"include": ("optimizer.state.blocks.1.*",)},
    "hyper-parameters only": {"include": ("optimizer.param_groups",)},
    "moments without hyper-parameters": {"include": ("optimizer.*",), "exclude": ("optimizer.param_groups",)},
    "one kind of moment": {"exclude": ("optimizer.state.*.exp_avg",)},
    "both": {"include": ("model", "extra"), "exclude": ("model.blocks.0.*",)},
    "nothing": {"include": ("model.*",), "exclude": ("model",)},
}


@pytest.mark.parametrize("which", SELECTIONS)
def test_the_selected_part_is_restored_and_the_rest_is_not_touched(
    stored: tuple[Path, dict[str, Any]], which: str
) -> None:
    directory, wanted = stored
    selection = SELECTIONS[which]
    live = Training.make(steps=2, seed=2, lr=0.125)
    before = live.snapshot()
    report = live.load(directory, **selection)
    after = live.snapshot()
    included = selection.get("include", ("*",))
    # Hyper-parameters are one value.
    names = {name: "optimizer.param_groups" if ".param_groups." in name else name for name in before}
    chosen = {
        name
        for name, stored_name in names.items()
        if covered(stored_name, included) and not covered(stored_name, selection.get("exclude", ()))
    }
    assert differing({n: after[n] for n in chosen}, {n: wanted[n] for n in chosen}) == set()
    left = before.keys() - chosen
    assert differing({n: after[n] for n in left}, {n: before[n] for n in left}) == set()
    assert {names[name] for name in left} <= set(report.skipped)
    assert {names[name] for name in chosen} <= set(report.restored)
    assert not set(report.skipped) & set(report.restored)


def test_one_kind_of_moment_cannot_stay_where_there_is_none(stored: tuple[Path, dict[str, Any]]) -> None:
    """Adam would take the other moments for all there are, and fail at the next step."""
    live = Training.make(steps=0)
    with pytest.raises(StateMismatch, match="it is left out, and the optimizer has none to keep"):
        live.load(stored[0], exclude=("optimizer.state.*.exp_avg",))


@pytest.mark.parametrize(
    ("keyword", "glob", "hint"),
    [
        ("exclude", "optimzer.*", "did you mean optimizer"),
        ("include", "model.head.wieght", "did you mean model.head.weight"),
        ("cast", "modle.*", "did you mean model?"),
        ("exclude", "model.blocks.7.*", "did you mean model.blocks.1"),
        ("exclude", "xyz", "matches nothing in the state or the checkpoint ["),
    ],
)
def test_a_glob_that_matches_nothing_is_an_error(
    stored: tuple[Path, dict[str, Any]], keyword: str, glob: str, hint: str
) -> None:
    live = Training.make(steps=1, seed=2)
    before = live.snapshot()
    with pytest.raises(ConfigError) as caught:
        live.load(stored[0], **{keyword: ("model.*", glob)})
    assert f"{keyword}: {glob!r} matches nothing" in str(caught.value)
    assert hint in str(caught.value)
    assert "'model.*'" not in str(caught.value)
    assert differing(live.snapshot(), before) == set()


def test_adapters_of_any_step_go_onto_a_base(tmp_path: Path) -> None:
    """Base and adapters are in one checkpoint or in two; they load apart, those of the best or of a step."""

    def model(*, base: float, adapter: float) -> nn.ParameterDict:
        return nn.ParameterDict({"weight": torch.full((2, 2), base), "lora_a": torch.full((1, 2), adapter)})

    def numbers(model: nn.ParameterDict) -> list[float]:
        return [model[name].unique().item() for name in ("weight", "lora_a")]

    config = CheckpointConfig(keep=BestN(2, "loss"))
    with Checkpointer(tmp_path, config=config) as checkpointer:
        for step, loss in ((1, 0.5), (2, 0.25), (3, 1.0)):
            state = TrainState(model=model(base=7.0, adapter=float(step)), rng=False)
            checkpointer.save(state, step=step, metrics={"loss": loss}).result(30)
        best = checkpointer.best()
        assert best is not None
    live = model(base=0.0, adapter=0.0)
    state = TrainState(model=live, rng=False)
    load_checkpoint(tmp_path / "step-00000001", state, exclude=("*.lora_*",))
    assert numbers(live) == [7.0, 0.0]
    for path, adapter in ((best.path, 2.0), (tmp_path / "step-00000003", 3.0)):
        load_checkpoint(path, state, include=("*.lora_*",))
        assert numbers(live) == [7.0, adapter]


def test_a_glob_may_match_on_one_side_only(stored: tuple[Path, dict[str, Any]]) -> None:
    directory, wanted = stored
    model_only = TrainState(model=Training.make(steps=0).model, rng=False)
    load_checkpoint(directory, model_only, exclude=("lr_scheduler", "optimizer.*"))
    fresh = Training.make(steps=0, head="top")
    report = fresh.load(directory, exclude=("*.top.*", "*.head.*"))
    assert {"model.top.weight", "model.head.weight", "optimizer.state.top.weight"} <= set(report.skipped)
    assert (
        differing({"w": fresh.model.blocks[0][0].weight}, {"w": wanted["model.blocks.0.0.weight"]}) == set()
    )


def test_a_string_instead_of_a_tuple_is_refused(stored: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r'exclude takes a sequence of globs, such as exclude=\("rng",\)'):
        Training.make(steps=0).load(stored[0], exclude="rng")


def test_the_checkpointer_takes_the_same_keywords(stored: tuple[Path, dict[str, Any]]) -> None:
    directory, wanted = stored
    live = Training.make(steps=1, seed=2, body="layers")
    with Checkpointer(directory.parent) as checkpointer:
        report = checkpointer.load(
            live.state,
            7,
            include=("model",),
            exclude=("model.head",),
            rename={"model.blocks": "model.layers"},
        )
    assert report is not None
    assert sorted(name for name in report.restored if "weight" in name) == [
        f"model.layers.{block}.{part}.weight" for block in (0, 1) for part in (0, 1)
    ]
    assert torch.equal(live.model.layers[1][0].weight, wanted["model.blocks.1.0.weight"])


class Averages:
    """An object with tensors, of which a part may be loaded."""

    def __init__(self, start: float, names: tuple[str, ...]) -> None:
        self.values = {name: torch.full((2,), start) for name in names}
        self.decay = start

    def state_dict(self) -> dict[str, Any]:
        return {"values": dict(self.values), "decay": self.decay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values, self.decay = dict(state["values"]), state["decay"]


def test_an_object_keeps_what_is_left_out_of_it(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save({"ema": Averages(1.0, ("a", "b"))}, step=1).result(60)
    live = Averages(5.0, ("a", "b", "c"))
    load_checkpoint(tmp_path / "step-00000001", {"ema": live}, exclude=("ema.values.b", "ema.values.c"))
    assert {name: value[0].item() for name, value in live.values.items()} == {"a": 1.0, "b": 5.0, "c": 5.0}
    assert live.decay == 1.0


def test_a_value_is_restored_as_a_whole_with_the_tensors_in_it(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save({"pair": [1, torch.ones(2)], "n": 1}, step=1).result(60)
    live: dict[str, Any] = {"pair": [5, torch.zeros(2)], "n": 5}
    with pytest.raises(ConfigError, match=r"'pair\.1' matches nothing"):
        load_checkpoint(tmp_path / "step-00000001", live, exclude=("pair.1",))
    report = load_checkpoint(tmp_path / "step-00000001", live, exclude=("pair",))
    assert (live["n"], live["pair"][0], live["pair"][1].tolist()) == (1, 5, [0.0, 0.0])
    assert report.skipped == ("pair",)
    load_checkpoint(tmp_path / "step-00000001", live, include=("p*r",))
    assert (live["pair"][0], live["pair"][1].tolist()) == (1, [1.0, 1.0])
