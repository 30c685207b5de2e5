"""The driver on ranks of the pool, and what its log says.

Imported by the ranks as well as by the tests.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.data import read_corpus
from launch.options import parse_options
from launch.parallel import Topology, arrange
from launch.train import train

__all__ = [
    "BATCH_SIZE",
    "EVERYTHING",
    "SMALL",
    "SMALL_CORPUS_BYTES",
    "events",
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


def trained_compiled(cache: str, *arguments: Any) -> None:
    """The same with compiled blocks, whose code is kept in `cache`."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    trained(*arguments, "--compile")


def trained(directory: str, corpus_bytes: int | None, *flags: str) -> None:
    """One start of the driver, without torchrun: on the ranks that are up, or in this process alone."""
    own = ("--run-dir", f"{directory}/runs", "--log-json", f"{directory}/log.jsonl")
    options = parse_options([*SMALL, *own, *flags])
    cpu = torch.device("cpu")
    if dist.is_initialized():
        topology = arrange(options.parallel, cpu)
    else:
        topology = Topology(rank=0, world_size=1, device=cpu, layout=options.parallel)
    train(options, topology, read_corpus(max_bytes=corpus_bytes) if corpus_bytes else read_corpus())


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
