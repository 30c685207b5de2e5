"""The documentation is held to what is there: links, commands, examples, and a site that builds."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import dcp_ckpt

ROOT = Path(__file__).resolve().parent.parent
SKIPPED_FOLDERS = {".venv", ".git", "build", "runs", "site"}
PAGES = sorted(
    path for path in ROOT.rglob("*.md") if not SKIPPED_FOLDERS & set(path.relative_to(ROOT).parts[:-1])
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings can be linked by, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page: Path) -> None:
    problems = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            problems.append(f"{link}: there is no such file")
        elif anchor and anchor not in anchors(target):
            problems.append(f"{link}: there is no such heading")
    assert not problems, f"{page.name}: {problems}"


def commands_of(page: Path) -> list[list[str]]:
    """The words of each command in a page's bash blocks, prompt and variables left off."""
    commands = []
    for language, block in FENCE.findall(page.read_text()):
        if language != "bash":
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                commands.append(words)
    return commands


def named(program: str) -> list[list[str]]:
    """All commands of all pages that call a program."""
    return [words for page in PAGES for words in commands_of(page) if words[0].rpartition("/")[2] == program]


@cache
def help_text(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(command)} --help: {done.stderr}"
    return done.stdout


def unknown_flags(words: list[str], shown: str) -> list[str]:
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [flag for flag in flags if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", shown)]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = {word for words in named("make") for word in words[1:] if "=" not in word}
    assert used, "the README names no make target: how does a newcomer start?"
    assert used <= targets, f"not in the Makefile: {sorted(used - targets)}"


def test_programs_exist_and_know_their_flags() -> None:
    for words in named("torchrun"):
        position = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script = words[position]
        assert (ROOT / script).is_file(), f"{script} does not exist"
        unknown = unknown_flags(words[position + 1 :], help_text(script))
        assert not unknown, f"{script} does not know {unknown}"


def test_subcommands_exist_and_know_their_flags() -> None:
    for words in named("dcp-ckpt"):
        shown = (
            help_text("-m", "dcp_ckpt", words[1])
            if not words[1].startswith("-")
            else help_text("-m", "dcp_ckpt")
        )
        unknown = unknown_flags(words[1:], shown)
        assert not unknown, f"dcp-ckpt {words[1]} does not know {unknown}"


def python_blocks(page: str) -> list[str]:
    return [block for language, block in FENCE.findall((ROOT / page).read_text()) if language == "python"]


def test_examples_of_state_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import amp, nn, optim

    from dcp_ckpt import Checkpointer, open_checkpoint

    monkeypatch.chdir(tmp_path)
    model = nn.Linear(3, 2)
    optimizer = optim.AdamW(model.parameters())
    names: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
        "scaler": amp.GradScaler("cpu"),
        "average": optim.swa_utils.AveragedModel(model),
    }
    first, objects, _, _, rates = python_blocks("docs/state.md")
    for block in (first, objects, rates):
        exec(compile(block, "docs/state.md", "exec"), names)
    with open_checkpoint("runs/exp@1") as checkpoint:
        assert {"model.weight", "extra.ema.module.bias", "extra.best.value", "scaler"} <= set(
            checkpoint.keys()
        )
    assert (names["scheduler"].get_last_lr(), optimizer.param_groups[0]["lr"]) == ([0.001], 1e-4)
    with Checkpointer("runs/plain") as checkpointer:
        names["state"]["mean"].add(4.0)
        checkpointer.save(names["state"], step=1).result(30)
        names["state"]["mean"].add(8.0)
        checkpointer.load(names["state"])
    assert names["state"]["mean"].add(6.0) == 5.0


