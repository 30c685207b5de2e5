"""Staging: copying one state's bytes into the arena, so that training may go on while they are written.

Called on the main thread of every rank, at an optimizer-step boundary. It reads the live state exactly as it
is now; what it returns shares no memory with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dcp_ckpt.errors import StateError
from dcp_ckpt.format.containers import SLAB_ALIGNMENT_BYTES, value_container
from dcp_ckpt.format.digests import digest
from dcp_ckpt.format.documents import encode_json
from dcp_ckpt.format.fragment import FileEntry, ValueEntry
from dcp_ckpt.save.arena import Arena
from dcp_ckpt.save.layout import SEGMENT_BYTES, round_up
from dcp_ckpt.save.plan import LayoutKey, SavePlan, layout_key, make_plan
from dcp_ckpt.state.component import Captured, Component, Path
from dcp_ckpt.state.placements import local_tensor

__all__ = ["Staged", "Stager", "capture"]

_SAMPLE_ELEMENTS = 64
"""How much of every unsharded tensor is compared between ranks: enough to see replicas that drifted apart."""


@dataclass(frozen=True, kw_only=True)
class Staged:
    """One rank's staged state.

    Args:
        plan: its layout.
        arena: holds the bytes of the data file.
        file_bytes: size of the data file; 0 when this rank writes none.
        values: replicated values with the place of their containers; rank 0 only.
        per_rank: values of this rank.
        replicated: name -> digest of everything that must be equal on all ranks.
    """

    plan: SavePlan
    arena: Arena
    file_bytes: int
    values: dict[str, ValueEntry]
    per_rank: dict[str, ValueEntry]
    replicated: dict[str, str]

    @property
    def files(self) -> list[FileEntry]:
        """The data files, digests still to be filled in by the writer."""
        return [FileEntry(size_bytes=self.file_bytes, block_digests="")] if self.file_bytes else []


@dataclass
class _Bound:
    """A plan bound to an arena."""

    key: LayoutKey
    plan: SavePlan
    arena: Arena
    views: list[torch.Tensor] = field(default_factory=list)


def capture(components: Sequence[Component]) -> Captured:
    """What all components hold now, tensors sorted by path.

    Raises:
        StateError: two leaves have the same path, or one cannot be stored.
    """
    tensors: dict[Path, torch.Tensor] = {}
    values: dict[Path, Any] = {}
    per_rank: dict[Path, Any] = {}
    stock: dict[Path, Any] = {}
    for component in components:
        captured = component.capture()
        tensors.update(captured.tensors)
        values.update(captured.values)
        per_rank.update(captured.per_rank)
        stock.update(captured.stock)
    return Captured(tensors=dict(sorted(tensors.items())), values=values, per_rank=per_rank, stock=stock)


class Stager:
    """Owns the arena and the plan of one Checkpointer on one rank."""

    def __init__(self, *, rank: int, world_size: int, global_ranks: Sequence[int]) -> None:
        self._rank = rank
        self._world_size = world_size
        self._global_ranks = tuple(global_ranks)
        self._bound: _Bound | None = None

    @torch.no_grad()
    def stage(self, captured: Captured) -> Staged:
        """Copy the captured state into the arena. Blocks for the copy; the arena must be free.

        Raises:
            StateError: the state cannot be stored.
            StorageFull: no memory for the arena.
        """
        containers = self._value_containers(captured)
        bound = self._bind(captured, sum(len(data) + SEGMENT_BYTES for data in containers.values()))
        locals_ = [local_tensor(tensor) for tensor in captured.tensors.values()]
        sources = [
            locals_[index] if part is None else locals_[index][part] for index, part in bound.plan.sources
        ]
        if sources:
            torch._foreach_copy_(bound.views, sources)
        replicated = self._replicated(captured, bound.plan, locals_)
        values, file_bytes = self._lay_values(captured, bound, containers)
        return Staged(
            plan=bound.plan,
            arena=bound.arena,
            file_bytes=file_bytes,
            values=values,
            per_rank=_entries(captured.per_rank),
            replicated=replicated,
        )

    def close(self) -> None:
        """Release the arena. Idempotent."""
        if self._bound is not None:
            self._bound.views.clear()
            self._bound.arena.close()
            self._bound = None

    def _bind(self, captured: Captured, value_bytes: int) -> _Bound:
        """The plan and arena for this layout; both are kept until the layout changes or values outgrow it."""
        key = layout_key(captured.tensors)
        bound = self._bound
        plan = bound.plan if bound is not None and bound.key == key else None
        if plan is None:
            plan = make_plan(
                captured.tensors,
                rank=self._rank,
                world_size=self._world_size,
                global_ranks=self._global_ranks,
            )
            _refuse_shared_names(plan, captured)
        elif bound is not None and plan.layout.tensor_bytes + value_bytes <= bound.arena.size_bytes:
            return bound
        self.close()
        # Twice what the values need now: they grow (loss histories) and a new arena costs fresh pages.
        arena = Arena(plan.layout.tensor_bytes + 2 * value_bytes)
        self._bound = _Bound(key, plan, arena, plan.lay_out(arena))
        return self._bound

    def _value_containers(self, captured: Captured) -> dict[Path, bytes]:
        if self._rank != 0:
            return {}
        return {path: value_container(value) for path, value in captured.stock.items()}

    def _lay_values(
        self, captured: Captured, bound: _Bound, containers: Mapping[Path, bytes]
    ) -> tuple[dict[str, ValueEntry], int]:
        position = bound.plan.layout.tensor_bytes
        if self._rank != 0:
            return {}, position
        entries = _entries(captured.values)
        for path, data in containers.items():
            bound.arena.write(position, data)
            entries[".".join(path)] = ValueEntry(
                path=list(path),
                value=captured.values[path],
                container_offset=position,
                container_bytes=len(data),
            )
            position = round_up(position + len(data), SLAB_ALIGNMENT_BYTES)
        end = round_up(position, SEGMENT_BYTES)
        bound.arena.write(position, bytes(end - position))
        return entries, end

    def _replicated(
        self, captured: Captured, plan: SavePlan, locals_: Sequence[torch.Tensor]
    ) -> dict[str, str]:
        if self._world_size == 1:
            return {}
        digests = {".".join(path): digest(encode_json(value)) for path, value in captured.values.items()}
        samples = [_first_elements(locals_[index]) for index in plan.replicated]
        for index, sample in zip(plan.replicated, samples, strict=True):
            # Not by way of numpy, which is not required.
            data = bytes(sample.contiguous().view(torch.uint8).tolist()) if sample.numel() else b""
            kind = [str(sample.dtype).removeprefix("torch."), list(locals_[index].shape)]
            digests[plan.names[index]] = digest(encode_json(kind) + data)
        return digests


def _first_elements(tensor: torch.Tensor) -> torch.Tensor:
    """The first elements in row-major order, without copying the rest of a tensor that is not contiguous."""
    while tensor.ndim > 1 and tensor.shape[0] and tensor[0].numel() >= _SAMPLE_ELEMENTS:
        tensor = tensor[0]
    return tensor[:_SAMPLE_ELEMENTS].reshape(-1)[:_SAMPLE_ELEMENTS] if tensor.ndim else tensor.reshape(-1)


def _entries(values: Mapping[Path, Any]) -> dict[str, ValueEntry]:
    return {".".join(path): ValueEntry(path=list(path), value=value) for path, value in values.items()}


def _refuse_shared_names(plan: SavePlan, captured: Captured) -> None:
    taken = set(plan.names)
    for path in (*captured.values, *captured.per_rank):
        name = ".".join(path)
        if name in taken:
            raise StateError(f"a value and another entry have the same name {name!r}; rename one of them")
        taken.add(name)
