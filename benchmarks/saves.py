"""The sharded state: stalls, durable times, the training tax, and memory.

Called once by the entry point; the order of a round is that of the functions below.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from benchmarks.machine import Limits, staging_bytes, writer_pids, writer_pss_bytes
from benchmarks.measure import SectionFailed, slowest, timed, total
from benchmarks.peers import System
from benchmarks.ratios import (
    MACHINE,
    OURS,
    SAFETENSORS,
    SNAPSHOT,
    STOCK_LOAD,
    STOCK_SAVE,
    SUCCESSOR,
    TORCH_SAVE,
)
from benchmarks.rounds import Bench
from benchmarks.workload import Digests, State, TrainingStep

__all__ = [
    "calibrated_step",
    "measure_memory",
    "measure_saves",
    "measure_tax",
    "timed_save",
    "train_through_save",
]

MEMCPYS_PER_STEP = 2.5
"""A step lasts at least twice as long as a copy of the state; the rest is for noise."""
MAX_TAXED_STEPS = 10
LOADS_AFTER_SAVE = {
    STOCK_SAVE: STOCK_LOAD,
    **{name: name for name in (OURS, SUCCESSOR, SNAPSHOT, TORCH_SAVE, SAFETENSORS)},
}
"""Systems that are timed in it -> the system of the row."""


def calibrated_step(bench: Bench, limits: Limits, state: State) -> TrainingStep:
    """A training step of the length that the contract asks for."""
    limits.memcpy()
    memcpy_seconds = min(bench.ranks.seconds(limits.memcpy) for _ in range(3))
    step = TrainingStep(state)
    step.last_at_least(MEMCPYS_PER_STEP * memcpy_seconds, bench.ranks.seconds)
    return step


def measure_saves(
    bench: Bench,
    state: State,
    expected: Digests,
    limits: Limits,
    step: TrainingStep,
    *,
    quiet: list[System],
    training: list[System],
) -> None:
    """Machine limits, saves with nothing beside them, and saves with a training step beside them.

    Args:
        quiet: systems whose saves are timed until durable.
        training: systems whose stall is timed.
    """
    acts: list[Callable[[], None]] = [partial(_machine, bench, limits, step)]
    for system in quiet:
        act = partial(_quiet_save, bench, system, state, expected)
        acts.append(partial(bench.attempt, system.name, ("held", "durable"), state, act))
    for system in training:
        act = partial(_trained_save, bench, system, state, expected, step)
        acts.append(partial(bench.attempt, system.name, ("stall_sharded",), state, act))
    for number in bench.each_round("saves"):
        bench.in_turn(number, acts)


def _machine(bench: Bench, limits: Limits, step: TrainingStep) -> None:
    for metric, act in (
        ("memcpy", limits.memcpy),
        ("direct_write", limits.direct_write),
        ("direct_read", limits.direct_read),
        ("buffered_write", limits.buffered_write),
        ("cached_read", limits.cached_read),
        ("step", step.run),
    ):
        try:
            bench.samples.add(metric, MACHINE, bench.ranks.seconds(act))
        except SectionFailed as error:  # such as a file system without direct access
            bench.samples.fail(metric, MACHINE, str(error))


def _quiet_save(bench: Bench, system: System, state: State, expected: Digests) -> None:
    """Save and wait; then load at once, with the page cache as the save left it."""
    parts = slowest(bench.ranks.together(partial(timed_save, system, state)))
    for metric in ("held", "durable"):
        bench.samples.add(metric, system.name, parts[metric])
    seconds = bench.checked_load(lambda: system.load(state), state, expected, system.name)
    if system.name in LOADS_AFTER_SAVE:
        bench.samples.add("load_after_save", LOADS_AFTER_SAVE[system.name], seconds)
    bench.on_first_rank(system.discard)


def timed_save(system: System, state: State) -> dict[str, float]:
    """Save and wait: how long the tensors are held, and until they are durable."""
    start = time.perf_counter()
    system.begin(state)
    system.fence()
    held = time.perf_counter() - start
    system.finish()
    return {"held": held, "durable": time.perf_counter() - start}


def _trained_save(bench: Bench, system: System, state: State, expected: Digests, step: TrainingStep) -> None:
    parts = slowest(bench.ranks.together(lambda: train_through_save(system, state, step)))
    bench.samples.add("stall_sharded", system.name, parts["stall"])
    bench.checked_load(lambda: system.load(state), state, expected, system.name)
    bench.on_first_rank(system.discard)


def train_through_save(system: System, state: State, step: TrainingStep) -> dict[str, float]:
    """Save, train one step meanwhile, change the tensors as soon as that is allowed, wait for the save."""
    start = time.perf_counter()
    system.begin(state)
    called = time.perf_counter()
    step.run()
    stepped = time.perf_counter()
    system.fence()
    fenced = time.perf_counter()
    state.update()
    system.finish()
    return {"stall": called - start + fenced - stepped}


def measure_tax(
    bench: Bench, state: State, expected: Digests, step: TrainingStep, systems: list[System]
) -> int:
    """Wall time of K steps with a save at their start, minus that of K steps without, in the same round.

    Returns:
        K: enough steps that the save of every system ends within them on a machine like this one.
    """
    medians = bench.samples.medians()
    durable = max(seconds for (metric, _), seconds in medians.items() if metric == "durable")
    # Even, so that the last step leaves the contents of the first.
    num_steps = 2 * math.ceil(1.25 * durable / medians["step", MACHINE] / 2)
    num_steps = min(num_steps, MAX_TAXED_STEPS)
    group = bench.new_group()
    plain = 0.0

    def without() -> None:
        nonlocal plain
        parts = bench.ranks.together(lambda: timed(lambda: _train(None, state, step, num_steps, group)))
        plain = slowest(parts)["seconds"]

    def taxed(system: System) -> None:
        parts = bench.ranks.together(lambda: timed(lambda: _train(system, state, step, num_steps, group)))
        bench.samples.add("tax", system.name, slowest(parts)["seconds"] - plain)
        bench.ranks.together(system.finish)
        bench.checked_load(lambda: system.load(state), state, expected, system.name)
        bench.on_first_rank(system.discard)

    for number in bench.each_round(f"training tax over {num_steps} steps", warm=True):
        without()
        bench.in_turn(
            number,
            [
                partial(bench.attempt, system.name, ("tax",), state, partial(taxed, system))
                for system in systems
            ],
        )
    return num_steps


def _train(
    system: System | None, state: State, step: TrainingStep, num_steps: int, group: dist.ProcessGroup
) -> None:
    loss = torch.zeros(1)
    if system is not None:
        system.begin(state)
    for _ in range(num_steps):
        step.run()
        if system is not None:
            system.fence()
        state.update()
        dist.all_reduce(loss, group=group)


def measure_memory(bench: Bench, state: State, ours: System) -> None:
    """Staging memory over the bytes of the state, and what a writer weighs, during and after a save.

    `ours` is the only Checkpointer of the process.
    """

    def weigh() -> dict[str, float]:
        pids = writer_pids()
        return {
            "staging": staging_bytes(),
            "state": state.local_bytes,
            "writers": len(pids),
            "pss": sum(map(writer_pss_bytes, pids)),
        }

    def save_and_weigh() -> dict[str, float]:
        ours.begin(state)
        during = weigh()
        ours.finish()
        return {name: max(value, during[name]) for name, value in weigh().items()}

    for _ in bench.each_round("memory"):
        parts = total(bench.ranks.together(save_and_weigh))
        bench.samples.add("arena", OURS, parts["staging"] / parts["state"])
        bench.samples.add("writer_memory", OURS, parts["pss"] / parts["writers"] / (1 << 20))
