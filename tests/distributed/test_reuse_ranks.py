"""Reuse on real ranks: what is unchanged is shared, and loads on any world when its base is gone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_ckpt import CheckpointConfig, Checkpointer, TrainState, open_checkpoint, verify
from dcp_ckpt.errors import CheckpointNotFound
from dcp_ckpt.policies import LatestN
from tests.distributed import worlds
from tests.eventually import eventually

pytestmark = pytest.mark.distributed

ROWS, COLUMNS, COUNT = 640, 512, 10
"""Each tensor has 1.3 MB, a quarter of which is a file's worth sharing."""


def config(**settings: Any) -> CheckpointConfig:
    return worlds.config(**{"reuse": True, "keep": LatestN(1)} | settings)


def whole(name: str, version: int) -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS) + 7 * version + len(name)


def state_of(versions: dict[str, int]) -> dict[str, Any]:
    """Half of the tensors are sharded, and half of them every rank has whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, Any] = {}
    for number, (name, version) in enumerate(versions.items()):
        tensor = whole(name, version)
        sharded = number % 2 == 0
        state[name] = distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None) if sharded else tensor
    return state


def names() -> dict[str, int]:
    return {f"t{number}": 0 for number in range(COUNT)}


def save_changing(
    path: str, steps: list[list[str]], resume: bool, reader: str | None = None
) -> list[tuple[int, int]]:
    """Save once for each list of names that change before; returns sizes and what of them was shared.

    Args:
        reader: directory where a reader notes what it has read: each step is waited for.
    """
    versions = names()
    found = []
    with Checkpointer(path, config=config()) as checkpointer:
        first = 1
        if resume:
            report = checkpointer.load(state := state_of(versions))
            assert report is not None
            first = report.step + 1
            versions = {name: _version(name, tensor) for name, tensor in state.items()}
        for step, changed in enumerate(steps, start=first):
            versions |= dict.fromkeys(changed, step)
            info = checkpointer.save(state_of(versions), step=step).result(60)
            found.append((info.bytes, info.shared_bytes))
            if reader is not None and dist.get_rank() == 0:
                assert eventually(Path(reader, Path(info.path).name).exists, timeout_seconds=60)
    return found


def _version(name: str, tensor: Any) -> int:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return int((full[0, 0].item() - len(name)) / 7)


def load_differing(path: str, versions: dict[str, int]) -> list[str]:
    """Load the newest into zeros; the names that are not as they should be."""
    state = state_of(names())
    with Checkpointer(path, config=config(reuse=False)) as checkpointer:
        assert checkpointer.load(state) is not None
    right = state_of(versions)
    return [name for name in versions if not worlds.same_bits(state[name], right[name])]


def test_a_small_change_is_a_small_save_and_loads_anywhere_without_its_base(pool, tmp_path):
    path = str(tmp_path)
    steps = [[], ["t0"], ["t1"], ["t0"], []]
    (sizes, *others) = pool.run(save_changing, 4, path, steps, False)
    assert all(other == sizes for other in others)
    one = ROWS * COLUMNS * 4
    written = [total - shared for total, shared in sizes]
    assert written[0] > COUNT * one
    assert all(num_bytes < 1.2 * one for num_bytes in written[1:])
    assert [directory.name for directory in tmp_path.glob("step-*")] == ["step-00000005"]
    assert verify(tmp_path).ok
    versions = names() | {"t0": 4, "t1": 3}
    for world in (4, 3):
        for differing in pool.run(load_differing, world, path, versions):
            assert differing == []
    # The same world goes on where it was; another one writes everything once.
    for world, is_shared in ((4, True), (3, False)):
        (sizes, *_) = pool.run(save_changing, world, path, [["t2"], ["t3"]], True)
        assert [bool(shared) for _, shared in sizes] == [is_shared, True]
    with open_checkpoint(f"{path}@latest") as checkpoint:
        for name, version in (versions | {"t2": 8, "t3": 9}).items():
            assert torch.equal(checkpoint.read_tensor(name), whole(name, version)), name


class Tuned(nn.Module):
    """A base that is frozen, and an adapter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(COLUMNS, ROWS, bias=False)
        self.base.weight.requires_grad_(False)
        self.down = nn.Linear(COLUMNS, 4, bias=False)
        self.up = nn.Linear(4, ROWS, bias=False)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.base(data) + self.up(self.down(data))
        return output


def tune(path: str, overlap: str, num_steps: int) -> tuple[list[int], dict[str, str]]:
    """Train adapters of a sharded model; what each save wrote, and what the state is at the end."""
    model = Tuned()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    torch.manual_seed(dist.get_rank())
    written = []
    with Checkpointer(path, config=config(overlap=overlap)) as checkpointer:
        for step in range(1, num_steps + 1):
            worlds.train_step(model, optimizer, torch.randn(4, COLUMNS))
            handle = checkpointer.save(TrainState(model=model, optimizer=optimizer), step=step)
            info = handle.result(60)
            written.append(info.bytes - info.shared_bytes)
    return written, worlds.snapshot(model, optimizer)


def load_tuned(path: str) -> dict[str, str]:
    model = Tuned()
    model.base.weight.data.zero_()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with Checkpointer(path, config=config()) as checkpointer:
        assert checkpointer.load(TrainState(model=model, optimizer=optimizer)) is not None
    return worlds.snapshot(model, optimizer)


@pytest.mark.parametrize("overlap", ["off", "step"])
def test_the_base_of_a_fine_tuning_is_stored_once(pool, tmp_path, overlap):
    path = str(tmp_path)
    found = pool.run(tune, 4, path, overlap, 4)
    written, expected = found[0]
    base_bytes = ROWS * COLUMNS * 4
    assert written[0] > base_bytes
    assert all(num_bytes < 0.25 * base_bytes for num_bytes in written[1:])
    for world in (4, 2):
        for snapshot in pool.run(load_tuned, world, path):
            assert snapshot == expected


@contextmanager
def reading(path: Path, notes: Path) -> Iterator[None]:
    """Open and read whatever is the newest, over and over; `notes` gets the names of what was read."""
    notes.mkdir()
    done = threading.Event()
    wrong: list[BaseException] = []

    def run() -> None:
        while not done.is_set() and not wrong:
            try:
                with open_checkpoint(f"{path}@latest") as checkpoint:
                    for name in checkpoint.tensors:
                        checkpoint.read_tensor(name)
                    (notes / checkpoint.directory).touch()
            except CheckpointNotFound:
                continue  # none yet, or removed while it was read
            except BaseException as error:
                wrong.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not wrong, wrong[0]


def test_whatever_is_committed_loads_while_all_but_the_newest_go(pool, tmp_path):
    """Twenty saves in which different tensors change, and a reader that never stops."""
    generator = torch.Generator().manual_seed(1)
    steps = [
        [f"t{number}" for number in torch.randperm(COUNT, generator=generator)[: step % 4].tolist()]
        for step in range(20)
    ]
    run, notes = tmp_path / "run", tmp_path / "read"
    with reading(run, notes):
        (sizes, *_) = pool.run(save_changing, 2, str(run), steps, False, str(notes))
    assert len(list(notes.iterdir())) == 20
    assert len(sizes) == 20
    assert all(shared for _, shared in sizes[1:])
    versions = names()
    for step, changed in enumerate(steps, start=1):
        versions |= dict.fromkeys(changed, step)
    with open_checkpoint(f"{run}@latest") as checkpoint:
        for name, version in versions.items():
            assert torch.equal(checkpoint.read_tensor(name), whole(name, version)), name
