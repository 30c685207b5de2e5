"""What the programs of these tests share: tensors of every kind with known bytes, and a small model.

Imported by the ranks of the pool as well as by the tests.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from dcp_ckpt import CheckpointConfig, Checkpointer, TrainState
from dcp_ckpt.errors import CheckpointError

VALUES: dict[str, Any] = {
    "betas": (0.9, 0.95),
    "big": 2**70,
    "by_int": {3: "three", 1: "one"},
    "history": [0.5, 0.25],
    "lr": 3e-4,
    "name": "run",
    "nested": {"empty": {}, "flag": True, "none": None, "raw": b"\x00\xff"},
}


def blank_values() -> dict[str, Any]:
    """A state that takes `VALUES`; an empty dictionary takes whatever is stored below it."""
    return {name: {} if name == "nested" else None for name in VALUES}


def config(**settings: Any) -> CheckpointConfig:
    """Keeps everything, removes at once, and never waits long."""
    return CheckpointConfig(**{"keep": None, "grace_seconds": 0.0, "timeout_seconds": 30.0} | settings)


def outcome(act: Callable[[], Any]) -> tuple[str, str]:
    """The class and message of the CheckpointError that `act` raises; ("ok", "") when it does not."""
    try:
        act()
    except CheckpointError as error:
        return type(error).__name__, str(error)
    return "ok", ""


@dataclass(frozen=True)
class Known:
    """A tensor whose global bytes follow from its name."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "plain"

    def whole(self, name: str) -> torch.Tensor:
        """The global tensor: the same bytes on every rank, at every call."""
        count = torch.Size(self.shape).numel()
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if self.dtype == torch.bool:
            return torch.randint(0, 2, self.shape, generator=generator).bool()
        data = torch.randint(0, 256, (count * self.dtype.itemsize,), generator=generator, dtype=torch.uint8)
        return data.view(self.dtype).reshape(self.shape)


KNOWN = {
    "plain.matrix": Known((5, 3), torch.float32),
    "plain.scalar": Known((), torch.int64),
    "plain.flag": Known((), torch.bool),
    "plain.half": Known((7,), torch.float16),
    "plain.empty": Known((0, 3), torch.float32),
    "plain.large": Known((1300, 1024), torch.float32),
    "plain.tall": Known((2, 70_000), torch.bfloat16),
    "plain.complex": Known((2, 3), torch.complex64),
    "replicated.matrix": Known((5, 3), torch.float64, "replicate"),
    "replicated.large": Known((1100, 1024), torch.float32, "replicate"),
    "rows.matrix": Known((5, 3), torch.float32, "rows"),
    "rows.one": Known((1, 17), torch.bfloat16, "rows"),
    "rows.two": Known((2,), torch.float8_e4m3fn, "rows"),
    "rows.none": Known((0, 3), torch.float32, "rows"),
    "rows.seven": Known((7,), torch.int64, "rows"),
    "rows.flags": Known((9, 2), torch.bool, "rows"),
    "rows.complex": Known((6, 2, 2), torch.complex128, "rows"),
    "rows.large": Known((1030, 130), torch.float64, "rows"),
    "columns.matrix": Known((5, 3), torch.float32, "columns"),
    "columns.wide": Known((1, 17), torch.float8_e5m2, "columns"),
    "columns.large": Known((300, 700), torch.float32, "columns"),
    "hybrid.matrix": Known((5, 3), torch.float32, "hybrid"),
    "hybrid.one": Known((1, 17), torch.int8, "hybrid"),
    "both.matrix": Known((7, 5), torch.bfloat16, "both"),
    "twice.rows": Known((11, 2), torch.float32, "twice"),
    "strided.rows": Known((11, 2), torch.float32, "strided"),
    "strided.few": Known((3,), torch.complex64, "strided"),
}


