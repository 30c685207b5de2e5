"""Save and load latency against stock DCP, interleaved in one run.

    torchrun --nproc_per_node 8 benchmarks/save_latency.py --size-gib 1 --json out.json

Every round runs each system once, in turn, so that a machine that slows down slows all of them. Times are the
maximum over ranks; medians and median absolute deviations over rounds are reported, with the machine's own
limits (memcpy, direct write) from the same rounds. Durable means durable for both: stock DCP with its default
`sync_files=True`, this project with fsync, digests and commit. After every load the bytes are compared.
"""

from __future__ import annotations

import argparse
import json
import logging
import mmap
import os
import platform
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

# torchrun runs this file as a script: sys.path then starts with benchmarks/, not with the directory above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dcp_ckpt import CheckpointConfig, Checkpointer, LatestN

NUM_TENSORS = 48
COLUMNS = 1024
DIRECT_IO_BYTES = 8 << 20


def main() -> None:
    options = parse_options()
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.basicConfig(level=logging.WARNING)
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    directory = Path(options.dir).resolve() / "save_latency"
    if dist.get_rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    dist.barrier()
    # No clean-up of a failed run that waits for other ranks: the one that failed must end, so that torchrun
    # ends all.
    measured = Benchmark(directory, int(options.size_gib * (1 << 30)), options.rounds).run()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
        report(measured, options)
    dist.destroy_process_group()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size-gib", type=float, default=1.0, help="bytes of the whole state (default: 1)")
    parser.add_argument(
        "--rounds", type=int, default=7, help="rounds counted, after one that is not (default: 7)"
    )
    parser.add_argument("--dir", default="bench-run", help="where to write (default: ./bench-run)")
    parser.add_argument("--json", default=None, help="write the results there")
    return parser.parse_args()


class Benchmark:
    """One sharded state, saved and loaded by each system in turn."""

    def __init__(self, directory: Path, state_bytes: int, rounds: int) -> None:
        self.directory = directory
        self.rounds = rounds
        self.rank = dist.get_rank()
        self.state = sharded_state(state_bytes, seed=self.rank)
        self.local = [tensor._local_tensor for tensor in self.state.values()]
        self.local_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.local)
        self.reference = [tensor.clone() for tensor in self.local]
        self.buffers = [torch.empty_like(tensor) for tensor in self.local]
        self.samples: dict[tuple[str, str], list[float]] = {}

    def run(self) -> dict[tuple[str, str], list[float]]:
        config = CheckpointConfig(keep=LatestN(1), grace_seconds=0.0)
        with Checkpointer(self.directory / "ours", config=config) as checkpointer:
            for number in range(self.rounds + 1):
                self.round_of_saves(checkpointer, number)
            for _ in range(self.rounds + 1):
                self.round_of_loads(checkpointer)
        return {key: values[1:] for key, values in self.samples.items()}

    def round_of_saves(self, checkpointer: Checkpointer, number: int) -> None:
        self.timed("memcpy", "machine", lambda: torch._foreach_copy_(self.buffers, self.local))
        self.timed("direct_write", "machine", self.direct_write)
        stock = self.directory / f"stock-{number}"
        self.timed("durable", "dcp.save", lambda: dcp_save(self.state, checkpoint_id=stock))
        if number != self.rounds:
            self.remove(stock)
        threaded = self.directory / f"async-{number}"
        start = self.start()
        saved = dcp_async_save(self.state, checkpoint_id=threaded)
        stall = time.perf_counter() - start
        assert isinstance(saved, Future), "without a stager there is one future, of the upload"
        # No collective of ours before the upload is done: its thread runs its own on the same process group.
        saved.result()
        self.record("durable", "dcp.async_save", time.perf_counter() - start)
        self.record("stall", "dcp.async_save", stall)
        self.remove(threaded)
        start = self.start()
        handle = checkpointer.save(self.state, step=number)
        stall = time.perf_counter() - start
        handle.result()
        self.record("durable", "dcp_ckpt", time.perf_counter() - start)
        self.record("stall", "dcp_ckpt", stall)

    def round_of_loads(self, checkpointer: Checkpointer) -> None:
        stock = self.directory / f"stock-{self.rounds}"
        self.scramble()
        self.timed("load_same", "dcp.load", lambda: dcp_load(self.state, checkpoint_id=stock))
        self.check("dcp.load")
        self.scramble()
        self.timed("load_same", "dcp_ckpt", lambda: checkpointer.load(self.state))
        self.check("dcp_ckpt")

    def direct_write(self) -> None:
        """This rank's bytes to disk past the cache, from memory that is there already, and fsync."""
        source = mmap.mmap(-1, DIRECT_IO_BYTES)
        path = self.directory / f"direct-{self.rank}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        for offset in range(0, self.local_bytes, DIRECT_IO_BYTES):
            os.pwrite(descriptor, source, offset)
        os.fsync(descriptor)
        os.close(descriptor)
        path.unlink()
        source.close()

    def timed(self, metric: str, system: str, act: Callable[[], object]) -> None:
        start = self.start()
        act()
        self.record(metric, system, time.perf_counter() - start)

    def start(self) -> float:
        dist.barrier()
        return time.perf_counter()

    def record(self, metric: str, system: str, seconds: float) -> None:
        """Note the maximum over ranks."""
        longest = torch.tensor([seconds], dtype=torch.float64)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        self.samples.setdefault((metric, system), []).append(float(longest))

    def remove(self, path: Path) -> None:
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(path)
        dist.barrier()

    def scramble(self) -> None:
        for tensor in self.local:
            tensor.fill_(float("nan"))

    def check(self, system: str) -> None:
        """Bit-exact, or the numbers mean nothing."""
        for loaded, expected in zip(self.local, self.reference, strict=True):
            if not torch.equal(loaded, expected):
                raise SystemExit(f"rank {self.rank}: {system} loaded other bytes than were saved")


