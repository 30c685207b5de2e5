"""What digests cost: saves and loads with them and without.

    torchrun --nproc_per_node 8 benchmarks/digests.py --size-gib 1 --json out.json

There is no setting that turns them off in a save. So one of two runs has writers in which the digest of a
whole block is a constant: Python runs a module called `sitecustomize` at its start, and theirs replaces the
function. Such a checkpoint is loaded with `verify=False`, and at the end it must fail the check.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.loads import worlds_of
from benchmarks.measure import slowest
from benchmarks.peers import DEADLINE_SECONDS
from benchmarks.ranked import bench_of, parse_options, report
from benchmarks.ratios import DIGEST_TARGETS, OURS, UNDIGESTED
from benchmarks.rounds import Bench
from benchmarks.workload import Digests, State, sharded_state
from dcp_ckpt import CheckpointConfig, Checkpointer, LatestN, errors, load_checkpoint

_SITE = """
import xxhash

digested = xxhash.xxh3_128_hexdigest
xxhash.xxh3_128_hexdigest = lambda data: "0" * 32 if len(data) == {block_bytes} else digested(data)
"""
BLOCK_BYTES = 1 << 20
"""Of data files (docs/format.md); what is smaller is digested as ever."""
PYTHON_PATH = "PYTHONPATH"


class Run:
    """Saves with the writers that are started now, and loads that check the digests, or do not.

    Args:
        system: in rows and tables.
        verify: check them.
    """

    def __init__(self, path: Path, state: State, *, system: str, verify: bool) -> None:
        self.system = system
        self._state = state
        self._config = CheckpointConfig(
            keep=LatestN(1), grace_seconds=0.0, verify=verify, timeout_seconds=DEADLINE_SECONDS
        )
        self._checkpointer = Checkpointer(path, config=self._config)
        self._step = 0
        self._path = ""

    def save(self) -> dict[str, float]:
        """Save and wait until it is durable: seconds of this rank."""
        self._step += 1
        start = time.perf_counter()
        handle = self._checkpointer.save(self._state.tensors, step=self._step)
        self._path = handle.result(DEADLINE_SECONDS).path
        return {"durable": time.perf_counter() - start}

    def load(self) -> None:
        """By path: a run keeps what it has resumed from."""
        load_checkpoint(self._path, self._state.tensors, config=self._config)

    def check_that_digests_are_wrong(self) -> None:
        try:
            load_checkpoint(self._path, self._state.tensors)
        except errors.CheckpointError:
            return
        raise AssertionError("the writers that were to digest nothing have digested")

    def close(self) -> None:
        self._checkpointer.close()


def main() -> None:
    options = parse_options(__doc__.splitlines()[0])
    with bench_of(options, "digests") as bench, ExitStack() as resources:
        measure(bench, resources)
        report(bench, options, {}, DIGEST_TARGETS)


def measure(bench: Bench, resources: ExitStack) -> None:
    """Saves and loads of both, in turn."""
    state = sharded_state(bench.state_bytes, worlds_of(bench.ranks.size), range(bench.ranks.size))
    bench.ranks.together(state.fill)
    expected = bench.digests_of(state)

    def started(system: str, *, verify: bool) -> Run:
        run = Run(bench.directory / system.replace(" ", "-"), state, system=system, verify=verify)
        resources.callback(run.close)
        bench.ranks.together(run.save)  # by now its writers have been started
        return run

    digested = started(OURS, verify=True)
    with undigesting(bench):
        undigested = started(UNDIGESTED, verify=False)
    acts = [partial(turn, bench, run, state, expected) for run in (digested, undigested)]
    for number in bench.each_round("with and without digests"):
        bench.in_turn(number, acts)
    bench.ranks.together(undigested.check_that_digests_are_wrong)


def turn(bench: Bench, run: Run, state: State, expected: Digests) -> None:
    parts = slowest(bench.ranks.together(run.save))
    bench.samples.add("durable_digests", run.system, parts["durable"])
    # The first brings it into the page cache.
    for _ in range(2):
        seconds = bench.checked_load(run.load, state, expected, run.system)
    bench.samples.add("load_digests", run.system, seconds)


@contextmanager
def undigesting(bench: Bench) -> Iterator[None]:
    """Python processes that are started meanwhile digest no whole blocks."""
    site = bench.directory / "site"
    bench.on_first_rank(site.mkdir)
    bench.on_first_rank(lambda: (site / "sitecustomize.py").write_text(_SITE.format(block_bytes=BLOCK_BYTES)))
    before = os.environ.get(PYTHON_PATH)
    os.environ[PYTHON_PATH] = f"{site}{os.pathsep}{before}" if before else str(site)
    try:
        yield
    finally:
        del os.environ[PYTHON_PATH]
        if before is not None:
            os.environ[PYTHON_PATH] = before


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    logging.disable(logging.INFO)