def placed(name: str, known: Known, *, blank: bool) -> torch.Tensor:
    """The live tensor of this rank for the world that is up; `blank` ones hold nothing that is right."""
    whole = known.whole(name)
    if blank:
        whole = (
            torch.logical_not(whole)
            if known.dtype == torch.bool
            else _bytes(whole).bitwise_not_().view(whole.dtype)
        ).reshape(known.shape)
    if known.layout == "plain":
        return whole
    mesh, placements = _placements(known.layout)
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def _placements(layout: str) -> tuple[DeviceMesh, Sequence[Placement]]:
    """Two-dimensional meshes where the world has an even number of ranks, else a row of all ranks."""
    world = dist.get_world_size()
    if world % 2 or layout in ("replicate", "rows", "columns"):
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
        return mesh, [{"replicate": Replicate(), "columns": Shard(1)}.get(layout, Shard(0))]
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
    grid: dict[str, list[Placement]] = {
        "hybrid": [Replicate(), Shard(0)],
        "both": [Shard(0), Shard(1)],
        "twice": [Shard(0), Shard(0)],
        "strided": [_StridedShard(0, split_factor=world // 2), Shard(0)],
    }
    return mesh, grid[layout]


def known_state(*, blank: bool) -> dict[str, Any]:
    """All of `KNOWN` as a flat state, placed for this world."""
    return {name: placed(name, known, blank=blank) for name, known in KNOWN.items()}


def differing(state: dict[str, Any]) -> list[str]:
    """The names whose local bytes are not those of `KNOWN`."""
    right = known_state(blank=False)
    return [name for name in KNOWN if not same_bits(state[name], right[name])]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the local parts are of equal shape, dtype and bytes."""
    a, b = _local(a), _local(b)
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8).clone()


def fingerprint(tensor: torch.Tensor) -> str:
    """Dtype, global shape and a digest of all bytes; collective for a DTensor."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    data = hashlib.sha256(_bytes(whole.detach()).numpy().tobytes()).hexdigest()[:16]
    return f"{tensor.dtype} {tuple(tensor.shape)} {data}"


class Net(nn.Module):
    """Small, with dropout, a buffer, and parameters of fewer rows than there are ranks."""

    calls: torch.Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(11, 7)
        self.first = nn.Linear(7, 5)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 3)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        hidden = nn.functional.dropout(self.first(self.embedding(tokens)), 0.2, self.training)
        output: torch.Tensor = self.last(self.norm(hidden)) * self.gain
        return output


def build(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model spread over this world (`fsdp`, `hsdp`, `ddp`) and AdamW over its parameters."""
    model: nn.Module = Net(seed)
    if kind == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        world = dist.get_world_size()
        shape, names = ((2, world // 2), ("r", "s")) if kind == "hsdp" else ((world,), ("s",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        fully_shard(model.first, mesh=mesh)  # type: ignore[arg-type]
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    """One step on this rank's tokens; returns this rank's loss."""
    loss: torch.Tensor = model(tokens).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Fingerprints of all parameters, buffers and moments, by plain names; collective."""
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        plain = name.removeprefix("module.")
        found[plain] = fingerprint(tensor)
        for key, value in sorted(optimizer.state.get(tensor, {}).items()):
            found[f"{plain}/{key}"] = fingerprint(value)
    return found


def save_trained(path: str, kind: str, num_steps: int) -> dict[str, str]:
    """Train from seed 0, save, and say what was saved."""
    model, optimizer = build(kind, seed=0)
    torch.manual_seed(dist.get_rank())
    for _ in range(num_steps):
        train_step(model, optimizer, torch.randint(0, 11, (4,)))
    with Checkpointer(path, config=config()) as checkpointer:
        checkpointer.save(TrainState(model=model, optimizer=optimizer), step=num_steps).result(30)
    return snapshot(model, optimizer)


def load_and_save(path: str, kind: str, save_step: int | None) -> dict[str, str]:
    """Load the newest step into objects that start out different, say what they hold, and save it again."""
    model, optimizer = build(kind, seed=1)
    state = TrainState(model=model, optimizer=optimizer)
    with Checkpointer(path, config=config()) as checkpointer:
        assert checkpointer.load(state) is not None
        found = snapshot(model, optimizer)
        if save_step is not None:
            checkpointer.save(state, step=save_step).result(30)
    return found
