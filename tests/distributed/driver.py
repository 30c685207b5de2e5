"""The driver on ranks of the pool, and what its log says.

Imported by the ranks as well as by the tests.
"""

from __future__ import annotations

import json
import os
import pty
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from launch.data import read_corpus
from launch.options import Options, parse_options
from launch.parallel import Topology, arrange
from launch.runs import choose_run
from launch.train import build, load_text, train, train_step

__all__ = [
    "BATCH_SIZE",
    "EVERYTHING",
    "SMALL",
    "SMALL_CORPUS_BYTES",
    "chosen",
    "events",
    "gradients",
    "steps",
    "trained",
    "trained_compiled",
]

BATCH_SIZE = 10
"""Divides by two ranks only."""

SMALL = ("--model-size", "tiny", "--batch-size", str(BATCH_SIZE), "--eval-iters", "1", "--eval-every", "3")
EVERYTHING = ("--dropout", "0.1", "--amp", "fp16", "--grad-accum", "2", "--workers", "1", "--seed", "7")
"""What a resume has to get right on top of weights, moments and samples."""

SMALL_CORPUS_BYTES = 4480
"""62 samples: an epoch is six batches and one of two samples, fewer than there are ranks."""


def chosen(directory: str, answer: str | None, *flags: str) -> tuple[int, bool, int | None]:
    """The run that a start chooses: its number, whether it is new, and the step that it begins from.

    Args:
        answer: what is typed on the terminal of rank 0; None: there is no terminal.
    """
    options = parse_options(["--run-dir", f"{directory}/runs", *flags])
    with _terminal(answer) as terminal, patch.object(sys, "stdin", terminal):
        run = choose_run(options, {"lr": 0.1}, rank=dist.get_rank())
    parent = run.document.parent
    return run.number, run.is_new, parent.step if parent else None


@contextmanager
def _terminal(answer: str | None) -> Iterator[TextIO | None]:
    if answer is None or dist.get_rank() != 0:
        yield None
        return
    ours, theirs = pty.openpty()
    with open(ours, "wb", buffering=0) as keyboard, open(theirs) as terminal:
        keyboard.write(answer.encode())
        yield terminal


def trained_compiled(cache: str, *arguments: Any) -> None:
    """The same with compiled blocks, whose code is kept in `cache`."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    trained(*arguments, "--compile")


def gradients(*flags: str) -> dict[str, torch.Tensor]:
    """Those of the first step, whole, by the plain names of this rank's parameters."""
    options = parse_options([*SMALL, *flags])
    topology = _topology(options)
    text = load_text(read_corpus(max_bytes=SMALL_CORPUS_BYTES), options, topology)
    training = build(options, topology, text)
    seen: dict[str, torch.Tensor] = {}

    def look(*_: Any) -> None:
        for name, parameter in training.model.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, name
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            seen[name.removeprefix("module.")] = whole.clone()

    training.optimizer.register_step_pre_hook(look)
    train_step(training, next(text.training()), topology)
    return seen


def trained(directory: str, corpus_bytes: int | None, *flags: str) -> None:
    """One start of the driver, without torchrun: on the ranks that are up, or in this process alone."""
    own = ("--run-dir", f"{directory}/runs", "--log-json", f"{directory}/log.jsonl")
    options = parse_options([*SMALL, *own, *flags])
    train(options, _topology(options), read_corpus(max_bytes=corpus_bytes) if corpus_bytes else read_corpus())


def _topology(options: Options) -> Topology:
    cpu = torch.device("cpu")
    if dist.is_initialized():
        return arrange(options.parallel, cpu)
    return Topology(rank=0, world_size=1, device=cpu, layout=options.parallel)


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    """What the log in `directory` says; a last line that a kill cut off is left out."""
    lines = (directory / "log.jsonl").read_text().split("\n")[:-1]
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def steps(directory: Path) -> list[tuple[int, str, str, str]]:
    """Number, loss, learning rate and samples of every step, with all bits."""
    return [
        (event["step"], event["loss"].hex(), event["lr"].hex(), event["samples"])
        for event in events(directory, "step")
    ]
