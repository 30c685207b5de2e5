"""Saves and loads of this project and of its peers, and what the machine can do at best, in one run.

    torchrun --nproc_per_node 8 benchmarks/save_latency.py --size-gib 1 --json out.json

In every round each system has its turn, beginning with another one each time, so that a machine that slows
down slows all of them. A number is the median over rounds of the slowest rank. After every load all bytes are
compared; a difference ends the run. NOTES.md says how each ratio is defined.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

# torchrun runs this file as a script: sys.path then starts with benchmarks/, not with the directory above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from benchmarks.first_save import SYSTEMS as FIRST_SAVE_SYSTEMS
from benchmarks.first_save import first_saves, measure_first_saves
from benchmarks.loads import measure_loads, measure_replicated, worlds_of
from benchmarks.machine import Limits, describe
from benchmarks.measure import Ranks
from benchmarks.peers import Ours, Overlap, StockSave, System
from benchmarks.ratios import OURS, PROCESS, SHARED, SUCCESSOR, THREAD
from benchmarks.report import make_rows, print_table, result
from benchmarks.rounds import Bench
from benchmarks.saves import calibrated_step, measure_memory, measure_saves, measure_tax
from benchmarks.workload import sharded_state

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


def main() -> None:
    options = parse_options()
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, _exit)
    dist.init_process_group("gloo", timeout=timedelta(seconds=CONTROL_SECONDS))
    with working_directory(options.directory.resolve() / "save_latency") as directory:
        bench = Bench(
            directory=directory,
            state_bytes=int(options.size_gib * (1 << 30)),
            rounds=options.rounds,
            overlap=options.overlap,
            ranks=Ranks(),
        )
        num_steps = measure(bench)
        if bench.ranks.rank == 0:
            report(bench, options, num_steps)
        dist.barrier()
    dist.destroy_process_group()


def parse_options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
def working_directory(directory: Path) -> Iterator[Path]:
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


def measure(bench: Bench) -> int:
    """All phases; the number of steps over which the tax was measured."""
    with ExitStack() as sharded:
        num_steps = measure_sharded(bench, sharded)
    with ExitStack() as replicated:
        ours, stock = (
            start(bench, replicated, name, directory=f"replicated-{number}")
            for number, name in enumerate((OURS, THREAD))
        )
        measure_replicated(bench, [system for system in (ours, stock) if system is not None])
    # With the sample of this job a third of the rounds: a job takes long to start.
    measure_first_saves(bench, (bench.rounds + 2) // 3 - 1)
    return num_steps


def measure_sharded(bench: Bench, resources: ExitStack) -> int:
    """Everything on the sharded state."""
    everyone = range(bench.ranks.size)
    state = sharded_state(bench.state_bytes, worlds_of(bench.ranks.size), everyone)
    bench.ranks.together(state.fill)
    expected = bench.digests_of(state)

    # First of all, while nothing is warm; the processes that these peers start for it serve the rest, too.
    first = first_saves(bench, state, expected, list(FIRST_SAVE_SYSTEMS))
    bench.close(first.pop(OURS))
    for system in first.values():
        resources.callback(bench.close, system)
    process, successor = first.get(PROCESS), first.get(SUCCESSOR)

    # Ours twice: the plain settings, and the ones for training. Only one Checkpointer is left when memory is
    # measured.
    ours = Ours(bench.directory / "ours-off", "off")
    resources.callback(ours.close)
    stock = StockSave(bench.directory / "stock", bench.new_group())
    with ExitStack() as training:
        overlapped = start(bench, training, OURS, directory="ours-overlap")
        thread, shared = (start(bench, resources, name) for name in (THREAD, SHARED))
        with Limits(bench.directory, state, rank=bench.ranks.rank) as limits:
            step = calibrated_step(bench, limits, state)
            measure_saves(
                bench,
                state,
                expected,
                limits,
                step,
                quiet=present(ours, stock, thread, process, shared, successor),
                training=present(overlapped, thread, process, shared, successor),
            )
        # Of the two in a process the better one: every system costs K steps a round.
        taxed = present(overlapped, thread, shared, successor)
        num_steps = measure_tax(bench, state, expected, step, taxed)
    measure_memory(bench, state, ours)
    measure_loads(bench, state, expected, ours=ours, stock=stock, others=present(successor))
    return num_steps


def start(bench: Bench, resources: ExitStack, name: str, *, directory: str = "") -> System | None:
    """Start a system, to be closed with the others."""
    system = bench.make(name, directory=directory)
    if system is not None:
        resources.callback(bench.close, system)
    return system


def present(*systems: System | None) -> list[System]:
    return [system for system in systems if system is not None]


def report(bench: Bench, options: Options, num_steps: int) -> None:
    """Print the tables and write the JSON; on rank 0."""
    rows = make_rows(bench.samples, bench.notes)
    machine = {
        **describe(bench.directory, bench.samples.medians(), bench.state_bytes),
        "world_size": bench.ranks.size,
        "size_gib": options.size_gib,
        "rounds": options.rounds,
        "overlap": options.overlap,
        "tax_steps": num_steps,
        "left_out": bench.missing,
    }
    print_table(rows, bench.samples, bench.notes)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result(machine, rows, bench.samples), indent=2)
        options.json.write_text(text + "\n")


def _exit(number: int, frame: object) -> None:
    """Leave by way of the `finally` clauses when torchrun ends this rank."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    # A process that a peer spawned: it would report every request.
    logging.disable(logging.INFO)
