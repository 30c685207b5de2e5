"""What each rank of `s3.py` does: saves and loads on a store, in turn with the stock writer and reader.

Started by `s3.py` under torchrun; never by hand. The first rank tells it which phase the store's requests and
the writers' memory belong to.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

# torchrun runs this file as a script: sys.path then starts with benchmarks/, not with the directory above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.jobs import Control
from benchmarks.machine import describe, writer_pids
from benchmarks.measure import Ranks, slowest
from benchmarks.peers import Ours, System
from benchmarks.ratios import FSSPEC_LOAD, FSSPEC_SAVE, OURS, S3_TARGETS
from benchmarks.report import make_rows, print_table, result
from benchmarks.rounds import Bench
from benchmarks.workload import Digests, State, sharded_state

__all__ = ["main"]

CONTROL_SECONDS = 400.0
MEMORY_SAVES = 3
_NOT_DURABLE = "tuned: no os.sync() of the client's machine, which makes nothing durable on a store"
_LOOKUPS = ("LIST", "HEAD", "COPY", "LIST_UPLOADS", "LIST_PARTS", "UPLOAD_PART_COPY", "HEAD_BUCKET")

Counts = Mapping[str, float]
"""Kind of request -> how many; `bytes` -> those of the ranges that were read."""


class FsspecStock:
    """`dcp.save` and `dcp.load` with `FsspecWriter` and `FsspecReader`, each save in a place of its own."""

    note = _NOT_DURABLE

    def __init__(self, url: str, group: dist.ProcessGroup) -> None:
        self.name = FSSPEC_SAVE
        self._url = url
        self._group = group
        self._number = 0

    @property
    def _place(self) -> str:
        return f"{self._url}/{self._number}"

    def begin(self, state: State) -> None:
        self._number += 1
        writer = FsspecWriter(self._place, sync_files=False)
        dcp_save(state.tensors, storage_writer=writer, process_group=self._group)

    def fence(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def load(self, state: State) -> None:
        dcp_load(state.tensors, storage_reader=FsspecReader(self._place), process_group=self._group)

    def discard(self) -> None:
        """Stays, as ours does: nothing is removed while requests are counted."""

    def close(self) -> None:
        pass


class Store:
    """What the store was asked since the last call, for all ranks. `ask` is None on all but the first."""

    def __init__(self, bench: Bench, control: Control | None) -> None:
        self._bench = bench
        self._control = control

    def forget(self) -> None:
        self._bench.on_first_rank(lambda: self._ask("forget"))

    def counts(self) -> Counts:
        """When nothing more is asked; on the first rank, else nothing."""
        found: dict[str, float] = {}
        self._bench.on_first_rank(lambda: found.update(self._ask("counts")))
        return found

    def weigh(self, pids: list[int], act: Callable[[], object]) -> float:
        """The greatest unshared PSS of the processes during `act`, in bytes; 0 on other ranks."""
        weight = 0.0
        self._bench.on_first_rank(lambda: self._ask("weigh", pids))
        act()

        def end() -> None:
            nonlocal weight
            weight = self._ask("weighed")

        self._bench.on_first_rank(end)
        return weight

    def _ask(self, name: str, *arguments: object) -> Any:
        assert self._control is not None, "only the first rank asks"
        return self._control.ask(name, *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--state-bytes", required=True, type=int)
    parser.add_argument("--rounds", required=True, type=int)
    parser.add_argument("--dir", required=True, type=Path)
    parser.add_argument("--control", required=True)
    parser.add_argument("--settings", required=True, help="JSON: what the results say besides")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=CONTROL_SECONDS))
    bench = Bench(
        directory=options.dir,
        state_bytes=options.state_bytes,
        rounds=options.rounds,
        overlap="off",
        ranks=Ranks(),
    )
    control = Control(options.control) if bench.ranks.rank == 0 else None
    measure(bench, Store(bench, control), options.url)
    if control is not None:
        report(bench, json.loads(options.settings), options.json)
        control.close()
    dist.barrier()
    dist.destroy_process_group()


def measure(bench: Bench, store: Store, url: str) -> None:
    """All rounds, then the memory of our writers."""
    state = sharded_state(bench.state_bytes, (bench.ranks.size,), range(bench.ranks.size))
    bench.ranks.together(state.fill)
    expected = bench.digests_of(state)
    ours = Ours(f"{url}/ours", "off", num_kept=1000)
    stock = FsspecStock(f"{url}/stock", bench.new_group())
    bench.notes[FSSPEC_SAVE] = stock.note
    acts = [
        partial(
            bench.attempt, name, ("s3_save",), state, partial(_round, bench, store, system, state, expected)
        )
        for name, system in ((OURS, ours), (FSSPEC_SAVE, stock))
    ]
    try:
        for number in bench.each_round("S3"):
            bench.in_turn(number, acts)
        for _ in bench.each_round("S3, memory of the writers", warm=True):
            _weigh_writers(bench, store, ours, state)
    finally:
        ours.close()


def _round(bench: Bench, store: Store, system: System, state: State, expected: Digests) -> None:
    """One save and one load of what it saved, timed, counted and compared."""

    def save() -> dict[str, float]:
        start = time.perf_counter()
        system.begin(state)
        system.fence()
        system.finish()
        return {"durable": time.perf_counter() - start}

    store.forget()
    parts = slowest(bench.ranks.together(save))
    bench.samples.add("s3_save", system.name, parts["durable"])
    _count_save(bench, system.name, store.counts())
    loader = OURS if system.name == OURS else FSSPEC_LOAD
    seconds = bench.checked_load(lambda: system.load(state), state, expected, loader)
    bench.samples.add("s3_load", loader, seconds)
    _count_load(bench, loader, store.counts())


def _count_save(bench: Bench, system: str, counts: Counts) -> None:
    if not counts:
        return
    requests = sum(counts.values()) - counts["bytes"]
    objects = counts.get("PUT", 0) + counts.get("COMPLETE_UPLOAD", 0) + counts.get("COPY", 0)
    beyond = requests - counts.get("UPLOAD_PART", 0)
    bench.samples.add("s3_save_total_requests", system, requests)
    bench.samples.add("s3_save_requests", system, beyond / objects)
    bench.samples.add("s3_save_lookups", system, sum(counts.get(kind, 0) for kind in _LOOKUPS))


def _count_load(bench: Bench, system: str, counts: Counts) -> None:
    if not counts:
        return
    bench.samples.add("s3_load_requests", system, sum(counts.values()) - counts["bytes"])
    bench.samples.add("s3_load_lookups", system, sum(counts.get(kind, 0) for kind in _LOOKUPS))
    bench.samples.add("s3_load_bytes", system, counts["bytes"] / bench.state_bytes)


def _weigh_writers(bench: Bench, store: Store, ours: Ours, state: State) -> None:
    """The heaviest moment of a save, for each writer; not timed."""
    pids: list[list[int]] = [[]] * bench.ranks.size
    dist.all_gather_object(pids, writer_pids())
    flat = [pid for own in pids for pid in own]

    def save() -> None:
        ours.begin(state)
        ours.finish()

    for _ in range(MEMORY_SAVES):
        weight = store.weigh(flat, lambda: bench.ranks.together(save))
        if bench.ranks.rank == 0:
            bench.samples.add("s3_writer_memory", OURS, weight / len(flat) / (1 << 20))


def report(bench: Bench, settings: Mapping[str, object], path: Path | None) -> None:
    """Print the tables and write the JSON; on rank 0."""
    rows = make_rows(bench.samples, bench.notes)
    machine = {
        **describe(bench.directory, bench.samples.medians(), bench.state_bytes),
        "world_size": bench.ranks.size,
        "state_bytes": bench.state_bytes,
        "rounds": bench.rounds,
        "left_out": bench.missing,
        **settings,
    }
    print_table(rows, bench.samples, bench.notes, S3_TARGETS)
    if path is not None:
        text = json.dumps(result(machine, rows, bench.samples, S3_TARGETS), indent=2)
        path.write_text(text + "\n")


if __name__ == "__main__":
    main()
