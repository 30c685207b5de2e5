"""What saving costs a training in all: K steps with a save at their start, against K steps without.

    torchrun --nproc_per_node 8 benchmarks/training_tax.py --size-gib 1 --json out.json

Stalls, the wait at the fence and what a save in the background slows down are all in it. NOTES.md has the
details.
"""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.loads import worlds_of
from benchmarks.machine import Limits
from benchmarks.measure import slowest
from benchmarks.peers import System
from benchmarks.ranked import bench_of, parse_options, report
from benchmarks.ratios import MACHINE, OURS, SHARED, TAX_TARGETS, THREAD
from benchmarks.rounds import Bench
from benchmarks.saves import calibrated_step, measure_tax, timed_save
from benchmarks.workload import sharded_state

SYSTEMS = (OURS, THREAD, SHARED)


def main() -> None:
    options = parse_options(__doc__.splitlines()[0])
    with bench_of(options, "training_tax") as bench:
        with ExitStack() as resources:
            num_steps = measure(bench, resources)
        report(bench, options, {"tax_steps": num_steps}, TAX_TARGETS)


def measure(bench: Bench, resources: ExitStack) -> int:
    """The tax of each system; the number of steps it was measured over."""
    state = sharded_state(bench.state_bytes, worlds_of(bench.ranks.size), range(bench.ranks.size))
    bench.ranks.together(state.fill)
    expected = bench.digests_of(state)
    systems: list[System] = []
    for name in SYSTEMS:
        system = bench.make(name)
        if system is not None:
            resources.callback(bench.close, system)
            systems.append(system)
    with Limits(bench.directory, state, rank=bench.ranks.rank) as limits:
        step = calibrated_step(bench, limits, state)
    # How long a step and a save take decides how many steps there are to be.
    for _ in bench.each_round("steps and saves"):
        bench.samples.add("step", MACHINE, bench.ranks.seconds(step.run))
        for system in systems:
            parts = slowest(bench.ranks.together(partial(timed_save, system, state)))
            bench.samples.add("durable", system.name, parts["durable"])
            bench.on_first_rank(system.discard)
    return measure_tax(bench, state, expected, step, systems)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    logging.disable(logging.INFO)
