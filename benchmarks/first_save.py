"""The first save of a training job, which pays for processes, imports and fresh memory.

A process has one first save of each system, so the benchmark's own job gives one sample and every other one
is a torchrun of this file, in which the systems come in another order.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

# torchrun runs this file as a script: sys.path then starts with benchmarks/, not with the directory above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from benchmarks.jobs import run_job
from benchmarks.measure import Ranks, slowest
from benchmarks.peers import System
from benchmarks.ratios import OURS, PROCESS, SUCCESSOR
from benchmarks.rounds import Bench, say
from benchmarks.workload import Digests, State, sharded_state

__all__ = ["first_saves", "main", "measure_first_saves"]

SYSTEMS = (OURS, PROCESS, SUCCESSOR)
METRICS = ("first_save", "first_save_blocked")
_JOB_SECONDS = 240.0


def first_saves(bench: Bench, state: State, expected: Digests, names: list[str]) -> dict[str, System]:
    """Start each system and save with it, on the clock from before it is started.

    Returns:
        The systems that work, by name; the caller closes them.
    """
    systems: dict[str, System] = {}

    def measure(name: str) -> None:
        group = bench.new_group()

        def save() -> dict[str, float]:
            start = time.perf_counter()
            system = systems[name] = bench.start(name, group, directory=f"first-{name}")
            system.begin(state)
            system.fence()
            blocked = time.perf_counter() - start
            system.finish()
            return {"blocked": blocked, "durable": time.perf_counter() - start}

        parts = slowest(bench.ranks.together(save))
        system = systems[name]
        bench.checked_load(lambda: system.load(state), state, expected, name)
        bench.on_first_rank(system.discard)
        bench.samples.add("first_save", name, parts["durable"])
        bench.samples.add("first_save_blocked", name, parts["blocked"])

    for name in names:
        if bench.ranks.rank == 0:
            say(f"first save: {name}")
        bench.attempt(name, METRICS, state, partial(measure, name))
        if name in bench.missing and name in systems:
            bench.close(systems.pop(name))
    return systems


def measure_first_saves(bench: Bench, num_jobs: int) -> None:
    """As many fresh jobs. Called on all ranks, of which only rank 0 has work; nothing else may be running."""
    bench.samples.counting = True
    for number in range(1, num_jobs + 1):
        if bench.ranks.rank == 0:
            say(f"first save: fresh job {number} of {num_jobs}")
        first = number % len(SYSTEMS)
        names = [name for name in SYSTEMS[first:] + SYSTEMS[:first] if name not in bench.missing]

        def run(names: list[str] = names) -> dict[str, float]:
            return _job(bench, names) if bench.ranks.rank == 0 else {}

        for key, seconds in slowest(bench.ranks.together(run)).items():
            metric, name = key.split("/")
            bench.samples.add(metric, name, seconds)


def _job(bench: Bench, names: list[str]) -> dict[str, float]:
    """Run this file under a torchrun of its own: metric/system -> seconds."""
    directory = bench.directory / "first-saves"
    directory.mkdir()
    result = directory / "result.json"
    run_job(
        Path(__file__),
        [
            *("--state-bytes", str(bench.state_bytes), "--overlap", bench.overlap),
            *("--dir", str(directory), "--json", str(result), *names),
        ],
        num_ranks=bench.ranks.size,
        deadline_seconds=_JOB_SECONDS,
        quiet=True,
    )
    parts: dict[str, float] = json.loads(result.read_text())
    bench.remove(directory)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state-bytes", required=True, type=int)
    parser.add_argument("--overlap", choices=("step", "off"), required=True)
    parser.add_argument("--dir", required=True, type=Path)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("systems", nargs="+", choices=SYSTEMS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=_JOB_SECONDS))
    bench = Bench(
        directory=options.dir,
        state_bytes=options.state_bytes,
        rounds=1,
        overlap=options.overlap,
        ranks=Ranks(),
    )
    state = sharded_state(options.state_bytes, (bench.ranks.size,), range(bench.ranks.size))
    bench.ranks.together(state.fill)
    for system in first_saves(bench, state, bench.digests_of(state), options.systems).values():
        bench.close(system)
    if bench.ranks.rank == 0:
        medians = bench.samples.medians()
        text = json.dumps({f"{metric}/{name}": seconds for (metric, name), seconds in medians.items()})
        options.json.write_text(text)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    # A process that a peer spawned: it would report every request.
    logging.disable(logging.INFO)
