"""Loads on the same and on other numbers of ranks, and the replicated state of DDP.

Called by the entry point after the saves. Every file that is read here was read before in the warm-up round,
so it is in the page cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist

from benchmarks.machine import Limits, bytes_read
from benchmarks.measure import slowest, total
from benchmarks.peers import Ours, StockSave, System, load_ours, load_stock
from benchmarks.ratios import MACHINE, OURS, STOCK_LOAD
from benchmarks.rounds import Bench
from benchmarks.saves import calibrated_step, train_through_save
from benchmarks.workload import Digests, State, TrainingStep, replicated_state, sharded_state

__all__ = ["measure_loads", "measure_replicated", "worlds_of"]


def worlds_of(num_ranks: int) -> tuple[int, int, int]:
    """All ranks, half of them, three quarters of them: 8, 4 and 6."""
    return num_ranks, max(1, num_ranks // 2), max(1, num_ranks * 3 // 4)


def measure_loads(
    bench: Bench, state: State, expected: Digests, *, ours: Ours, stock: StockSave, others: list[System]
) -> None:
    """Loads of one sharded checkpoint of each system."""
    everyone, half, three_quarters = worlds_of(bench.ranks.size)
    systems: list[tuple[System, str]] = [
        (ours, OURS),
        (stock, STOCK_LOAD),
        *((other, other.name) for other in others),
    ]
    for system, _ in systems:
        bench.attempt(system.name, (), state, partial(_save, bench, system, state))
    small, small_group = _layout(bench, half)
    middle, middle_group = _layout(bench, three_quarters)
    small_paths = _save_on_half(bench, small, small_group)

    acts: list[Callable[[], None]] = []

    def same(system: System, name: str) -> None:
        seconds = bench.checked_load(lambda: system.load(state), state, expected, name)
        bench.samples.add("load_same", name, seconds)

    def resharded(metric: str, name: str, path: Path, target: State, group: dist.ProcessGroup | None) -> None:
        load: Callable[..., object] = load_ours if name == OURS else load_stock
        seconds = bench.checked_load(lambda: load(path, target, group), target, expected, name)
        bench.samples.add(metric, name, seconds)

    for system, name in systems:
        acts.append(partial(bench.attempt, name, ("load_same",), state, partial(same, system, name)))
    for name, path, small_path in (
        (OURS, ours.path, small_paths[0]),
        (STOCK_LOAD, stock.path, small_paths[1]),
    ):
        for metric, source, target, group in (
            ("load_8_4", path, small, small_group),
            ("load_8_6", path, middle, middle_group),
            ("load_4_8", small_path, state, None),
        ):
            act = partial(resharded, metric, name, source, target, group)
            acts.append(partial(bench.attempt, name, (metric,), state, act))
    for number in bench.each_round(f"loads on {everyone}, {half} and {three_quarters} ranks"):
        bench.in_turn(number, acts)


def _save(bench: Bench, system: System, state: State) -> None:
    def save() -> None:
        system.begin(state)
        system.fence()
        system.finish()

    bench.ranks.together(save)


def _layout(bench: Bench, num_ranks: int) -> tuple[State, dist.ProcessGroup]:
    """The state on the first ranks only, not filled, and their group."""
    ranks = range(num_ranks)
    state = sharded_state(bench.state_bytes, worlds_of(bench.ranks.size), ranks)
    return state, bench.new_group(ranks)


def _save_on_half(bench: Bench, small: State, group: dist.ProcessGroup) -> tuple[Path, Path]:
    """One checkpoint of each system, saved by half of the ranks."""
    bench.ranks.together(small.fill)
    paths: list[Path] = []

    def save() -> None:
        ours = Ours(bench.directory / "half-ours", "off", group)
        stock = StockSave(bench.directory / "half-stock", group)
        for system in (ours, stock):
            system.begin(small)
            system.finish()
            system.close()
        paths.extend((ours.path, stock.path))

    bench.ranks.together(lambda: save() if small.tensors else None)
    # Ranks outside of the group must know where to read.
    sent: list[list[Path]] = [paths]
    dist.broadcast_object_list(sent, src=0)
    return sent[0][0], sent[0][1]


def measure_replicated(bench: Bench, systems: list[System]) -> None:
    """Stall, load time and bytes read of a state that all ranks hold, as in DDP."""
    state = replicated_state(bench.state_bytes // 4)
    bench.ranks.together(state.fill)
    expected = bench.digests_of(state)
    with Limits(bench.directory, state, rank=bench.ranks.rank) as limits:
        step = calibrated_step(bench, limits, state)
    metrics = ("stall_replicated", "ddp_load_time", "ddp_bytes_read")
    acts = [
        partial(
            bench.attempt,
            system.name,
            metrics,
            state,
            partial(_replicated, bench, system, state, expected, step),
        )
        for system in systems
    ]
    for number in bench.each_round("replicated state"):
        bench.samples.add("step_replicated", MACHINE, bench.ranks.seconds(step.run))
        bench.in_turn(number, acts)


def _replicated(bench: Bench, system: System, state: State, expected: Digests, step: TrainingStep) -> None:
    name = OURS if system.name == OURS else STOCK_LOAD
    parts = slowest(bench.ranks.together(lambda: train_through_save(system, state, step)))
    bench.samples.add("stall_replicated", system.name, parts["stall"])
    before = after = 0

    def load() -> None:
        nonlocal before, after
        before = bytes_read()
        system.load(state)
        after = bytes_read()

    # The first brings the file into the page cache.
    bench.checked_load(load, state, expected, name)
    seconds = bench.checked_load(load, state, expected, name)
    bench.samples.add("ddp_load_time", name, seconds)
    counted = total(bench.ranks.together(lambda: {"bytes": float(after - before)}))["bytes"]
    bench.samples.add("ddp_bytes_read", name, counted)
    if isinstance(system, Ours) and system.report is not None:
        own = float(system.report.bytes_read)
        reported = total(bench.ranks.together(lambda: {"bytes": own}))["bytes"]
        bench.samples.add("ddp_bytes_reported", OURS, reported)
    bench.on_first_rank(system.discard)
