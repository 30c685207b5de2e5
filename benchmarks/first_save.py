"""The first save of a fresh training job, which pays for processes, imports and fresh memory.

A program of its own, which `measure_first_saves` runs: every sample is a new torchrun, so that nothing is
warm but the files of Python itself.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

# torchrun runs this file as a script: sys.path then starts with benchmarks/, not with the directory above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from benchmarks.measure import Ranks, SectionFailed, slowest
from benchmarks.peers import DEADLINE_SECONDS, System, make_system
from benchmarks.ratios import OURS
from benchmarks.rounds import Bench, say
from benchmarks.workload import sharded_state

__all__ = ["main", "measure_first_saves"]

_SHOWN_CHARACTERS = 600
_LAUNCHER_VARIABLES = ("GROUP_", "LOCAL_", "MASTER_", "RANK", "ROLE_", "TORCHELASTIC_", "WORLD_SIZE")
"""Beginnings of the variables that torchrun sets for its ranks, which a torchrun inside must not see."""


def measure_first_saves(bench: Bench, names: list[str], num_rounds: int) -> None:
    """`num_rounds` fresh jobs for each system. Called on all ranks, of which only rank 0 has work."""
    for number in range(num_rounds):
        bench.samples.counting = True
        if bench.ranks.rank == 0:
            say(f"first save: round {number + 1} of {num_rounds}")
        for name in names[number % len(names) :] + names[: number % len(names)]:
            _measure(bench, name)


def _measure(bench: Bench, name: str) -> None:
    metrics = ("first_save", "first_save_blocked")
    if name not in bench.missing:
        try:
            parts = slowest(
                bench.ranks.together(lambda: _job(bench, name) if bench.ranks.rank == 0 else None)
            )
        except SectionFailed as error:
            if name == OURS:
                raise
            bench.drop(name, str(error))
        else:
            bench.samples.add("first_save", name, parts["durable"])
            bench.samples.add("first_save_blocked", name, parts["blocked"])
            return
    for metric in metrics:
        bench.samples.fail(metric, name, bench.missing[name])


def _job(bench: Bench, name: str) -> dict[str, float]:
    """Run this file under a torchrun of its own; its result."""
    directory = bench.directory / "first-save"
    directory.mkdir()
    result = directory / "result.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", str(bench.ranks.size), str(Path(__file__).resolve())),
        *("--system", name, "--state-bytes", str(bench.state_bytes), "--overlap", bench.overlap),
        *("--dir", str(directory), "--json", str(result)),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER_VARIABLES)}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=DEADLINE_SECONDS)
        except BaseException:
            os.killpg(
                process.pid, signal.SIGTERM
            )  # torchrun ends its ranks, which have sessions of their own
            raise
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: ...{output[-_SHOWN_CHARACTERS:]}")
    parts: dict[str, float] = json.loads(result.read_text())
    bench.remove(directory)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--system", required=True)
    parser.add_argument("--state-bytes", required=True, type=int)
    parser.add_argument("--overlap", choices=("step", "off"), required=True)
    parser.add_argument("--dir", required=True, type=Path)
    parser.add_argument("--json", required=True, type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=DEADLINE_SECONDS))
    ranks = Ranks()
    bench = Bench(
        directory=options.dir, state_bytes=options.state_bytes, rounds=1, overlap=options.overlap, ranks=ranks
    )
    state = sharded_state(options.state_bytes, (ranks.size,), range(ranks.size))
    state.fill()
    expected = bench.digests_of(state)
    group = bench.new_group()
    made: list[System] = []

    def save() -> dict[str, float]:
        start = time.perf_counter()
        system = make_system(options.system, options.dir / "saves", options.overlap, lambda: group)
        made.append(system)
        system.begin(state)
        system.fence()
        blocked = time.perf_counter() - start
        system.finish()
        return {"blocked": blocked, "durable": time.perf_counter() - start}

    parts = slowest(ranks.together(save))
    bench.checked_load(lambda: made[0].load(state), state, expected, options.system)
    made[0].close()
    if ranks.rank == 0:
        options.json.write_text(json.dumps(parts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    # A process that a peer spawned: it would report every request.
    logging.disable(logging.INFO)
