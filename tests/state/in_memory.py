"""A save and a load in memory, as the real ones use components: for tests of the state layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.values import decode_value
from dcp_ckpt.state import Captured, Component, Path, Problem, StoredState, StoredTensor
from dcp_ckpt.state.keying import take_keying
from dcp_ckpt.state.tensors import once_each


@dataclass
class InMemory:
    """One checkpoint: whole tensors on the CPU and values as canonical JSON."""

    world_size: int = 1
    payloads: dict[str, torch.Tensor] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    values: dict[str, bytes] = field(default_factory=dict)
    per_rank: dict[str, bytes] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    per_rank_of: dict[int, dict[str, bytes]] = field(default_factory=dict)

    def stored(self, *, rank: int = 0, world_size: int = 1) -> StoredState:
        values = {name: _decode(data) for name, data in self.values.items()}
        keying = take_keying(values, self.world_size)
        return StoredState(
            tensors={
                name: StoredTensor(path=self.paths[name], dtype=tensor.dtype, shape=tuple(tensor.shape))
                for name, tensor in self._named().items()
            },
            aliases=self.aliases,
            values=values,
            value_paths={name: self.paths[name] for name in values},
            keying=keying,
            per_rank_of=self._decoded_of,
            step=7,
            saved_world_size=self.world_size,
            rank=rank,
            world_size=world_size,
            seed_material="run/7",
        )

    def _named(self) -> dict[str, torch.Tensor]:
        return self.payloads | {alias: self.payloads[name] for alias, name in self.aliases.items()}

    def _decoded_of(self, rank: int) -> dict[str, Any]:
        assert 0 <= rank < self.world_size
        return {name: _decode(data) for name, data in self.per_rank_of.get(rank, self.per_rank).items()}

    @property
    def names(self) -> set[str]:
        return {*self.payloads, *self.values}


def _decode(data: bytes) -> Any:
    return decode_value(msgspec.json.decode(data), path="test")


def save(components: Iterable[Component], *, world_size: int = 1) -> InMemory:
    """Capture everything; collective when tensors are DTensors."""
    saved = InMemory(world_size=world_size)
    for component in components:
        captured: Captured = component.capture()
        tensors, aliases = once_each(captured.tensors)
        saved.aliases.update(
            (".".join(alias), ".".join(path)) for path, others in aliases.items() for alias in others
        )
        for path, tensor in tensors.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            saved.payloads[".".join(path)] = whole.detach().clone()
        for path, value in captured.values.items():
            saved.values[".".join(path)] = encode_json(value)
        for path, value in captured.per_rank.items():
            saved.per_rank[".".join(path)] = encode_json(value)
        for path in (*captured.tensors, *captured.values, *captured.per_rank):
            assert ".".join(path) not in saved.paths
            saved.paths[".".join(path)] = path
    return saved


def save_ranks(make: Callable[[int], Iterable[Component]], world_size: int) -> InMemory:
    """What `world_size` ranks save together; `make` gives the components of one, as it stands then."""
    saved = InMemory(world_size=world_size)
    for rank in range(world_size):
        own = save(make(rank), world_size=world_size)
        saved.per_rank_of[rank] = own.per_rank
        saved.values, saved.paths = own.values, own.paths
    return saved


def problems_of(
    saved: InMemory, components: Iterable[Component], *, rank: int = 0, world_size: int = 1
) -> list[Problem]:
    stored = saved.stored(rank=rank, world_size=world_size)
    return [problem for component in components for problem in component.targets(stored).problems]


def load(
    saved: InMemory, components: Iterable[Component], *, rank: int = 0, world_size: int = 1
) -> list[str]:
    """Fill all targets, then install; the notes. Fails on any problem, like a strict load."""
    stored = saved.stored(rank=rank, world_size=world_size)
    wanted = [(component, component.targets(stored)) for component in components]
    assert [problem for _, targets in wanted for problem in targets.problems] == []
    for _, targets in wanted:
        for name, target in targets.tensors.items():
            payload = saved.payloads[saved.aliases.get(name, name)]
            assert (target.dtype, tuple(target.shape)) == (payload.dtype, tuple(payload.shape)), name
            with torch.no_grad():
                if isinstance(target, DTensor):
                    part = distribute_tensor(payload, target.device_mesh, target.placements)
                    target.to_local().copy_(part.to_local())
                else:
                    target.copy_(payload)
    return [note for component, targets in wanted for note in component.install(stored, targets)]
