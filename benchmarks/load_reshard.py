"""Loads of one checkpoint on the same and on other numbers of ranks, and what they read.

    torchrun --nproc_per_node 8 benchmarks/load_reshard.py --size-gib 1 --json out.json

The load phases of `save_latency.py` without its saves, and the bytes that a load on half of the ranks
reads over the bytes that it fills. NOTES.md says how each ratio is defined.
"""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.loads import measure_loads, measure_replicated, worlds_of
from benchmarks.measure import total
from benchmarks.peers import Ours, StockSave, load_ours
from benchmarks.ranked import bench_of, parse_options, report
from benchmarks.ratios import LOAD_TARGETS, OURS, THREAD
from benchmarks.rounds import Bench
from benchmarks.workload import sharded_state


def main() -> None:
    options = parse_options(__doc__.splitlines()[0])
    with bench_of(options, "load_reshard") as bench:
        with ExitStack() as resources:
            measure_sharded(bench, resources)
        with ExitStack() as resources:
            made = (bench.make(name, directory=f"ddp-{number}") for number, name in enumerate((OURS, THREAD)))
            systems = [system for system in made if system is not None]
            for system in systems:
                resources.callback(bench.close, system)
            measure_replicated(bench, systems)
        report(bench, options, {}, LOAD_TARGETS)


def measure_sharded(bench: Bench, resources: ExitStack) -> None:
    """The times of all loads, and the bytes of one."""
    state = sharded_state(bench.state_bytes, worlds_of(bench.ranks.size), range(bench.ranks.size))
    bench.ranks.together(state.fill)
    ours = Ours(bench.directory / "ours", "off")
    resources.callback(ours.close)
    stock = StockSave(bench.directory / "stock", bench.new_group())
    measure_loads(bench, state, bench.digests_of(state), ours=ours, stock=stock, others=[])
    half = worlds_of(bench.ranks.size)[1]
    small = sharded_state(bench.state_bytes, worlds_of(bench.ranks.size), range(half))
    group = bench.new_group(range(half))

    def load() -> dict[str, float]:
        if not small.tensors:
            return {"read": 0.0, "filled": 0.0}
        report = load_ours(ours.path, small, group)
        return {"read": float(report.bytes_read), "filled": float(small.local_bytes)}

    parts = total(bench.ranks.together(load))
    bench.samples.add("reshard_bytes", OURS, parts["read"] / parts["filled"])


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    logging.disable(logging.INFO)