def test_examples_of_layouts_and_data_in_state_run() -> None:
    from torch import arange, nn, optim

    from dcp_ckpt import TrainState
    from tests.state.fake_worlds import fake_world

    model = nn.Linear(3, 2)
    names: dict[str, Any] = {
        "TrainState": TrainState,
        "model": model,
        "stage_module": model,
        "optimizer": optim.SGD(model.parameters(), lr=0.1),
        "dataset": arange(16),
    }
    _, _, layouts, data, _ = python_blocks("docs/state.md")
    with fake_world(rank=5, world_size=8):
        exec(compile(layouts, "docs/state.md", "exec"), names)
        assert names["state"].components()
        assert names["roles"].stage_ranks() == (4, 5, 6, 7)
    exec(compile(data, "docs/state.md", "exec"), names)
    assert len(names["batch"]) == 8
    assert len(list(names["loader"])) == 2, "the next epoch"
    names["loader"].close()


def test_examples_of_stock_dcp_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn, ones, optim

    monkeypatch.chdir(tmp_path)
    model = nn.Linear(3, 2)
    optimizer = optim.AdamW(model.parameters())
    model(ones(1, 3)).sum().backward()
    optimizer.step()
    names = {"model": model, "optimizer": optimizer}
    blocks = python_blocks("docs/stock-dcp.md")
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/stock-dcp.md", "exec"), names)
    assert names["report"].step == 200  # type: ignore[attr-defined]


def test_examples_of_policies_and_events_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import ones

    from dcp_ckpt import Checkpointer, open_run, read_events

    monkeypatch.chdir(tmp_path)
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
    rules, reporting = python_blocks("docs/policies.md")
    exec(compile(rules, "docs/policies.md", "exec"), names)
    sinks, hooks = python_blocks("docs/events.md")
    exec(compile(sinks, "docs/events.md", "exec"), names)
    exec(compile(hooks, "docs/events.md", "exec"), names)
    watched = Checkpointer(
        run.path,
        config=names["config"],
        sinks=[names["JsonLinesSink"](f"{run.path}/events.jsonl")],
        hooks=[names["AverageInstead"]()],
    )
    with watched as names["checkpointer"]:
        assert watched.should_save(500)
        exec(compile(reporting, "docs/policies.md", "exec"), names)
        assert watched.checkpoints()[0].metrics == {"val_loss": 0.5}
    assert [event["event"] for event in read_events(f"{run.path}/events.jsonl")][-1] == "save durable"


def test_the_quickstart_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    training, reading = python_blocks("docs/quickstart.md")
    names: dict[str, Any] = {}
    # Removals wait for readers that may be under way; nobody reads here.
    training = training.replace("LatestN(2))", "LatestN(2), grace_seconds=0.0)")
    exec(compile(training, "docs/quickstart.md", "exec"), names)
    names["train"](last_step=60)  # as in a new process: it goes on
    for words in commands_of(ROOT / "docs/quickstart.md"):
        if words[0] == "dcp-ckpt":
            done = subprocess.run(
                [sys.executable, "-m", "dcp_ckpt", *words[1:]],
                capture_output=True, text=True, timeout=120, check=False,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            assert done.returncode == 0, f"{words}: {done.stderr}"
    exec(compile(reading, "docs/quickstart.md", "exec"), names)
    assert "model.weight" in capsys.readouterr().out
    assert names["weight"].shape == (8, 8)
    kept = {int(path.name[-8:]) for path in Path("runs/first").glob("step-*")}
    assert kept == {30, 50, 60}, "the two newest, and the one that it went on from"


@pytest.mark.parametrize("page", ["docs/resume.md", "docs/migration.md"])
def test_examples_run_twice(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in python_blocks(page):
        exec(compile(block, page, "exec"), {})
    if page == "docs/resume.md":
        names: dict[str, Any] = {}
        exec(compile(python_blocks(page)[0], page, "exec"), names)
        assert names["report"].step == 1


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site/api/index.html").read_text()
    missing = [name for name in dcp_ckpt.__all__ if not re.search(rf'id="dcp_ckpt\.[\w.]*{name}"', api)]
    assert not missing, f"not in docs/api.md: {missing}"
    assert "dcp-ckpt-verify" in (tmp_path / "site/cli/index.html").read_text()
