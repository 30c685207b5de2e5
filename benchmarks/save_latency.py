"""Saves and loads of this project and of its peers, and what the machine can do at best, in one run.

    torchrun --nproc_per_node 8 benchmarks/save_latency.py --size-gib 1 --json out.json

In every round each system has its turn, beginning with another one each time, so that a machine that slows
down slows all of them. A number is the median over rounds of the slowest rank. After every load all bytes are
compared; a difference ends the run. NOTES.md says how each ratio is defined.
"""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from pathlib import Path

# torchrun runs this file as a script: sys.path then starts with benchmarks/, not with the directory above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.first_save import SYSTEMS as FIRST_SAVE_SYSTEMS
from benchmarks.first_save import first_saves, measure_first_saves
from benchmarks.loads import measure_loads, measure_replicated, worlds_of
from benchmarks.machine import Limits
from benchmarks.peers import Ours, StockSave, System
from benchmarks.ranked import bench_of, parse_options, report
from benchmarks.ratios import (
    OURS,
    PLAN_CACHED,
    PROCESS,
    SAFETENSORS,
    SHARED,
    SNAPSHOT,
    SUCCESSOR,
    THREAD,
    TORCH_SAVE,
)
from benchmarks.rounds import Bench
from benchmarks.saves import calibrated_step, measure_memory, measure_saves, measure_tax
from benchmarks.workload import sharded_state


def main() -> None:
    options = parse_options(__doc__.splitlines()[0])
    with bench_of(options, "save_latency") as bench:
        report(bench, options, {"tax_steps": measure(bench)})


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
        thread, cached, shared = (start(bench, resources, name) for name in (THREAD, PLAN_CACHED, SHARED))
        snapshot = start(bench, resources, SNAPSHOT)
        files = present(*(start(bench, resources, name) for name in (TORCH_SAVE, SAFETENSORS)))
        with Limits(bench.directory, state, rank=bench.ranks.rank) as limits:
            step = calibrated_step(bench, limits, state)
            measure_saves(
                bench,
                state,
                expected,
                limits,
                step,
                quiet=present(ours, stock, thread, cached, process, shared, successor, snapshot, *files),
                training=present(overlapped, thread, cached, process, shared, successor, snapshot),
            )
        # Of the two in a process the better one: every system costs K steps a round.
        taxed = present(overlapped, thread, shared, successor)
        num_steps = measure_tax(bench, state, expected, step, taxed)
    measure_memory(bench, state, ours)
    measure_loads(bench, state, expected, ours=ours, stock=stock, others=present(successor, snapshot, *files))
    return num_steps


def start(bench: Bench, resources: ExitStack, name: str, *, directory: str = "") -> System | None:
    """Start a system, to be closed with the others."""
    system = bench.make(name, directory=directory)
    if system is not None:
        resources.callback(bench.close, system)
    return system


def present(*systems: System | None) -> list[System]:
    return [system for system in systems if system is not None]


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    # A process that a peer spawned: it would report every request.
    logging.disable(logging.INFO)
