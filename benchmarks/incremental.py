"""A save of a state of which 1 % has changed, with `reuse`, over a full save of the same state.

    torchrun --nproc_per_node 8 benchmarks/incremental.py --size-gib 1 --json out.json

100 sharded tensors; between two saves one of them, all or none change, another one each time. The cases take
turns, and each waits until what the one before replaced has been removed. After each save it is loaded and
compared.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.measure import WrongBytes, slowest
from benchmarks.ranked import bench_of, parse_options, report
from benchmarks.ratios import FULL, INCREMENTAL_TARGETS, OURS
from benchmarks.rounds import Bench
from dcp_ckpt import CheckpointConfig, Checkpointer, LatestN, load_checkpoint

NUM_TENSORS = 100
COLUMNS = 1024
REMOVAL_SECONDS = 60.0


class Case:
    """One run with one setting, and a state of its own.

    Args:
        metric: the end of the names of what is measured.
        num_changed: tensors that change before each save, other ones each time.
    """

    def __init__(self, path: Path, metric: str, *, rows: int, reuse: bool, num_changed: int) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.metric = metric
        self.system = OURS if reuse else FULL
        self._path = path
        self._locals = [torch.randn(rows, COLUMNS) for _ in range(NUM_TENSORS)]
        self._state = {
            f"weight_{number:03}": DTensor.from_local(local, mesh, [Shard(0)])
            for number, local in enumerate(self._locals)
        }
        config = CheckpointConfig(reuse=reuse, keep=LatestN(1), grace_seconds=0.0, dcp_metadata="never")
        self._num_changed = num_changed
        self._checkpointer = Checkpointer(path, config=config)
        self._step = 0

    def save(self) -> dict[str, float]:
        """Change, and save: seconds until durable on this rank, and bytes that all ranks wrote."""
        for number in range(self._num_changed):
            self._locals[(self._step * self._num_changed + number) % NUM_TENSORS].neg_()
        self._step += 1
        dist.barrier()
        info = self._checkpointer.save(self._state, step=self._step).result()
        return {
            "stall": info.stall_seconds,
            "durable": info.durable_seconds,
            "written": float(info.bytes - info.shared_bytes),
        }

    def wait_for_removal(self) -> None:
        """Removing a large file keeps the file system busy: the next case must not pay for it."""
        deadline = time.monotonic() + REMOVAL_SECONDS
        while len(list(self._path.glob("step-*"))) > 1 or any(self._path.glob("trash/*")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._path}: the older checkpoint is still there")
            time.sleep(0.01)

    def check(self) -> None:
        """Load what was saved last, and compare."""
        expected = [local.clone() for local in self._locals]
        for local in self._locals:
            local.fill_(float("nan"))
        # By path: a run keeps what it has resumed from.
        load_checkpoint(self._path / f"step-{self._step:08}", self._state)
        if not all(map(torch.equal, self._locals, expected)):
            raise WrongBytes(f"{self._path.name}: a load gave other bytes than were saved")

    def close(self) -> None:
        self._checkpointer.close()


def main() -> None:
    options = parse_options(__doc__.splitlines()[0])
    with bench_of(options, "incremental") as bench:
        measure(bench)
        report(bench, options, {"num_tensors": NUM_TENSORS}, INCREMENTAL_TARGETS)


def measure(bench: Bench) -> None:
    """All cases, round by round; the first save of each has no base, and warms up."""
    rows = bench.state_bytes // (NUM_TENSORS * COLUMNS * 4 * bench.ranks.size)
    torch.manual_seed(bench.ranks.rank)
    with ExitStack() as resources:
        cases = [
            Case(bench.directory / name, metric, rows=rows, reuse=reuse, num_changed=num_changed)
            for name, metric, num_changed, reuse in (
                ("full", "changed_1", 1, False),
                ("reuse-1", "changed_1", 1, True),
                ("reuse-all", "changed_all", NUM_TENSORS, True),
                ("reuse-none", "changed_none", 0, True),
            )
        ]
        for case in cases:
            resources.callback(case.close)
        for _ in bench.each_round("saves"):
            for case in cases:
                parts = slowest(bench.ranks.together(case.save))
                bench.on_first_rank(case.wait_for_removal)
                for name, value in parts.items():
                    bench.samples.add(f"{name}_{case.metric}", case.system, value)
                bench.ranks.together(case.check)


if __name__ == "__main__":
    main()
