"""What each rank of `memory.py` does: one system, trained through saves, loaded, and weighed all the time.

Started by `memory.py` under torchrun, once for each system; never by hand. The first rank tells it where a
phase begins and ends.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

# torchrun runs this file as a script: sys.path then starts with benchmarks/, not with the directory above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from benchmarks.jobs import Control
from benchmarks.machine import staging_bytes, writer_pids
from benchmarks.measure import Ranks, total
from benchmarks.peers import Ours, System
from benchmarks.ratios import WITHOUT
from benchmarks.rounds import Bench
from benchmarks.workload import State, TrainingStep, replicated_state, sharded_state

__all__ = ["main"]

CONTROL_SECONDS = 400.0
STEPS = 5
SAVES = LOADS = 3


class Phases:
    """Tells the parent which phase its samples belong to."""

    def __init__(self, bench: Bench, control: Control | None) -> None:
        self._bench = bench
        self._control = control

    def weigh(self, name: str, act: Callable[[], object]) -> None:
        """Run `act` on all ranks, sampled."""
        found: list[tuple[int, list[int]]] = [(0, [])] * self._bench.ranks.size
        dist.all_gather_object(found, (os.getpid(), writer_pids()))
        self.tell("begin", [pid for pid, _ in found], [pid for _, pids in found for pid in pids])
        act()
        self.tell("end", name)

    def tell(self, name: str, *arguments: object) -> None:
        """Have the first rank tell the parent; the others wait."""

        def ask() -> None:
            assert self._control is not None, "the first rank has it"
            self._control.ask(name, *arguments)

        self._bench.on_first_rank(ask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--system", required=True)
    parser.add_argument("--kind", choices=("sharded", "replicated"), required=True)
    parser.add_argument("--url", help="where this project saves; the peers save into files")
    parser.add_argument("--state-bytes", required=True, type=int)
    parser.add_argument("--dir", required=True, type=Path)
    parser.add_argument("--control", required=True)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=CONTROL_SECONDS))
    bench = Bench(
        directory=options.dir,
        state_bytes=options.state_bytes,
        rounds=1,
        overlap="step",
        ranks=Ranks(),
    )
    control = Control(options.control) if bench.ranks.rank == 0 else None
    if options.kind == "sharded":
        state = sharded_state(options.state_bytes, (bench.ranks.size,), range(bench.ranks.size))
    else:
        state = replicated_state(options.state_bytes)

    def start() -> System | None:
        if options.system == WITHOUT:
            return None
        return Ours(options.url, "step") if options.url else bench.make(options.system)

    measure(bench, Phases(bench, control), state, start)
    if control is not None:
        control.close()
    dist.barrier()
    dist.destroy_process_group()


def measure(bench: Bench, phases: Phases, state: State, start: Callable[[], System | None]) -> None:
    """All phases of one system; without one, of training alone."""
    bench.ranks.together(state.fill)
    expected = bench.digests_of(state)
    step = TrainingStep(state)

    def train() -> None:
        for _ in range(STEPS):
            step.run()
            state.update()
            state.update()

    together = bench.ranks.together
    together(train)
    phases.weigh("training", partial(together, train))
    system = start()
    if bench.missing:
        phases.tell("failed", "; ".join(bench.missing.values()))
        return

    def save() -> None:
        if system is None:
            train()
            return
        system.begin(state)
        step.run()
        system.fence()
        state.update()
        system.finish()
        state.update()

    def load() -> None:
        if system is not None:
            system.load(state)

    try:
        phases.weigh("idle", partial(together, train))
        phases.weigh("saving", partial(repeat, SAVES, partial(together, save)))
        phases.weigh("kept", partial(together, train))
        _report_sizes(bench, phases, state)
        together(state.scramble)
        # The level before a load is that of a state at rest, not of one that is trained.
        phases.weigh("resting", partial(together, state.scramble))
        phases.weigh("loading", partial(repeat, LOADS, partial(together, load)))
        if system is not None:
            together(partial(state.check, expected, system.name))
    finally:
        if system is not None:
            bench.close(system)


def repeat(times: int, act: Callable[[], object]) -> None:
    for _ in range(times):
        act()


def _report_sizes(bench: Bench, phases: Phases, state: State) -> None:
    own = {"arena_bytes": staging_bytes(), "writers": len(writer_pids()), "state_bytes": state.local_bytes}
    phases.tell("sizes", total(bench.ranks.together(lambda: own)))


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    # A process that a peer spawned: it would report every request.
    logging.disable(logging.INFO)
