"""How long it takes to read one tensor out of a checkpoint of 20,000 chunks: open, read, close.

    python benchmarks/random_access.py --json out.json

5,000 tensors of 16 x 64 float32 in 4 shards each, saved by 4 ranks, once by each system. Then one process
reads one tensor, another one each time, with the files in the page cache; every tensor read is compared.
NOTES.md says how each number is defined.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

# Run as a script: sys.path then starts with benchmarks/, not with the directory above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.machine import bytes_read
from benchmarks.measure import Samples, WrongBytes
from benchmarks.ratios import OURS, STOCK_KEY
from benchmarks.scale_report import Options, parse_options, report, timed_result
from dcp_ckpt import CheckpointConfig, Checkpointer, open_checkpoint

__all__ = ["main"]

WORLD_SIZE, NUM_TENSORS = 4, 5_000
SHAPE = (16, 64)
SAVE = "save-both"
"""As the first argument: this process is one of the ranks that save."""
TIMEOUT_SECONDS = 300


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(__doc__.splitlines()[0], arguments=arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=UserWarning)
    samples = Samples()
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        launch_ranks(Path(place))
        measure(samples, options, Path(place))
    report(
        samples,
        options,
        notes={},
        settings={"world_size": WORLD_SIZE, "num_tensors": NUM_TENSORS, "shape": SHAPE},
    )


def launch_ranks(place: Path) -> None:
    """Save with both systems, on real ranks."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD_SIZE)]
    command = [sys.executable, *launch, __file__, SAVE, str(place)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, timeout=TIMEOUT_SECONDS, check=True)


def save_both(place: Path) -> None:
    """On each rank."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    rows = SHAPE[0] // WORLD_SIZE
    start = dist.get_rank() * rows
    state = {
        name_of(number): DTensor.from_local(
            expected(number)[start : start + rows].contiguous(), mesh, [Shard(0)], run_check=False
        )
        for number in range(NUM_TENSORS)
    }
    with Checkpointer(place / "ours", config=CheckpointConfig(dcp_metadata="never")) as checkpointer:
        checkpointer.save(state, step=1).result()
    save(state, checkpoint_id=place / "stock")
    dist.destroy_process_group()


def name_of(number: int) -> str:
    return f"layers.{number // 10}.mlp.expert_{number % 10}.weight"


def expected(number: int) -> torch.Tensor:
    return torch.arange(number, number + SHAPE[0] * SHAPE[1], dtype=torch.float32).reshape(SHAPE)


def measure(samples: Samples, options: Options, place: Path) -> None:
    """Both in turn, of another tensor each time; the first time warms up."""

    def ours(name: str) -> torch.Tensor:
        with open_checkpoint(place / "ours" / "step-00000001") as checkpoint:
            return checkpoint.read_tensor(name)

    def stock(name: str) -> torch.Tensor:
        state = {name: torch.full(SHAPE, float("nan"))}
        load(state, checkpoint_id=place / "stock", no_dist=True)
        return state[name]

    for number in range(options.rounds + 1):
        samples.counting = number > 0
        chosen = number * (NUM_TENSORS - 1) // options.rounds
        read(samples, OURS, ours, chosen)
        read(samples, STOCK_KEY, stock, chosen)


def read(samples: Samples, system: str, read_one: Callable[[str], torch.Tensor], number: int) -> None:
    before = bytes_read()
    seconds, tensor = timed_result(lambda: read_one(name_of(number)))
    samples.add("one_tensor_bytes", system, bytes_read() - before)
    samples.add("one_tensor", system, seconds)
    if not torch.equal(tensor, expected(number)):
        raise WrongBytes(f"{system} read other bytes than were saved of {name_of(number)}")


if __name__ == "__main__":
    if sys.argv[1:2] == [SAVE]:
        save_both(Path(sys.argv[2]))
    else:
        main()