def sharded_state(state_bytes: int, *, seed: int) -> dict[str, DTensor]:
    """DTensors sharded on dimension 0, as FSDP2 makes them, of `state_bytes` bytes over all ranks."""
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, state_bytes // (NUM_TENSORS * COLUMNS * 4 * world_size))
    return {
        f"layers.{number}.weight": DTensor.from_local(
            torch.randn(rows, COLUMNS, generator=generator), mesh, [Shard(0)], run_check=False
        )
        for number in range(NUM_TENSORS)
    }


def report(samples: dict[tuple[str, str], list[float]], options: argparse.Namespace) -> None:
    rows = []
    medians: dict[tuple[str, str], float] = {}
    for (metric, system), values in samples.items():
        median = statistics.median(values)
        medians[metric, system] = median
        deviation = statistics.median(abs(value - median) for value in values)
        rows.append({"metric": metric, "system": system, "median": median, "mad": deviation, "unit": "s"})
    ours = {metric: median for (metric, system), median in medians.items() if system == "dcp_ckpt"}
    ratios = {
        "stall_sharded": ours["stall"] / medians["stall", "dcp.async_save"],
        "held_over_memcpy": ours["stall"] / medians["memcpy", "machine"],
        "durable": ours["durable"] / medians["durable", "dcp.save"],
        "of_direct_write": medians["direct_write", "machine"] / ours["durable"],
        "load_same": ours["load_same"] / medians["load_same", "dcp.load"],
    }
    for row in rows:
        print(f"{row['metric']:14} {row['system']:16} {row['median']:8.3f} s  +- {row['mad']:.3f}")
    for name, ratio in ratios.items():
        print(f"{name:18} {ratio:.3f}")
    if options.json:
        result = {"machine": machine(options), "rows": rows, "ratios": ratios}
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def machine(options: argparse.Namespace) -> dict[str, object]:
    return {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "world_size": dist.get_world_size(),
        "size_gib": options.size_gib,
        "rounds": options.rounds,
    }


if __name__ == "__main__":
    main()
