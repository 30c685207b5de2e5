"""Saves from and loads to one GPU: how long `save()` holds the training, and how near the bus a load comes.

    python benchmarks/gpu.py --json out.json

One process and one GPU; without one it says so, and there are no rows. In each round every system has its
turn. Every load is compared bit for bit. NOTES.md says how each number is defined.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

# Run as a script: sys.path then starts with benchmarks/, not with the directory above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not in its __all__
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.measure import Samples, WrongBytes
from benchmarks.ratios import MACHINE, OURS, STOCK_LOAD, THREAD
from benchmarks.scale_report import Options, parse_options, report, timed_result
from dcp_ckpt import CheckpointConfig, Checkpointer, LatestN

__all__ = ["main"]

NUM_TENSORS = 64
QUICK_BYTES, FULL_BYTES = 1 << 30, 8 << 30


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(__doc__.splitlines()[0], arguments=arguments)
    warnings.filterwarnings("ignore", category=UserWarning)
    samples = Samples()
    notes: dict[tuple[str, str], str] = {}
    settings: dict[str, object] = {"skipped": "no GPU"}
    if torch.cuda.is_available():
        options.directory.mkdir(parents=True, exist_ok=True)
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        with tempfile.TemporaryDirectory(dir=options.directory) as place:
            measure(samples, options, Path(place))
        dist.destroy_process_group()
        settings = {"gpu": torch.cuda.get_device_name(), "state_bytes": state_bytes(options)}
    else:
        print("no GPU here: nothing is measured")
    report(samples, options, notes=notes, settings=settings)


def state_bytes(options: Options) -> int:
    return QUICK_BYTES if options.quick else FULL_BYTES


def measure(samples: Samples, options: Options, place: Path) -> None:
    """The bus, then saves and loads of both systems, round by round; the first round warms up."""
    numel = state_bytes(options) // NUM_TENSORS // 4
    state = {f"w{number:02}": torch.randn(numel, device="cuda") for number in range(NUM_TENSORS)}
    expected = {name: tensor.clone() for name, tensor in state.items()}
    pinned = torch.empty(numel, pin_memory=True)
    config = CheckpointConfig(keep=LatestN(1), overlap="off")
    with Checkpointer(place / "ours", config=config) as checkpointer:
        checkpointer.load(state)
        for step in range(1, options.rounds + 2):
            found = {
                ("bus_to_host", MACHINE): synchronised(lambda: copy_all(state, pinned)),
                ("bus_to_gpu", MACHINE): synchronised(lambda: fill_all(state, pinned)),
            }
            restore(state, expected)
            found["gpu_held", OURS], handle = timed_result(partial(checkpointer.save, state, step=step))
            handle.result(600)
            found["gpu_load", OURS] = checked(state, expected, lambda: checkpointer.load(state))
            found["gpu_held", THREAD], found["gpu_load", STOCK_LOAD] = stock(state, expected, place / "stock")
            if step > 1:
                for (metric, system), seconds in found.items():
                    samples.add(metric, system, seconds)


def stock(
    state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], place: Path
) -> tuple[float, float]:
    """What `dcp.async_save` holds the caller, and what `dcp.load` of it takes."""
    held, future = timed_result(lambda: dcp_async_save(state, checkpoint_id=place))
    assert isinstance(future, Future), "it stages before it returns"
    future.result()
    shutil.rmtree(place)
    dcp_save(state, checkpoint_id=place)
    seconds = checked(state, expected, lambda: dcp_load(state, checkpoint_id=place))
    shutil.rmtree(place)
    return held, seconds


def checked(
    state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], load: Callable[[], object]
) -> float:
    """The time of a load into tensors that hold something else; raises WrongBytes for a wrong bit."""
    for tensor in state.values():
        tensor.fill_(float("nan"))
    seconds = synchronised(load)
    for name, tensor in state.items():
        if not torch.equal(tensor, expected[name]):
            raise WrongBytes(f"{name} came back with other bytes")
    return seconds


def synchronised(act: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    act()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def copy_all(state: dict[str, torch.Tensor], pinned: torch.Tensor) -> None:
    for tensor in state.values():
        pinned.copy_(tensor, non_blocking=True)


def fill_all(state: dict[str, torch.Tensor], pinned: torch.Tensor) -> None:
    for tensor in state.values():
        tensor.copy_(pinned, non_blocking=True)


def restore(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        tensor.copy_(expected[name])


if __name__ == "__main__":
    main()
