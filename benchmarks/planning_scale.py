"""How planning and metadata grow with the ranks: 1024, 4096 and 16,384 of them, simulated in one process.

    python benchmarks/planning_scale.py --json out.json

500 tensors, sharded over all ranks. Of this project: all that one rank does for a steady save, and all that
rank 0 does beyond that, in the code that a training runs; then what a rank of the same and of a smaller world
reads to find its bytes, which are compared. Of stock DCP: the same parts with its plan cache, measured as far
as is practical; from there on it grows with the ranks. NOTES.md says how each number is defined.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Run as a script: sys.path then starts with benchmarks/, not with the directory above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.measure import Samples, WrongBytes
from benchmarks.ratios import METADATA, OURS
from benchmarks.scale_report import Options, parse_options, report, timed_result
from benchmarks.stock_planning import stock_saves
from dcp_ckpt.testing import simulated_ranks

__all__ = ["main"]

NUM_TENSORS = 500
SIZES = {"1k": 1024, "4k": 4096, "16k": 16384}
STOCK_RANKS, QUICK_STOCK_RANKS = 512, 64
LARGEST = "16k"
FIRST_CALL = 2
"""Save 1 is the coordinator's own, of nothing."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(__doc__.splitlines()[0], arguments=arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    samples = Samples()
    for size in SIZES:
        measure_saves(samples, options, size)
    stock_ranks = QUICK_STOCK_RANKS if options.quick else STOCK_RANKS
    measure_stock(samples, options, stock_ranks)
    note = f"measured on {stock_ranks} simulated ranks, and linear from there on"
    far = [key for key in samples.values if key[1] == METADATA]
    report(
        samples,
        options,
        notes=dict.fromkeys(far, note),
        settings={"num_tensors": NUM_TENSORS, "stock_ranks": stock_ranks},
    )


def measure_saves(samples: Samples, options: Options, size: str) -> None:
    """Steady saves of a world of this project, and loads of the last one where the world is the largest."""
    world_size = SIZES[size]
    world = simulated_ranks.SimulatedWorld(world_size=world_size, num_tensors=NUM_TENSORS)
    # The first of them warms up. The whole world does not save: these ranks do, and two more for the loads.
    calls = range(FIRST_CALL, FIRST_CALL + options.rounds + 1)
    middle = world_size // 2
    first, middle_first = save_on(world, 0, calls), save_on(world, middle, calls)
    last, second = calls[-1], save_on(world, middle + 1, calls[-1:])
    with world.coordinator() as coordinator:
        coordinator.first_save(first.reports[FIRST_CALL])
        for call in calls:
            reports = {0: first.reports[call], middle: middle_first.reports[call]}
            coordinator.report(call, reports | ({middle + 1: second.reports[last]} if call == last else {}))
            seconds = coordinator.conclude(call)
            if call != FIRST_CALL:
                samples.add(f"planning_{size}", OURS, first.seconds[call] + seconds)
    if size == LARGEST:
        samples.add(f"planning_first_{size}", OURS, first.seconds[FIRST_CALL])
        for call in calls[1:]:
            samples.add(f"planning_rank_{size}", OURS, first.seconds[call])
        measure_loads(samples, options, world, last, middle_first, second)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What one rank did.

    Args:
        seconds, reports: by call.
        tensors: its parts of the state.
    """

    seconds: Mapping[int, float]
    reports: Mapping[int, Any]
    tensors: Mapping[str, torch.Tensor]


def save_on(world: simulated_ranks.SimulatedWorld, rank: int, calls: Sequence[int]) -> Saved:
    """Save on one rank, again and again; the first time it plans."""
    with world.rank(rank) as saving:
        found = {call: timed_result(partial(saving.save, call)) for call in calls}
        return Saved(
            seconds={call: seconds for call, (seconds, _) in found.items()},
            reports={call: made for call, (_, made) in found.items()},
            tensors=saving.tensors,
        )


def measure_loads(
    samples: Samples,
    options: Options,
    world: simulated_ranks.SimulatedWorld,
    call: int,
    first: Saved,
    second: Saved,
) -> None:
    """What a rank in the middle reads of it, of as many ranks and of three quarters as many."""
    middle = world.world_size // 2
    for _ in range(options.rounds):
        loads = [
            world.resume(call, [first.tensors], rank=middle, world_size=world.world_size),
            world.resume(
                call,
                [first.tensors, second.tensors],
                rank=middle // 2,  # two rows a rank: as torch.chunk splits
                world_size=world.world_size * 3 // 4,
            ),
        ]
        if not all(load.is_equal for load in loads):
            raise WrongBytes("a load gave other bytes than were saved")
        most = max(loads, key=lambda load: load.fragment_bytes)
        num_bytes = most.manifest_bytes + most.fragment_bytes
        samples.add(f"resume_bytes_{LARGEST}", OURS, num_bytes)
        samples.add(f"resume_planning_{LARGEST}", OURS, most.seconds)


def measure_stock(samples: Samples, options: Options, stock_ranks: int) -> None:
    """The same of stock DCP on fewer ranks. What rank 0 does, and `.metadata`, grow with the ranks."""
    with (
        tempfile.TemporaryDirectory(dir=options.directory) as directory,
        stock_saves(Path(directory), world_size=stock_ranks, num_tensors=NUM_TENSORS) as saves,
    ):
        for number in range(options.rounds + 1):
            samples.counting = number > 0
            rank_seconds, seconds = saves.rank_seconds(), saves.coordinator_seconds()
            for size, world_size in SIZES.items():
                scale = world_size / stock_ranks
                samples.add(f"planning_{size}", METADATA, rank_seconds + scale * seconds)
            scale = SIZES[LARGEST] / stock_ranks
            samples.add(f"planning_rank_{LARGEST}", METADATA, rank_seconds)
            samples.add(f"resume_bytes_{LARGEST}", METADATA, scale * saves.metadata_bytes)
            samples.add(f"resume_planning_{LARGEST}", METADATA, scale * saves.read_seconds())


if __name__ == "__main__":
    main()
