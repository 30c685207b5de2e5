"""Every command of every page runs: as it stands, or on a small world where it names a large one."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

from dcp_ckpt import CheckpointConfig, Checkpointer, export, open_checkpoint, open_run
from launch.data import read_corpus
from launch.options import parse_options
from launch.parallel import Topology
from launch.train import build, load_text, train_step
from tests.cli.commands import invoke
from tests.distributed.driver import SMALL, SMALL_CORPUS_BYTES, trained
from tests.pages import Block, blocks_of, commands_in, pages_with, prose_of

pytestmark = pytest.mark.distributed

SUBSTITUTES = {
    r"--nproc_per_node 8": "--nproc_per_node 2",
    r"--nproc_per_node [45]": "--nproc_per_node 1",
    r"--steps 200": "--steps 2",
    r"--steps 300": "--steps 3",
    r"dcp-ckpt watch": "dcp-ckpt watch --once",  # else it goes on until Ctrl-C
    r"s3://checkpoints": "{s3}",
}
"""What a test cannot do -> what it does instead. Otherwise a command runs as it is written."""

NOT_RUN = {
    "make demo": "trains on eight ranks for a minute; its judgement is tested in test_launch_demo.py",
    "make test": "runs this test",
    "pip install .": "changes what the tests run in; test_docs.py looks up the extras",
}

EXAMPLE_RUN = "runs/first"

TRAINING = ("--steps", "2", "--save-every", "2")
"""Before the flags of a command: most name no number of steps."""


def shell_blocks() -> list[Block]:
    """All of them, each text once; those on a run of a page's own example are run together with that."""
    found = {block.text: block for page in pages_with("bash") for block in blocks_of(page, "bash")}
    return [block for block in found.values() if EXAMPLE_RUN not in block.text]


def save_run(base: str, *flags: str, steps: Mapping[int, float]) -> None:
    """A run of the driver with checkpoints of these steps and validation losses, after one step."""
    options = parse_options([*SMALL, "--run-dir", base, *flags])
    topology = Topology(rank=0, world_size=1, device=torch.device("cpu"), layout=options.parallel)
    text = load_text(read_corpus(max_bytes=SMALL_CORPUS_BYTES), options, topology)
    training = build(options, topology, text)
    train_step(training, next(text.training()), topology)
    run = open_run(base, resume="never", config=options.as_json())
    with Checkpointer(run.path, config=CheckpointConfig(keep=None)) as checkpointer:
        for step, val_loss in steps.items():
            checkpointer.save(training.state, step=step, metrics={"val_loss": val_loss})


@pytest.fixture(scope="module")
def situation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands of the pages are about: a run and its fine-tuning."""
    directory = tmp_path_factory.mktemp("situation")
    save_run(f"{directory}/runs", steps={200: 0.5, 800: 0.25, 1000: 0.125, 1200: 0.375})
    save_run(f"{directory}/runs", "--lora-rank", "2", steps={200: 0.5})
    return directory


def add_sources(directory: Path) -> None:
    """What `dcp-ckpt import` is shown with."""
    export(f"{directory}/runs/run-001@latest", directory / "model")
    with open_checkpoint(f"{directory}/runs/run-001@latest") as checkpoint:
        weights = {
            name: checkpoint.read_tensor(name) for name in checkpoint.tensors if name.startswith("model.")
        }
    torch.save(
        {name.removeprefix("model."): weight for name, weight in weights.items()},
        directory / "pytorch_model.bin",
    )
    stock_save(weights, checkpoint_id=directory / "old" / "step-1000")


def start(environment: dict[str, str], directory: str, script: str, *flags: str) -> None:
    """What torchrun starts on every rank: the driver, or the example of a page that calls itself `run.py`."""
    os.environ.update(environment)
    if script == "launch/train.py":
        trained(directory, SMALL_CORPUS_BYTES, *TRAINING, *flags)
    else:
        with chdir(directory):
            exec(compile(example_called(script), script, "exec"), {})


def example_called(script: str) -> str:
    """Its source, without the lines that begin and end the process group: the ranks have one."""
    (example,) = (
        block for block in blocks_of("docs/quickstart.md", "python") if "init_process_group" in block.text
    )
    assert f"`{script}`" in prose_of("docs/quickstart.md")
    source, num_removed = re.subn(
        r"^dist\.(init|destroy)_process_group\(.*\)$", "", example.text, flags=re.MULTILINE
    )
    assert num_removed == 2
    return source


def test_nothing_is_listed_that_no_page_has() -> None:
    blocks = [block for page in pages_with("bash") for block in blocks_of(page, "bash")]
    lines = [" ".join(words) for block in blocks for words in commands_in(block)]
    stale = [line for line in NOT_RUN if line not in lines]
    stale += [named for named in SUBSTITUTES if not any(re.search(named, line) for line in lines)]
    assert not stale


@pytest.mark.parametrize("block", shell_blocks(), ids=str)
def test_commands_run(
    block: Block, situation, tmp_path, monkeypatch, pool, s3_prefix, s3_environment
) -> None:
    monkeypatch.chdir(tmp_path)
    if "torchrun" not in block.text:  # else it begins with nothing
        shutil.copytree(situation, tmp_path, dirs_exist_ok=True)
    if "dcp-ckpt import" in block.text and "export" not in block.text:
        add_sources(tmp_path)
    for words in commands_in(block):
        line = shlex.join(words)
        for named, instead in SUBSTITUTES.items():
            line = re.sub(named, instead.format(s3=s3_prefix), line)
        program, *arguments = shlex.split(line)
        if program == "torchrun":
            script = next(i for i, argument in enumerate(arguments) if argument.endswith(".py"))
            num_ranks = int(arguments[arguments.index("--nproc_per_node") + 1])
            pool.run(start, num_ranks, s3_environment, str(tmp_path), *arguments[script:])
        elif program == "dcp-ckpt":
            result = invoke(*arguments)
            assert result.exit_code == 0, f"{line}: {result.output}"
        else:
            assert " ".join(words) in NOT_RUN, f"{block}: nobody runs {line!r}"
