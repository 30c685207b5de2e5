"""Every Python block of every page runs, with what its page leaves to the reader given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import amp, arange, nn, ones, optim

from dcp_ckpt import (
    CheckpointConfig,
    Checkpointer,
    ElasticSampler,
    EverySteps,
    TrainState,
    open_checkpoint,
    open_run,
    read_events,
)
from tests.cli.commands import invoke
from tests.pages import blocks_of, commands_in, pages_with
from tests.state.fake_worlds import fake_world

COVERED = {"docs/policies.md", "docs/events.md"}
"""Pages of which every block is run: these by `test_policies_and_events`, others by `runs_all_of`."""


class Examples:
    """The Python blocks of one page, in order; all of them have to be run."""

    def __init__(self, page: str) -> None:
        self._blocks = blocks_of(page, "python")
        self._left = {*range(len(self._blocks))}

    def run(self, number: int, names: dict[str, Any], replaced: Mapping[str, str] | None = None) -> None:
        """Run one block with `names` as its globals; `replaced` are texts that a test cannot do with."""
        source = self._blocks[number].text
        for old, new in (replaced or {}).items():
            assert old in source, f"{self._blocks[number]} no longer has {old}"
            source = source.replace(old, new)
        exec(compile(source, str(self._blocks[number]), "exec"), names)
        self._left.discard(number)

    def leave(self, number: int) -> None:
        """Say that another test runs this one."""
        self._left.discard(number)

    def require_all_run(self) -> None:
        left = [str(self._blocks[number]) for number in sorted(self._left)]
        assert not left, f"nobody runs {left}"


@pytest.fixture
def examples(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> Iterator[Examples]:
    """Those of a page, run in an empty directory."""
    monkeypatch.chdir(tmp_path)
    page = Examples(request.param)
    yield page
    page.require_all_run()


def runs_all_of(page: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a test the `examples` of a page, and fails it when it leaves one out."""
    COVERED.add(page)
    return pytest.mark.parametrize("examples", [page], indirect=True)


def small_training() -> dict[str, Any]:
    """The objects that pages call `model`, `optimizer` and so on."""
    model = nn.Linear(3, 2)
    optimizer = optim.AdamW(model.parameters())
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    }


def test_every_page_with_examples_is_run() -> None:
    assert sorted(COVERED) == pages_with("python")


@runs_all_of("README.md")
def test_the_readme(examples: Examples) -> None:
    names = small_training()
    names["loader"] = ElasticSampler(num_samples=64, global_batch_size=8, rank=0, world_size=1, seed=0)
    done: list[int] = []
    names["train_step"] = lambda: done.append(1)
    examples.run(0, names, {"1001": "201"})
    assert len(done) == 200
    with open_checkpoint("runs/gpt@latest") as checkpoint:
        assert checkpoint.manifest.step == 200


@runs_all_of("docs/quickstart.md")
def test_the_quickstart(examples: Examples, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    # Removals wait for readers that may be under way; nobody reads here.
    examples.run(0, names, {"LatestN(2))": "LatestN(2), grace_seconds=0.0)"})
    names["train"](last_step=60)  # as in a new process: it goes on
    looks = next(block for block in blocks_of("docs/quickstart.md", "bash") if "dcp-ckpt" in block.text)
    for words in commands_in(looks):
        result = invoke(*words[1:])
        assert result.exit_code == 0, f"{words}: {result.output}"
    examples.leave(1)  # on ranks, in `test_documented_commands.py`
    examples.run(2, names)
    assert "model.weight" in capsys.readouterr().out
    assert names["weight"].shape == (8, 8)
    kept = {int(path.name[-8:]) for path in Path("runs/first").glob("step-*")}
    assert kept == {30, 50, 60}, "the two newest, and the one that it went on from"


@runs_all_of("docs/state.md")
def test_state(examples: Examples) -> None:
    names = small_training()
    model, optimizer = names["model"], names["optimizer"]
    names |= {"scaler": amp.GradScaler("cpu"), "average": optim.swa_utils.AveragedModel(model)}
    examples.run(0, names)
    with open_checkpoint("runs/exp@1") as checkpoint:
        keys = {*checkpoint.keys()}
    assert {"model.weight", "extra.ema.module.bias", "extra.best.value", "scaler"} <= keys
    examples.run(1, names)
    with Checkpointer("runs/plain") as checkpointer:
        names["state"]["mean"].add(4.0)
        checkpointer.save(names["state"], step=1).result(30)
        names["state"]["mean"].add(8.0)
        checkpointer.load(names["state"])
    assert names["state"]["mean"].add(6.0) == 5.0
    with fake_world(rank=5, world_size=8):
        layout = names | {"stage_module": model}
        examples.run(2, layout)
        assert layout["state"].components()
        assert layout["roles"].stage_ranks() == (4, 5, 6, 7)
    data = names | {"dataset": arange(16)}
    examples.run(3, data)
    assert len(data["batch"]) == 8
    assert len(list(data["loader"])) == 2, "the next epoch"
    data["loader"].close()
    examples.run(4, names)
    assert (names["scheduler"].get_last_lr(), optimizer.param_groups[0]["lr"]) == ([0.001], 1e-4)


@runs_all_of("docs/stock-dcp.md")
def test_stock_dcp(examples: Examples) -> None:
    names = small_training()
    names["model"](ones(1, 3)).sum().backward()
    names["optimizer"].step()
    for number in range(3):
        examples.run(number, names)
    assert names["report"].step == 200


def test_policies_and_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One training shows both pages."""
    monkeypatch.chdir(tmp_path)
    policies, events = Examples("docs/policies.md"), Examples("docs/events.md")
    run = open_run("runs")
    names: dict[str, Any] = {
        "state": {"weight": ones(3)},
        "step": 500,
        "loss": 1.0,
        "lr": 0.1,
        "run": run,
        "evaluate": lambda: 0.5,
        "swap_in_the_average": lambda: None,
    }
    policies.run(0, names)
    events.run(0, names)
    events.run(1, names)
    log = f"{run.path}/events.jsonl"
    sinks, hooks = [names["JsonLinesSink"](log)], [names["AverageInstead"]()]
    with Checkpointer(run.path, config=names["config"], sinks=sinks, hooks=hooks) as checkpointer:
        assert checkpointer.should_save(500)
        policies.run(1, names | {"checkpointer": checkpointer})
        assert checkpointer.checkpoints()[0].metrics == {"val_loss": 0.5}
    assert [event["event"] for event in read_events(log)][-1] == "save durable"
    policies.require_all_run()
    events.require_all_run()


@runs_all_of("docs/reliability.md")
def test_preemption(examples: Examples) -> None:
    names = small_training()
    config = CheckpointConfig(save_when=EverySteps(2), stop_after_seconds=0.0)
    done: list[int] = []
    names |= {"first": 1, "last": 9, "train_step": lambda: done.append(1)}
    names["state"] = TrainState(model=names["model"], optimizer=names["optimizer"])
    with Checkpointer("runs/short", config=config) as names["checkpointer"]:
        examples.run(0, names)
    with open_checkpoint("runs/short@latest") as checkpoint:
        assert checkpoint.manifest.step == len(done) < 9, "saved where it stopped"


@runs_all_of("docs/resume.md")
def test_resume(examples: Examples, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        names: dict[str, Any] = {}
        examples.run(0, names)
    assert names["report"].step == 1
    assert "a fresh start" in capsys.readouterr().out


@runs_all_of("docs/migration.md")
def test_migration(examples: Examples) -> None:
    examples.run(0, {})
