"""What `reuse` saves and costs: states of which 1 %, all or nothing changes between saves.

    torchrun --standalone --nproc_per_node 4 benchmarks/reuse.py --size-mib 512

Every number is the median over rounds of the slowest rank; in each round every case has its turn, from a
common barrier. At the end each run is loaded and compared bit for bit.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

# torchrun runs this file as a script: sys.path then starts with benchmarks/, not with the directory above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dcp_ckpt import CheckpointConfig, Checkpointer, LatestN

__all__ = ["main"]

NUM_TENSORS = 100
COLUMNS = 1024
CASES = {
    "off, 1 % changed": (False, 1),
    "reuse, 1 % changed": (True, 1),
    "off, all changed": (False, NUM_TENSORS),
    "reuse, all changed": (True, NUM_TENSORS),
    "reuse, nothing changed": (True, 0),
}


class Case:
    """One run of one setting, with a state of its own rank by rank.

    Args:
        num_changed: tensors that change before each save, other ones each time.
    """

    def __init__(self, path: Path, *, reuse: bool, num_changed: int, size_bytes: int) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        rows = size_bytes // (NUM_TENSORS * COLUMNS * 4 * dist.get_world_size())
        self._locals = [torch.randn(rows, COLUMNS) for _ in range(NUM_TENSORS)]
        self._state = {
            f"weight_{number:03}": DTensor.from_local(local, mesh, [Shard(0)])
            for number, local in enumerate(self._locals)
        }
        config = CheckpointConfig(reuse=reuse, keep=LatestN(1), grace_seconds=0.0, dcp_metadata="never")
        self._num_changed = num_changed
        self._checkpointer = Checkpointer(path, config=config)
        self._step = 0

    def save(self) -> tuple[float, float, int]:
        """Change, and save: stall and time until durable of this rank in seconds, bytes written by all."""
        for number in range(self._num_changed):
            self._locals[(self._step * self._num_changed + number) % NUM_TENSORS].neg_()
        self._step += 1
        dist.barrier()
        info = self._checkpointer.save(self._state, step=self._step).result()
        return info.stall_seconds, info.durable_seconds, info.bytes - info.shared_bytes

    def close(self) -> None:
        """Load what was saved last, and compare."""
        expected = [local.clone() for local in self._locals]
        for local in self._locals:
            local.fill_(float("nan"))
        self._checkpointer.load(self._state)
        self._checkpointer.close()
        assert all(map(torch.equal, self._locals, expected)), "a load gave other bytes than were saved"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size-mib", type=int, default=512, help="of the state, over all ranks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", help="where to write; by default below the working directory")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    place: list[str | None] = [None]
    if dist.get_rank() == 0:
        place = [tempfile.mkdtemp(prefix="reuse-", dir=options.directory or ".")]
    dist.broadcast_object_list(place)
    root = Path(str(place[0]))
    try:
        measure(root, size_bytes=options.size_mib << 20, rounds=options.rounds)
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(root, ignore_errors=True)
        dist.destroy_process_group()


def measure(root: Path, *, size_bytes: int, rounds: int) -> None:
    """All cases, round by round; rank 0 prints the medians."""
    cases = {
        name: Case(root / str(number), reuse=reuse, num_changed=num_changed, size_bytes=size_bytes)
        for number, (name, (reuse, num_changed)) in enumerate(CASES.items())
    }
    samples: dict[str, list[tuple[float, float, int]]] = {name: [] for name in cases}
    for number in range(rounds + 2):
        for name, case in cases.items():
            stall, durable, num_bytes = case.save()
            gathered: list[tuple[float, float]] = [(0.0, 0.0)] * dist.get_world_size()
            dist.all_gather_object(gathered, (stall, durable))
            # The first save has no base, and warms up.
            if number >= 2:
                samples[name].append((max(s for s, _ in gathered), max(d for _, d in gathered), num_bytes))
    for case in cases.values():
        case.close()
    if dist.get_rank() == 0:
        for name, values in samples.items():
            stall, durable, written = map(statistics.median, zip(*values, strict=True))
            print(
                f"{name:24} stall {stall:7.4f} s   durable {durable:7.3f} s   "
                f"written {written / 2**20:7.1f} MiB"
            )


if __name__ == "__main__":
    main()
