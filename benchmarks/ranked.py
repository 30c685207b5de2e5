"""The frame of benchmarks that run under torchrun: flags, ranks, a directory that goes away, the report.

Knows no system. Used by `save_latency`, `load_reshard`, `training_tax` and `incremental`.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.machine import describe
from benchmarks.measure import Ranks
from benchmarks.peers import Overlap
from benchmarks.ratios import TARGETS, Target
from benchmarks.report import make_rows, print_table, result
from benchmarks.rounds import Bench

__all__ = ["Options", "bench_of", "parse_options", "report"]

CONTROL_SECONDS = 400.0
"""How long ranks wait for each other: longer than any deadline of a system that they wait for."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags; see `--help`."""

    size_gib: float
    rounds: int
    directory: Path
    json: Path | None
    overlap: Overlap


def parse_options(description: str) -> Options:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size-gib", type=float, default=1.0, help="bytes of the sharded state (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default: 7)")
    parser.add_argument("--dir", type=Path, default=Path("bench-run"), help="where to write (./bench-run)")
    parser.add_argument("--json", type=Path, default=None, help="write the results there")
    parser.add_argument(
        "--overlap",
        choices=("step", "off"),
        default="step",
        help="of this project while training goes on (default: step)",
    )
    given = parser.parse_args()
    if given.rounds < 1 or given.size_gib <= 0:
        parser.error("--rounds and --size-gib must be positive")
    return Options(
        size_gib=given.size_gib,
        rounds=given.rounds,
        directory=given.dir,
        json=given.json,
        overlap=given.overlap,
    )


@contextmanager
def bench_of(options: Options, name: str) -> Iterator[Bench]:
    """The bench of all ranks, with a directory of its own below that of the options."""
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, _exit)
    dist.init_process_group("gloo", timeout=timedelta(seconds=CONTROL_SECONDS))
    with _working_directory(options.directory.resolve() / name) as directory:
        yield Bench(
            directory=directory,
            state_bytes=int(options.size_gib * (1 << 30)),
            rounds=options.rounds,
            overlap=options.overlap,
            ranks=Ranks(),
        )
        dist.barrier()
    dist.destroy_process_group()


def report(
    bench: Bench,
    options: Options,
    settings: Mapping[str, object],
    targets: Sequence[Target] = TARGETS,
) -> None:
    """Print the tables and write the JSON; does nothing on other ranks than 0."""
    if bench.ranks.rank:
        return
    rows = make_rows(bench.samples, bench.notes)
    machine = {
        **describe(bench.directory, bench.samples.medians(), bench.state_bytes),
        "world_size": bench.ranks.size,
        "size_gib": options.size_gib,
        "rounds": options.rounds,
        "overlap": options.overlap,
        **settings,
        "left_out": bench.missing,
    }
    print_table(rows, bench.samples, bench.notes, targets)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result(machine, rows, bench.samples, targets), indent=2)
        options.json.write_text(text + "\n")


@contextmanager
def _working_directory(directory: Path) -> Iterator[Path]:
    """An empty directory for all ranks, removed by rank 0 however the run ends."""
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    dist.barrier()
    try:
        yield directory
    finally:
        if first:
            shutil.rmtree(directory, ignore_errors=True)


def _exit(number: int, frame: object) -> None:
    """Leave by way of the `finally` clauses when torchrun ends this rank."""
    raise SystemExit(128 + number)
